import signal
import sys
import time
from collections.abc import Iterable, Iterator, Sequence

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from util.data.bad import BadImages
from util.data.dice import Dice
from util.data.images import Images
from util.data.transforms import Transform
from util.errors import UserError
from util.times import Size

ATTEMPTS = 100  # to find another image in place of a bad one
Work = tuple[np.ndarray, int, Size]  # positions, epoch, size: one micro-batch


class Fetch:
    """Read and transform the images of one micro-batch; what a worker does."""

    def __init__(self, images: Images, transform: Transform, seed: int):
        self.images, self.transform, self.seed = images, transform, seed

    def __getitem__(self, work: Work) -> tuple[dict[str, Tensor], list[tuple[str, str]]]:
        """The batch, and the bad images met on the way as (path, reason); "own" is False where another stands in.

        Positions from len(images) on are further copies of the same images, augmented differently.
        """
        positions, epoch, size = work
        taken, bad = positions % len(self.images), []
        if self.images.pixels is not None:
            pixels = self.transform(self.images.pixels[taken], size, Dice(self.seed, epoch, positions))
        else:
            parts = []
            for i, position in enumerate(positions):
                dice = Dice(self.seed, epoch, position[None])
                image, taken[i] = self.read(int(taken[i]), dice, bad)
                parts.append(self.transform(image[None], size, dice))
            if len({part.dtype for part in parts}) > 1:
                parts = [as_float(part) for part in parts]
            pixels = torch.cat(parts).contiguous()
        index = positions % len(self.images)
        batch = {"image": pixels, "index": torch.from_numpy(index), "own": torch.from_numpy(taken == index)}
        if self.images.labels is not None:
            batch["label"] = torch.from_numpy(self.images.labels[taken])
        return batch, bad

    def read(self, position: int, dice: Dice, bad: list) -> tuple[Tensor, int]:
        """The image at a position, or if it cannot be decoded, at another one that the dice choose."""
        for _ in range(ATTEMPTS):
            try:
                return self.images.read(position), position
            except Exception as error:  # a broken file may raise anything; how many do is what BadImages watches
                bad.append((self.images.path(position), f"{type(error).__name__}: {error}"))
            position = int(dice.uniform(1)[0, 0] * len(self.images))
        raise UserError(f"{ATTEMPTS} images in a row cannot be read; {bad[0][0]}: {bad[0][1]}")


class Feed:
    """Brings work to workers and their batches to the device, as float32 and normalised.

    mean, std: of each channel, on the scale of [0, 1]. world: processes that do the same at the same time.
    bad: counts the unreadable images; None lets them be replaced unseen. `waited`: seconds spent waiting so far.
    """

    def __init__(
        self,
        images: Images,
        transform: Transform,
        seed: int,
        workers: int,
        world: int,
        device: str | torch.device,
        mean: Sequence[float],
        std: Sequence[float],
        bad: BadImages | None,
    ):
        self.fetch = Fetch(images, transform, seed)
        self.workers, self.world, self.device, self.bad = workers, world, torch.device(device), bad
        self.mean, self.std = (
            torch.tensor(values, dtype=torch.float32, device=device)[:, None, None] for values in (mean, std)
        )
        self.waited = 0.0

    def run(self, work: Iterable[Work]) -> Iterator[dict[str, Tensor]]:
        batches = iter(
            DataLoader(
                self.fetch,
                sampler=work,
                batch_size=None,
                num_workers=self.workers,
                collate_fn=_as_is,
                pin_memory=self.device.type == "cuda",
                worker_init_fn=_leave_signals,
                multiprocessing_context="fork" if self.workers and sys.platform == "linux" else None,
                generator=torch.Generator(),  # its draws must not move the global one
            )
        )
        while True:
            start = time.perf_counter()
            found = _next(batches)
            self.waited += time.perf_counter() - start
            if found is None:
                return
            batch, bad = found
            if self.bad:
                self.bad.add(self.world * len(batch["index"]), bad)
            batch = {key: value.to(self.device, non_blocking=True) for key, value in batch.items()}
            batch["image"] = as_float(batch["image"]).sub_(self.mean).div_(self.std)
            yield batch


def as_float(images: Tensor) -> Tensor:
    """uint8 divided by 255, floats as they are."""
    return images.float().div_(255) if images.dtype == torch.uint8 else images


def _next(batches: Iterator):
    try:
        return next(batches, None)
    except UserError as error:  # torch hands on a worker's error with its whole traceback as the text
        raise UserError(str(error).strip().splitlines()[-1].removeprefix("util.errors.UserError: ")) from None


def _as_is(batch):
    return batch


def _leave_signals(worker: int) -> None:
    """An interrupt is for the main process alone: it saves first, and its workers end with it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
