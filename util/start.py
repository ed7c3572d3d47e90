"""What both mains do before and after training: errors, folder, data, learning rate, report."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from timm.layers import set_fused_attn
from torch import nn
from torch.optim import Optimizer

from util import dist, flops
from util.config import Data, Finetune, Optim, Pretrain, Run, When
from util.data.bad import BadImages
from util.data.images import Dataset, Images, open_all, open_images
from util.data.loader import Loader, Ordered, read_schedule
from util.data.survey import measure, pick
from util.data.transforms import CentreCrop, Transform
from util.errors import REFUSALS, UserError, first_line
from util.log import Log
from util.optim import Pace, Schedule, build_optimizer
from util.options import claim_folder
from util.plan import Plan, make_plan
from util.times import length, read_time


def settle(config: Pretrain | Finetune, plain: dict, stored: dict | None = None, dtype: str = "bfloat16") -> None:
    """What the options leave open is as stored with the weights, or else as usual; the run's plain config says so."""
    stored = stored or {}
    usual = {"data.size": stored.get("size", 224), "data.crop": stored.get("crop", 0.875), "run.dtype": dtype}
    for key, value in usual.items():
        section, name = key.split(".")
        if getattr(getattr(config, section), name) is None:
            plain[section][name] = value if isinstance(value, (int, float, str)) else list(value)
            setattr(getattr(config, section), name, value)


def begin(config: Pretrain | Finetune, plain: dict) -> tuple[torch.device, Log]:
    """Join the other processes, claim the run's folder, open its log."""
    run = config.run
    device = dist.init(run.device)
    # on a CPU, the fused attention's backward pass in bfloat16 takes several times as long as the plain products
    set_fused_attn(device.type != "cpu")
    with dist.main_first():
        if dist.rank() == 0:
            claim_folder(Path(run.folder), plain, type(config))
    return device, Log(Path(run.folder))


def find_all(data: Data, seed: int, channels: int, log: Log) -> Dataset:
    """Open all images of data.root, to train or to validate alike, and say what was found there."""
    with dist.main_first():
        found = open_all(data.root, channels, seed)
    log(str(found.survey))
    return found


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
        options = {"seed": self.run.seed, "workers": self.data.workers, "weights": self.data.weights, **self.where}
        loader = Loader(self.found.train, transform, self.plan(dist.world()), self.mean, self.std, **options)
        for line in loader.order.describe(self.found.roots):
            self.log(line)
        return loader

    def plan(self, world: int) -> Plan:
        """The plan of the run on so many processes."""
        data, run = self.data, self.run
        return make_plan(len(self.found.train), data.batch, run.per_device, data.size, length(run), world)

    def few(self) -> int:
        """Images at a time where nothing is trained; batches need not come out even over processes."""
        last = self.plan(1).stages[-1]
        return min(last.per_device, max(last.batch // dist.world(), 1))

    def once(self, images: Images, most: int | None = None, parts: list[np.ndarray] | None = None) -> Ordered:
        """Every image once, or a fixed sample of at most `most`, cut from the centre at the last size of the plan.

        parts: the positions in each batch of this process, instead of its share of all
        """
        if most is not None:
            images = images.take(np.sort(pick(len(images), most, 0)))
        crop, size = CentreCrop(self.data.crop, self.data.interpolation), self.plan(1).stages[-1].size
        where = {"workers": min(self.data.workers, 4), "parts": parts, **self.where}
        return Ordered(images, crop, self.few(), size, self.mean, self.std, **where)


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
    for line in unreached(rate, plan):
        log(line)
    return lambda step: rate(plan.clock(step)) * plan.at(step).batch / 256


def unreached(rate: Schedule, plan: Plan) -> Iterator[str]:
    """What of a learning rate a run ends before, a line each."""
    whole, factor = f"the run {rate.steps:.4g}", plan.at(plan.steps).batch / 256
    if rate.warmup >= rate.steps:
        ends = f"{rate(plan.clock(plan.steps - 1)) * factor:.3g} of {rate.lr * factor:.3g}"
        yield f"warning   optim.warmup is {rate.warmup:.4g} {plan.unit}, {whole}: the rate ends at {ends}"
    late = [milestone for milestone in rate.milestones if milestone >= rate.steps]
    if late:
        yield f"warning   optim.milestones has {numbers(late)} {plan.unit}, {whole}: the rate does not fall there"
    if not rate.milestones and (rate.origin or 0) >= rate.steps:
        yield f"warning   optim.cosine_from is {rate.origin:.4g} {plan.unit}, {whole}: the rate never falls"


def optimizer(task: nn.Module, optim: Optim, pace: Pace | None = None) -> Optimizer:
    """The optimizer of a run, with its parameter groups."""
    decays = optim.layer_decay, optim.no_decay
    return build_optimizer(task, optim.name, optim.weight_decay, optim.betas, optim.momentum, *decays, optim.eps, pace)


def encoder_pace(optim: Optim, plan: Plan, whole: bool | None = None, log: Log | None = None) -> Pace | None:
    """How the encoder learns beside the rest, None if alike; it is said if a decoder is fresh.

    whole: whether weights brought all of a decoder; None if there are no weights

    UserError if the encoder would learn nothing at all.
    """
    time, scale = ("500 steps", 0.1) if whole is False else (0, 1.0)
    if optim.freeze_encoder is not None:
        time = optim.freeze_encoder
    if optim.encoder_lr_scale is not None:
        scale = optim.encoder_lr_scale
    steps = plan.step(read_time("optim.freeze_encoder", time))
    if steps >= plan.steps:
        raise UserError(
            f"optim.freeze_encoder is {time}: the encoder would stay as it is for all {plan.steps:,} steps of the run; "
            'give less, as in "50 steps", or 0'
        )
    if whole is False:
        log(f"decoder   fresh: it learns for {steps:,} steps while the encoder stays as it is (optim.freeze_encoder), "
            f"which then learns at {scale:g} of the rate (optim.encoder_lr_scale)")  # fmt: skip
    return Pace(steps, scale) if whole is not None or steps or scale != 1 else None


def decay(optim: Optim, steps: float) -> Schedule | None:
    """The weight decay of a run of so many steps; None if it stays as it is."""
    end = optim.weight_decay_end
    return None if end is None else Schedule(optim.weight_decay, steps, min_lr=end)


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
            wrong[str(h) if h == w else f"{h} x {w}"] = first_line(error)
    task.train(training)
    if wrong:
        fit = "does not fit" if len(wrong) == 1 else "do not fit"
        raise UserError(f"data.size: {' and '.join(wrong)} px {fit}: {'; '.join(dict.fromkeys(wrong.values()))}")


def describe(name: str, encoder: nn.Module, channels: int, size: tuple[int, int], log: Log) -> None:
    """Say how large an encoder is."""
    if dist.rank() == 0:
        image = torch.zeros(1, channels, *size, device=next(encoder.parameters()).device)
        parameters, work = (flops.short(n) for n in (flops.parameters(encoder), flops.flops(encoder, image)))
        log(f"encoder   {name}, {parameters} parameters, {work} multiply-adds at {size[0]} x {size[1]} px")


def report(folder: Path, figures: dict) -> None:
    """Write a run's final figures to report.json."""
    if dist.rank() == 0:
        aside = folder / "report.json.writing"
        aside.write_text(json.dumps(figures, indent=2) + "\n")
        os.replace(aside, folder / "report.json")
