"""The training loop: the only one, for pretraining and for every transfer. It never sees an image."""

from __future__ import annotations

import hashlib
import random
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from util import checkpoint, dist
from util.config import Run
from util.errors import UserError
from util.log import Log
from util.plan import Plan, evaluations
from util.progress import Sums, Watch, line

STREAK = 5  # non-finite steps in a row that send the run back to its last checkpoint
RETURNS = 3  # times that this may happen


class Task(Protocol):
    """Something to train: a batch goes in, scalars come out; "loss" is minimised, the rest is logged.

    A task may have `after_step()`, called after each step of the optimizer.
    """

    encoder: nn.Module

    def forward(self, batch: dict) -> dict[str, Tensor]: ...


class Loader(Protocol):
    """Endless batches from any step on, as many to a step as its stage of the plan accumulates.

    plan:   how many steps there are, and what they are made of
    waited: seconds spent waiting for batches so far

    A batch may hold "figures", scalars to be logged with those of the task.
    """

    plan: Plan
    waited: float

    def batches(self, start: int) -> Iterator[dict]: ...


def train(
    task: Task,
    loader: Loader,
    optimizer: Optimizer,
    lr_at: Callable[[float], float],
    clip: float,
    run: Run,
    log: Log,
    evaluate: Callable[[int], dict[str, float]] | None = None,
    decay_at: Callable[[float], float] | None = None,
) -> dict[str, float]:
    """Train a task to the end of its run, from the last checkpoint in run.folder if there is one.

    lr_at:    the learning rate at a step; each parameter group multiplies it by its "lr_scale", see `set_rates`
    clip:     largest norm of the gradient, 0 for none
    evaluate: gives figures at a step; called every run.evaluate_every and at the end, whose figures are returned
    decay_at: the weight decay at a step, of the groups that have one; by default theirs stays as it is

    A step whose gradient is not finite is skipped and counted; STREAK of them in a row go back to the last checkpoint.
    SIGINT and SIGTERM save and leave (exit code 128 + signal).
    """
    device, folder = next(task.parameters()).device, Path(run.folder)
    plan, steps = loader.plan, loader.plan.steps
    scaler = torch.amp.GradScaler(device.type, enabled=run.dtype == "float16")
    counts = {"step": 0, "skipped": 0, "returns": 0} | checkpoint.load(folder, task, optimizer, scaler, log)
    step, began = counts["step"], counts["step"]
    if step:
        log(f"continuing at step {step} of {steps}")
    model = parallel(task, device, run.compile)
    batches, watch, sums = loader.batches(step), Watch(loader, step), Sums(device)
    every = evaluations(run.evaluate_every, plan)
    task.train()

    with interruptible() as interrupted:
        while step < steps:
            set_rates(task, optimizer, step, lr_at(step), None if decay_at is None else decay_at(step))
            accumulate = plan.at(step).accumulate
            for micro in range(accumulate):
                batch = next(batches)
                extra = batch.pop("figures", {})
                # seeded after the batch is fetched, so that a resumed run draws the same masks
                seed(run.seed, step, micro, dist.rank(), counts["returns"])
                together = micro == accumulate - 1 or model is task  # gradients meet in the last pass only
                with nullcontext() if together else model.no_sync():
                    with precision(device, run.dtype):
                        losses = model(batch)
                    scaler.scale(losses["loss"] / accumulate).backward()
                sums.add(losses | extra)
            scaler.unscale_(optimizer)
            norm = nn.utils.clip_grad_norm_(task.parameters(), clip or float("inf"))
            take_step(optimizer, scaler, sums.judge(norm))
            optimizer.zero_grad()
            if hasattr(task, "after_step"):
                task.after_step()
            step += 1

            done, stop = step == steps, dist.any_of(bool(interrupted))
            if step % run.log_every == 0 or done or stop or step == began + 1:
                figures, skipped, streak = sums.read()
                counts["skipped"] += skipped
                figures |= {"lr": lr_at(step - 1), "epoch": plan.epoch(step), "skipped": counts["skipped"]}
                figures |= watch.read(step, steps)
                log.figures(step, figures, line(step, steps, figures))
                if streak >= (STREAK if run.dtype != "float16" else 5 * STREAK):  # a scaler looks for its scale first
                    counts = go_back(folder, task, optimizer, scaler, counts, step, log)
                    step, batches, sums = counts["step"], loader.batches(counts["step"]), Sums(device)
                    continue
            counts["step"] = step
            if step % run.save_every == 0 or done or stop:
                checkpoint.save(folder, task, optimizer, scaler, counts)
            if stop:
                log(f"stopped by a signal at step {step} of {steps}; the same command continues")
                raise SystemExit(128 + (interrupted or [signal.SIGTERM])[0])
            if evaluate is not None and not done and plan.due(step, every):
                judge(task, evaluate, step, run, log)
                watch.restart(step)
    return judge(task, evaluate, step, run, log) if evaluate is not None else {}


