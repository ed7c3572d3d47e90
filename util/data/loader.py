import math
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from util.data.bad import BadImages
from util.data.feed import Feed, Work
from util.data.images import Images
from util.data.transforms import Size, Transform
from util.errors import UserError


class Loader:
    """Endless shuffled micro-batches that can start at any optimizer step.

    A step's images follow from (seed, step, batch), and any number of processes share them out; an image's augmentation
    follows from (seed, epoch, index). What does not fill a last batch is left out of its epoch, other images each time.

    batch: images per step over all processes; per_device: images per micro-batch, from which `accumulate` follows.
    size: pixels as one number or (height, width), or a schedule [(from epoch, size), ...] that starts at epoch 0.
    mean, std: of each channel, on the scale of [0, 1]; batches are normalised by them.
    """

    def __init__(
        self,
        images: Images,
        transform: Transform,
        batch: int,
        per_device: int,
        size: int | Sequence,
        mean: Sequence[float],
        std: Sequence[float],
        seed: int = 0,
        workers: int = 0,
        rank: int = 0,
        world: int = 1,
        device: str | torch.device = "cpu",
        bad: BadImages | None = None,
    ):
        self.accumulate = derive_accumulate(batch, per_device, world)
        self.images, self.batch, self.seed, self.rank, self.world = images, batch, seed, rank, world
        self.schedule = read_schedule(size)
        self.steps_per_epoch = max(1, len(images) // batch)
        self.feed = Feed(images, transform, seed, workers, world, device, mean, std, bad)

    @property
    def note(self) -> str:
        """One line for the user about what this loader makes of the data, or nothing."""
        if len(self.images) >= self.batch:
            return ""
        times = math.ceil(self.batch / len(self.images))
        return f"{len(self.images):,} images do not fill a batch of {self.batch:,}: each takes some {times} times"

    @property
    def waited(self) -> float:
        """Seconds spent waiting for data so far."""
        return self.feed.waited

    def size_at(self, epoch: int) -> Size:
        return next(size for start, size in reversed(self.schedule) if start <= epoch)

    def batches(self, start: int = 0) -> Iterator[dict[str, Tensor]]:
        """Micro-batches for ever, `accumulate` to a step, from optimizer step `start` on."""
        return self.feed.run(self.work(start))

    def work(self, step: int) -> Iterator[Work]:
        share = self.batch // self.world
        while True:
            epoch, first = divmod(step, self.steps_per_epoch)
            order = np.random.default_rng([self.seed, epoch]).permutation(max(len(self.images), self.batch))
            for step_of_epoch in range(first, self.steps_per_epoch):
                mine = order[step_of_epoch * self.batch + self.rank * share :][:share]
                for micro in np.split(mine, self.accumulate):
                    yield micro, epoch, self.size_at(epoch)
            step += self.steps_per_epoch - first


class Ordered:
    """Every image once, in order, split over processes without padding, so that their counts add up exactly.

    batch: images at a time. Processes may differ in their number of batches: no collective inside the loop.
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
    ):
        self.size = as_size(size)
        mine = np.arange(rank, len(images), world)
        self.parts = [mine[i : i + batch] for i in range(0, len(mine), batch)]
        self.feed = Feed(images, transform, seed, min(workers, len(self.parts)), world, device, mean, std, bad)

    def __len__(self) -> int:
        return len(self.parts)

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        return self.feed.run([(part, 0, self.size) for part in self.parts])


def derive_accumulate(batch: int, per_device: int, world: int) -> int:
    """Micro-batches per step; raises UserError when they do not come out even."""
    together = per_device * world
    if batch > 0 and batch % together == 0:
        return batch // together
    near = [n for n in (batch // together * together, -(-batch // together) * together) if n > 0] or [together]
    smaller = f", or run.per_device {batch // world}" if 0 < batch < together and batch % world == 0 else ""
    raise UserError(
        f"data.batch {batch} is not a multiple of {together} ({world} processes x run.per_device {per_device}): "
        f"use {' or '.join(map(str, near))}{smaller}"
    )


def read_schedule(size: int | Sequence) -> list[tuple[float, Size]]:
    """[(from epoch, (height, width)), ...] from one size or a schedule; UserError when it does not start at epoch 0."""
    if isinstance(size, int) or isinstance(size[0], int):
        return [(0, as_size(size))]
    schedule = [(epoch, as_size(pixels)) for epoch, pixels in size]
    if schedule[0][0] != 0 or schedule != sorted(schedule, key=lambda entry: entry[0]):
        raise UserError(
            f"data.size {size} must give sizes from epoch 0 on, later epochs later, such as [[0, 128], [200, 160]]"
        )
    return schedule


def as_size(size: int | Sequence[int]) -> Size:
    """Pixels as (height, width), from one number or two."""
    return (size, size) if isinstance(size, int) else (int(size[0]), int(size[1]))
