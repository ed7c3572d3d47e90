"""How long a run is and what its steps are made of: stages, and steps and epochs as each other."""

from __future__ import annotations

import math
from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from util.errors import UserError
from util.times import Size, Time, as_size, read_changes, read_time, said, value_at


@dataclass(frozen=True)
class Stage:
    """Steps that are all alike, from one of them on.

    step, epoch:     where it begins, from the beginning of the run
    passes:          over the images, begun before it; it begins a new one, even in mid-epoch
    size:            of the images, in pixels
    batch:           images of a step, over all processes
    per_device:      images of one forward pass on one device
    accumulate:      forward passes of a step
    steps_per_epoch: optimizer steps; images that do not fill a last batch are left out
    changes:         the options that change with it
    """

    step: int
    epoch: float
    passes: int
    size: Size
    batch: int
    per_device: int
    accumulate: int
    steps_per_epoch: int
    changes: tuple[str, ...] = ()


class Plan:
    """A run as a whole.

    steps:  of the optimizer
    unit:   in which its times are counted, "epochs" or "steps"
    stages: those that the run reaches; `late` are the others
    """

    def __init__(self, stages: Sequence[Stage], length: Time):
        self.unit, steps = length.unit, length.number
        if self.unit == "epochs":
            last = next(stage for stage in reversed(stages) if stage.epoch <= length.number)
            steps = last.step + (length.number - last.epoch) * last.steps_per_epoch
        self.steps = max(round(steps), 1)
        self.stages = [stage for stage in stages if stage.step < self.steps]
        self.late = [stage for stage in stages if stage.step >= self.steps]
        self.starts = [stage.step for stage in self.stages]

    def at(self, step: int) -> Stage:
        return self.stages[bisect_right(self.starts, step) - 1]

    def epoch(self, step: float) -> float:
        """Passes over the images that lie before a step."""
        stage = self.at(step)
        return stage.epoch + (step - stage.step) / stage.steps_per_epoch

    def images(self, step: int) -> int:
        """Images that lie before a step."""
        ends = [min(start, step) for start in [*self.starts[1:], step]]
        return sum(stage.batch * max(end - stage.step, 0) for stage, end in zip(self.stages, ends))

    def clock(self, step: float) -> float:
        """How far the run is at a step, in its own unit."""
        return step if self.unit == "steps" else self.epoch(step)

    def step(self, time: Time) -> int:
        """The first step that does not lie before a time."""
        clock = self.epoch if time.unit == "epochs" else float
        return bisect_left(range(self.steps), time.number, key=clock)

    def due(self, step: int, every: Time) -> bool:
        """Whether a multiple of `every` lies between the step before and this one; never if it is 0."""
        if not every.number:
            return False
        before, now = ((s if every.unit == "steps" else self.epoch(s)) / every.number for s in (step - 1, step))
        return math.floor(now + 1e-9) > math.floor(before + 1e-9)  # 0.3 / 0.1 is 2.9999999999999996

    def describe(self, lr: float, world: int) -> list[str]:
        """Its arithmetic for so many processes, a line for each stage, reached or not. lr: per 256 images"""
        lines = []
        for stage, end in zip(self.stages, [*self.starts[1:], self.steps]):
            several = f" at {stage.size[0]} x {stage.size[1]} px, from step {stage.step:,} (epoch {stage.epoch:g}) on"
            lines.append(
                f"steps     {end - stage.step:,} of {stage.batch:,} images = {world} processes x {stage.per_device} x "
                f"{stage.accumulate} accumulated{several if len(self.stages) > 1 else ''}; "
                f"{stage.steps_per_epoch:,} an epoch; lr {lr:g} x {stage.batch} / 256 = {lr * stage.batch / 256:.3g}"
            )
        if len(self.stages) > 1:
            lines.append(f"          {self.steps:,} in all, {self.epoch(self.steps):.4g} epochs")
        for stage in self.late:
            lines.append(
                f"ignored   {' and '.join(stage.changes)} would change at step {stage.step:,} (epoch {stage.epoch:g}), "
                f"but the run ends at step {self.steps:,} (epoch {self.epoch(self.steps):.4g})"
            )
        return lines


def evaluations(every: float | str | None, plan: Plan) -> Time:
    """How often to evaluate: as told, else every epoch, or 20 times in a run whose length is in steps."""
    if every is not None:
        return read_time("run.evaluate_every", every)
    return Time(1.0) if plan.unit == "epochs" else Time(plan.steps / 20, "steps")


def make_plan(
    images: int,
    batch: int | Sequence,
    per_device: int | Sequence | None,
    size: int | Sequence,
    length: Time,
    world: int = 1,
) -> Plan:
    """The plan of a run on so many images and processes; batch, per_device and size are values or schedules.

    per_device: None for batch / processes. UserError for what does not come out even or in order.
    """
    schedules = {
        "data.batch": read_changes("data.batch", batch),
        "run.per_device": read_changes("run.per_device", per_device),
        "data.size": read_changes("data.size", size, as_size),
    }
    stages: list[Stage] = []
    for start in borders(schedules.values()):
        many, few, side = (value_at(schedule, start.number) for schedule in schedules.values())
        changes = tuple(
            key for key, schedule in schedules.items() if start.number in [time.number for time, _ in schedule]
        )
        step, epoch, passes = 0, 0.0, 0
        if stages:
            last = stages[-1]
            whole = (start.number - last.epoch) * last.steps_per_epoch
            step = round(start.number if start.unit == "steps" else last.step + whole)
            epoch = last.epoch + (step - last.step) / last.steps_per_epoch
            passes = last.passes + math.ceil((step - last.step) / last.steps_per_epoch)
        few = few or max(many // world, 1)
        when = f"from {said(start)} on, " if stages else ""
        accumulate = derive_accumulate(many, few, world, when)
        stages.append(Stage(step, epoch, passes, side, many, few, accumulate, max(images // many, 1), changes))
    return Plan(stages, length)


def borders(schedules: Iterable[list[tuple[Time, Any]]]) -> list[Time]:
    """When any of the schedules changes, in order, the beginning of the run first. UserError if units are mixed."""
    times = [time for schedule in schedules for time, _ in schedule if time.number]
    units = {time.unit for time in times}
    if len(units) > 1:
        raise UserError("data.size, data.batch and run.per_device change in epochs here and in steps there: use one")
    unit = units.pop() if units else "epochs"
    return [Time(number, unit) for number in sorted({0.0, *(time.number for time in times)})]


def derive_accumulate(batch: int, per_device: int, world: int, when: str = "") -> int:
    """Forward passes of a step; UserError, beginning with `when`, if they do not come out even."""
    together = per_device * world
    if batch > 0 and batch % together == 0:
        return batch // together
    near = [n for n in (batch // together * together, -(-batch // together) * together) if n > 0] or [together]
    smaller = f", or run.per_device {batch // world}" if 0 < batch < together and batch % world == 0 else ""
    raise UserError(
        f"{when}data.batch {batch} is not a multiple of {together} ({world} processes x run.per_device {per_device}): "
        f"use {' or '.join(map(str, near))}{smaller}"
    )
