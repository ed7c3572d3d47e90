"""What both mains do before and after training: errors, folder, data, learning rate, report."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from timm.layers import set_fused_attn
from torch import nn

from util import dist, flops
from util.config import Data, Optim, Run
from util.data.bad import BadImages
from util.data.images import Dataset, Images, open_images
from util.data.loader import Loader, Ordered, read_schedule
from util.data.survey import measure, pick
from util.data.transforms import CentreCrop, Transform
from util.errors import UserError
from util.log import Log
from util.optim import Schedule
from util.options import claim_folder

LEAST = {
    "data.batch": 1,
    "data.workers": 0,
    "run.per_device": 1,
    "run.log_every": 1,
    "run.save_every": 1,
    "run.evaluate_every": 0,
    "run.panel": 0,
    "run.probe": 1,
    "optim.clip": 0,
}


def check(data: Data, optim: Optim, run: Run) -> None:
    """UserError, before anything is read, for numbers and names that cannot be meant."""
    sections = {"data": data, "optim": optim, "run": run}
    for key, least in LEAST.items():
        section, name = key.split(".")
        value = getattr(sections[section], name)
        if value is not None and value < least:
            raise UserError(f"{key} is {value}, but has to be at least {least}")
    if run.epochs <= 0:
        raise UserError(f"run.epochs is {run.epochs}, but has to be above 0")
    for key, value, choices in (
        ("run.dtype", run.dtype, ("bfloat16", "float16", "float32")),
        ("run.device", run.device, ("auto", "cuda", "cpu")),
        ("optim.name", optim.name, ("adamw", "lars", "sgd")),
    ):
        if value not in choices:
            raise UserError(f"{key} is {value}, but has to be {', '.join(choices[:-1])} or {choices[-1]}")
    if (data.mean is None) != (data.std is None):
        raise UserError("data.mean and data.std go together: give both or neither")
    if data.std is not None and min(data.std) <= 0:
        raise UserError(f"data.std is {data.std}, but has to be above 0 in every channel")


def begin(run: Run, plain: dict) -> tuple[torch.device, Log]:
    """Join the other processes, claim the run's folder, open its log."""
    device = dist.init(run.device)
    # on a CPU, the fused attention's backward pass in bfloat16 takes several times as long as the plain products
    set_fused_attn(device.type != "cpu")
    with dist.main_first():
        if dist.rank() == 0:
            claim_folder(Path(run.folder), plain)
    return device, Log(Path(run.folder))


def find_data(data: Data, seed: int, labels: bool, channels: int | None, log: Log) -> Dataset:
    """Open data.root and say what was found there."""
    with dist.main_first():
        found = open_images(data.root, data.val, labels, data.in_chans or channels, data.fraction, data.labels, seed)
    log(str(found.survey))
    return found


