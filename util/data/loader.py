import math
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from util.data.bad import BadImages
from util.data.feed import Feed, Work
from util.data.images import Images
from util.data.order import Order
from util.data.transforms import Transform
from util.plan import Plan
from util.times import Size, Time, as_size, read_changes


class Loader:
    """Endless shuffled micro-batches that can start at any optimizer step.

    A step's images follow from (seed, step, plan), and any number of processes share them out; an image's augmentation
    follows from (seed, epoch, index). What does not fill a last batch is left out of its epoch, other images each time.

    plan: what the steps are made of. weights: of the sources of the images, see Order.
    mean, std: of each channel, on the scale of [0, 1]; batches are normalised by them.
    """

    def __init__(
        self,
        images: Images,
        transform: Transform,
        plan: Plan,
        mean: Sequence[float],
        std: Sequence[float],
        seed: int = 0,
        workers: int = 0,
        rank: int = 0,
        world: int = 1,
        device: str | torch.device = "cpu",
        bad: BadImages | None = None,
        weights: Sequence[float] | None = None,
    ):
        self.images, self.plan, self.rank, self.world = images, plan, rank, world
        self.order = Order(images.bounds, weights, seed)
        self.inner = torch.from_numpy(self.order.bounds[1:-1]).to(device)  # where one source ends and the next begins
        self.feed = Feed(images, transform, seed, workers, world, device, mean, std, bad)

    @property
    def note(self) -> str:
        """One line for the user about what this loader makes of the data, or nothing."""
        batch = max(stage.batch for stage in self.plan.stages)
        if len(self.images) >= batch:
            return ""
        times = math.ceil(batch / len(self.images))
        return f"{len(self.images):,} images do not fill a batch of {batch:,}: each takes some {times} times"

    @property
    def waited(self) -> float:
        """Seconds spent waiting for data so far."""
        return self.feed.waited

    def batches(self, start: int = 0) -> Iterator[dict]:
        """Micro-batches for ever, as many to a step as its stage accumulates, from optimizer step `start` on.

        Those of several sources hold as "figures" the share that was drawn from each.
        """
        for batch in self.feed.run(self.work(start)):
            if len(self.inner):
                source = torch.bucketize(batch["index"], self.inner, right=True)
                shares = [(source == number).float().mean() for number in range(len(self.inner) + 1)]
                batch["figures"] = {f"drawn/{number + 1}": share for number, share in enumerate(shares)}
            yield batch

    def work(self, step: int) -> Iterator[Work]:
        epoch = order = None
        while True:
            stage = self.plan.at(step)
            number, place = divmod(step - stage.step, stage.steps_per_epoch)
            if epoch != stage.passes + number:
                epoch = stage.passes + number
                order = self.order(epoch, stage.batch)
            share = stage.batch // self.world
            mine = order[place * stage.batch + self.rank * share :][:share]
            for micro in np.split(mine, stage.accumulate):
                yield micro, epoch, stage.size
            step += 1


class Ordered:
    """Every image once, in order, split over processes without padding, so that their counts add up exactly.

    batch: images at a time; or `parts`, the positions in each batch of this process, instead of its share of all.
    Processes may differ in their number of batches: no collective inside the loop.
    """

    def __init__(
        self,
        images: Images,
        transform: Transform,
        batch: int,
        size: int | Sequence[int],
        mean: Sequence[float],
        std: Sequence[float],
        seed: int = 0,
        workers: int = 0,
        rank: int = 0,
        world: int = 1,
        device: str | torch.device = "cpu",
        bad: BadImages | None = None,
        parts: Sequence[np.ndarray] | None = None,
    ):
        self.size = as_size(size)
        mine = np.arange(rank, len(images), world)
        self.parts = [mine[i : i + batch] for i in range(0, len(mine), batch)] if parts is None else parts
        self.feed = Feed(images, transform, seed, min(workers, len(self.parts)), world, device, mean, std, bad)

    def __len__(self) -> int:
        return len(self.parts)

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        return self.feed.run([(part, 0, self.size) for part in self.parts])


def read_schedule(size: int | Sequence) -> list[tuple[Time, Size]]:
    """[(from when, (height, width)), ...] from one size or a schedule; UserError if it does not start at epoch 0."""
    return read_changes("data.size", size, as_size)
