"""What both mains do before and after training: errors, folder, data, learning rate, report."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from timm.layers import set_fused_attn
from torch import nn
from torch.optim import Optimizer

from util import dist, flops
from util.config import Data, Optim, Run, When
from util.data.bad import BadImages
from util.data.images import Dataset, Images, open_images
from util.data.loader import Loader, Ordered, read_schedule
from util.data.survey import measure, pick
from util.data.transforms import CentreCrop, Transform
from util.errors import UserError
from util.log import Log
from util.optim import Schedule, build_optimizer
from util.options import claim_folder
from util.plan import make_plan
from util.times import Time, check_times, read_changes, read_time

LEAST = {
    "data.batch": 1,
    "data.workers": 0,
    "run.per_device": 1,
    "run.steps": 1,
    "run.log_every": 1,
    "run.save_every": 1,
    "run.panel": 0,
    "run.probe": 1,
    "optim.clip": 0,
    "optim.eps": 0,
    "optim.lr": 0,
    "optim.weight_decay": 0,
    "data.jitter": 0,
    "data.in_chans": 1,
    "run.seed": 0,
}


def check(data: Data, optim: Optim, run: Run) -> None:
    """UserError, before anything is read, for numbers and names that cannot be meant."""
    sections = {"data": data, "optim": optim, "run": run}
    for key, least in LEAST.items():
        section, name = key.split(".")
        for _, value in read_changes(key, getattr(sections[section], name)):
            if value is not None and value < least:
                raise UserError(f"{key} is {value}, but has to be at least {least}")
    check_times(data, optim, run)
    roots = [data.root] if isinstance(data.root, str) else data.root
    if data.weights is not None and len(data.weights) != len(roots):
        raise UserError(
            f"data.weights has {len(data.weights)} numbers, data.root {len(roots)} roots: give each root one"
        )
    if data.weights is not None and not all(0 < weight < float("inf") for weight in data.weights):
        raise UserError(f"data.weights is {data.weights}, but each has to be above 0: leave out a root not wanted")
    for key, value, choices in (
        ("run.dtype", run.dtype, ("bfloat16", "float16", "float32")),
        ("run.device", run.device, ("auto", "cuda", "cpu")),
        ("optim.name", optim.name, ("adamw", "lamb", "lars", "sgd")),
    ):
        if value not in choices:
            raise UserError(f"{key} is {value}, but has to be {', '.join(choices[:-1])} or {choices[-1]}")
    if not all(0 <= beta < 1 for beta in optim.betas):
        raise UserError(f"optim.betas is {optim.betas}, but each has to be at least 0 and below 1")
    if optim.weight_decay_end is not None and not (optim.weight_decay > 0 and optim.weight_decay_end >= 0):
        raise UserError(
            f"optim.weight_decay goes from {optim.weight_decay} to {optim.weight_decay_end}, but has to start above 0 "
            "and end at 0 or above"
        )
    if (data.mean is None) != (data.std is None):
        raise UserError("data.mean and data.std go together: give both or neither")
    if data.std is not None and min(data.std) <= 0:
        raise UserError(f"data.std is {data.std}, but has to be above 0 in every channel")
    if not run.folder:
        raise UserError("run.folder is empty: name a folder for all that the run writes")


def check_pairs(method: str, data: Data, run: Run) -> None:
    """UserError if images are left without a partner in a method that pairs those of a forward pass."""
    key, value, ways = "run.per_device", run.per_device, 1
    if value is None:
        key, value, ways = "data.batch", data.batch, dist.world()
    for _, number in read_changes(key, value):
        if number // ways % 2:
            wanted = "even" if ways == 1 else f"a multiple of {2 * ways}, for {ways} processes"
            raise UserError(f"{method} pairs the images of a forward pass: {key} {number} has to be {wanted}")


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
        self.data, self.run, self.found, self.log = data, run, found, log
        self.mean, self.std, source = normalization(data, found.pool, stored)
        log(f"channels  mean {numbers(self.mean)}, std {numbers(self.std)} ({source})")
        bad = BadImages(Path(run.folder) / "bad_images.txt", len(found.train) + len(found.val), data.max_bad)
        self.where = {"rank": dist.rank(), "world": dist.world(), "device": device, "bad": bad}

    def train(self, transform: Transform) -> Loader:
        """Endless random batches of the training images."""
        data, run, images = self.data, self.run, self.found.train
        length = Time(run.steps, "steps") if run.steps is not None else Time(100 if run.epochs is None else run.epochs)
        plan = make_plan(len(images), data.batch, run.per_device, data.size, length, dist.world())
        options = {"seed": run.seed, "workers": data.workers, "weights": data.weights, **self.where}
        loader = Loader(images, transform, plan, self.mean, self.std, **options)
        for line in loader.order.describe(self.found.roots):
            self.log(line)
        return loader

    def once(self, images: Images, most: int | None = None) -> Ordered:
        """Every image once, or a fixed sample of at most `most`, cut from the centre at the schedule's last size."""
        if most is not None:
            images = images.take(np.sort(pick(len(images), most, 0)))
        crop, size = CentreCrop(self.data.crop, self.data.interpolation), read_schedule(self.data.size)[-1][1]
        batch, few = read_changes("data.batch", self.data.batch), read_changes("run.per_device", self.run.per_device)
        few, workers = few[-1][1] or max(batch[-1][1] // dist.world(), 1), min(self.data.workers, 4)
        return Ordered(images, crop, few, size, self.mean, self.std, workers=workers, **self.where)


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


def schedule(optim: Optim, loader: Loader, run: Run, log: Log) -> Callable[[int], float]:
    """The learning rate at each step of a run; the arithmetic is said, stage by stage."""
    plan = loader.plan
    if loader.note:
        log(loader.note)
    for line in plan.describe(optim.lr, dist.world()):
        log(line)

    def when(key: str, value: When) -> float:
        time = read_time(key, value)
        return plan.clock(time.number) if time.unit == "steps" else time.number

    rate = Schedule(
        optim.lr,
        plan.clock(plan.steps),
        when("optim.warmup", optim.warmup),
        optim.warmup_lr,
        optim.min_lr,
        None if optim.cosine_from is None else when("optim.cosine_from", optim.cosine_from),
        tuple(when("optim.milestones", milestone) for milestone in optim.milestones),
        optim.gamma,
    )
    return lambda step: rate(plan.clock(step)) * plan.at(step).batch / 256


def optimizer(task: nn.Module, optim: Optim) -> Optimizer:
    """The optimizer of a run, with its parameter groups."""
    pace, spared = optim.layer_decay, optim.no_decay
    return build_optimizer(task, optim.name, optim.weight_decay, optim.betas, optim.momentum, pace, spared, optim.eps)


def decay(optim: Optim, steps: float) -> Schedule | None:
    """The weight decay of a run of so many steps; None if it stays as it is."""
    end = optim.weight_decay_end
    return None if end is None else Schedule(optim.weight_decay, steps, min_lr=end)


REFUSALS = (ValueError, TypeError, RuntimeError, AssertionError, ArithmeticError)  # of models that cannot be


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