def set_rates(task: Task, optimizer: Optimizer, step: int, lr: float, decay: float | None) -> None:
    """Give the parameter groups their learning rates at a step, and their weight decay if it changes.

    In its first "frozen" steps a group's rate is 0, so that nothing of it moves, while gradients are as ever (DDP waits
    for all of them) and the optimizer's averages are ready when it is let go. As long as a group is frozen, so is all
    else of the encoder: it is in evaluation mode, in which batch norms keep their statistics.
    """
    for group in optimizer.param_groups:
        group["lr"] = lr * group["lr_scale"] if step >= group.get("frozen", 0) else 0.0
        if decay is not None and group["weight_decay"]:
            group["weight_decay"] = decay
    frozen = max(group.get("frozen", 0) for group in optimizer.param_groups)
    if frozen:
        task.encoder.train(step >= frozen)


def parallel(task: nn.Module, device: torch.device, compiled: bool) -> nn.Module:
    """The task as the loop calls it: compiled if wanted, its gradients averaged over processes if there are several."""
    if compiled:
        task.compile()
    if dist.world() == 1:
        return task
    return DistributedDataParallel(task, [device.index] if device.type == "cuda" else None)


def precision(device: torch.device, dtype: str) -> torch.autocast:
    """Inside, matrix products are computed in run.dtype."""
    return torch.autocast(device.type, getattr(torch, dtype), enabled=dtype != "float32")


def seed(*numbers: int) -> None:
    """Seed every generator that a task may draw from, differently for each tuple of numbers."""
    digest = int.from_bytes(hashlib.blake2b(repr(numbers).encode(), digest_size=7).digest(), "big")
    torch.manual_seed(digest)
    np.random.seed(digest % 2**32)
    random.seed(digest)


def take_step(optimizer: Optimizer, scaler: torch.amp.GradScaler, finite: Tensor) -> None:
    """Step, or change nothing where the gradient is not finite; nothing waits for the device to tell."""
    if scaler.is_enabled():
        scaler.step(optimizer)
        scaler.update()
    else:
        optimizer.found_inf = (~finite).float()  # what a GradScaler tells fused optimizers
        optimizer.step()


def go_back(
    folder: Path,
    task: nn.Module,
    optimizer: Optimizer,
    scaler: torch.amp.GradScaler,
    counts: dict,
    step: int,
    log: Log,
) -> dict:
    """Load the last checkpoint after a streak of non-finite gradients; other masks will be drawn from there on.

    UserError without a checkpoint or after RETURNS times.
    """
    advice = "lower optim.lr, set optim.clip, or set run.dtype to float32"
    if counts["returns"] >= RETURNS:
        raise UserError(f"gradients are not finite at step {step}, after {RETURNS} returns to a checkpoint: {advice}")
    saved = checkpoint.load(folder, task, optimizer, scaler, log)
    if not saved:
        raise UserError(f"gradients are not finite at step {step}, before the first checkpoint: {advice}")
    log(f"gradients are not finite at step {step}: back to the checkpoint of step {saved['step']}, with other masks")
    return saved | {"skipped": counts["skipped"], "returns": counts["returns"] + 1}


def judge(task: nn.Module, evaluate: Callable, step: int, run: Run, log: Log) -> dict[str, float]:
    """Evaluate in the run's precision; the figures are logged and returned."""
    device = next(task.parameters()).device
    task.eval()
    with precision(device, run.dtype):
        figures = evaluate(step)
    task.train()
    log.figures(step, figures)
    return figures


@contextmanager
def interruptible() -> Iterator[list[signal.Signals]]:
    """Inside, SIGINT and SIGTERM only leave their mark in the list; a second one acts as ever."""
    marks: list[signal.Signals] = []
    if threading.current_thread() is not threading.main_thread():
        yield marks
        return
    before = {}

    def mark(number: int, _frame) -> None:
        marks.append(signal.Signals(number))
        signal.signal(number, before[number])

    for number in (signal.SIGINT, signal.SIGTERM):
        before[number] = signal.signal(number, mark)
    try:
        yield marks
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