class Batches:
    """Makes the loaders of a run, all normalised alike.

    mean, std: of each channel on the scale of [0, 1]: the config's, else those stored with the weights, else measured
    """

    def __init__(self, data: Data, run: Run, found: Dataset, stored: dict | None, device: torch.device, log: Log):
        self.data, self.run, self.found = data, run, found
        self.mean, self.std, source = normalization(data, found.train, stored)
        log(f"channels  mean {numbers(self.mean)}, std {numbers(self.std)} ({source})")
        self.per_device = run.per_device or max(data.batch // dist.world(), 1)
        bad = BadImages(Path(run.folder) / "bad_images.txt", len(found.train) + len(found.val), data.max_bad)
        self.where = {"rank": dist.rank(), "world": dist.world(), "device": device, "bad": bad}

    def train(self, transform: Transform) -> Loader:
        """Endless random batches of the training images."""
        args = (self.data.batch, self.per_device, self.data.size, self.mean, self.std, self.run.seed, self.data.workers)
        return Loader(self.found.train, transform, *args, **self.where)

    def once(self, images: Images, most: int | None = None) -> Ordered:
        """Every image once, or a fixed sample of at most `most`, cut from the centre at the schedule's last size."""
        if most is not None:
            images = images.take(np.sort(pick(len(images), most, 0)))
        crop, size = CentreCrop(self.data.crop, self.data.interpolation), read_schedule(self.data.size)[-1][1]
        workers = min(self.data.workers, 4)
        return Ordered(images, crop, self.per_device, size, self.mean, self.std, workers=workers, **self.where)


def normalization(data: Data, images: Images, stored: dict | None) -> tuple[list[float], list[float], str]:
    """Mean and std of each channel, and where they are from. UserError if their number is not that of the channels."""
    if data.mean and data.std:
        mean, std, source = data.mean, data.std, "given"
    elif stored and len(stored["mean"]) == images.channels:
        mean, std, source = stored["mean"], stored["std"], "stored with the weights"
    else:
        mean, std, source = *measure(images), "measured"
    if not len(mean) == len(std) == images.channels:
        raise UserError(
            f"data.mean and data.std have {len(mean)} and {len(std)} numbers, the images {images.channels} channels"
        )
    return mean, std, source


def numbers(values: Sequence[float]) -> str:
    return ", ".join(f"{value:.4g}" for value in values)


def schedule(optim: Optim, loader: Loader, run: Run, log: Log) -> Schedule:
    """The learning rate of a run; the arithmetic is said."""
    scale, epoch = loader.batch / 256, loader.steps_per_epoch
    origin = None if optim.cosine_from is None else optim.cosine_from * epoch
    steps = max(round(run.epochs * epoch), 1)
    if loader.note:
        log(loader.note)
    log(
        f"steps     {steps:,} of {loader.batch:,} images = {dist.world()} processes x "
        f"{loader.batch // dist.world() // loader.accumulate} x {loader.accumulate} accumulated; "
        f"{epoch:,} an epoch; lr {optim.lr:g} x {loader.batch} / 256 = {optim.lr * scale:.3g}"
    )
    return Schedule(
        optim.lr * scale,
        steps,
        optim.warmup * epoch,
        optim.warmup_lr * scale,
        optim.min_lr * scale,
        origin,
        tuple(m * epoch for m in optim.milestones),
        optim.gamma,
    )


REFUSALS = (ValueError, TypeError, RuntimeError, AssertionError)  # what the models raise for what cannot be


def try_sizes(task: nn.Module, data: Data, channels: int, device: torch.device) -> None:
    """Run blank images of each size through the task. UserError, naming all that do not fit, before hours are spent."""
    training, wrong = task.training, {}
    task.eval()
    for _, (h, w) in read_schedule(data.size):
        batch = {
            "image": torch.zeros(2, channels, h, w, device=device),
            "label": torch.zeros(2, dtype=int, device=device),
        }
        try:
            with torch.no_grad():
                task(batch)
        except REFUSALS as error:
            wrong[str(h) if h == w else f"{h} x {w}"] = dist.first_line(error)
    task.train(training)
    if wrong:
        fit = "does not fit" if len(wrong) == 1 else "do not fit"
        raise UserError(f"data.size: {' and '.join(wrong)} px {fit}: {'; '.join(dict.fromkeys(wrong.values()))}")


@contextmanager
def told(what: str) -> Iterator[None]:
    """What the models refuse inside becomes a UserError: one line that begins with `what`."""
    try:
        yield
    except REFUSALS as error:
        raise UserError(f"{what}: {dist.first_line(error)}") from error


def describe(name: str, encoder: nn.Module, channels: int, size: tuple[int, int], log: Log) -> None:
    """Say how large an encoder is."""
    if dist.rank() == 0:
        image = torch.zeros(1, channels, *size, device=next(encoder.parameters()).device)
        count, millions = flops.flops(encoder, image), flops.parameters(encoder) / 1e6
        at = f"{count / 1e9:.3g} G multiply-adds at {size[0]} x {size[1]} px"
        log(f"encoder   {name}, {millions:.3g} M parameters, {at}")


def report(folder: Path, figures: dict) -> None:
    """Write a run's final figures to report.json."""
    if dist.rank() == 0:
        aside = folder / "report.json.writing"
        aside.write_text(json.dumps(figures, indent=2) + "\n")
        os.replace(aside, folder / "report.json")
