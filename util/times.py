"""Times in a run, in epochs or in steps, and values that change at them."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from util.config import Data, Optim, Run
from util.errors import UserError

Size = tuple[int, int]  # height, width


class Time(NamedTuple):
    """A time in a run, or a length of it: so many epochs, or so many optimizer steps."""

    number: float
    unit: str = "epochs"


def read_time(key: str, value: float | str) -> Time:
    """10 or "10 epochs" as epochs, "500 steps" as steps; UserError, beginning with the key, for anything else."""
    found = re.fullmatch(r"\s*([\d.]+(?:e\+?\d+)?)\s*(epochs?|steps?)?\s*", str(value))
    try:
        return Time(float(found[1]), "steps" if (found[2] or "").startswith("step") else "epochs")
    except (TypeError, ValueError):
        raise UserError(f'{key} is {value}, but has to be a number of epochs, or of steps as in "500 steps"') from None


def said(time: Time) -> str:
    return f"step {time.number:,.0f}" if time.unit == "steps" else f"epoch {time.number:g}"


def read_changes(key: str, value: Any, form: Callable = lambda entry: entry) -> list[tuple[Time, Any]]:
    """[(from when, value), ...] from one value or a schedule of them; UserError if it does not begin at 0, in order."""
    if not isinstance(value, (list, tuple)) or (value and not isinstance(value[0], (list, tuple))):
        return [(Time(0.0), form(value))]
    schedule = [(read_time(key, start), form(entry)) for start, entry in value]
    numbers = [start.number for start, _ in schedule]
    if numbers[:1] != [0] or numbers != sorted(set(numbers)):
        raise UserError(f"{key} {value} has to go from epoch 0 on, later times later, as in [[0, 128], [200, 160]]")
    return schedule


def as_size(size: int | Sequence[int]) -> Size:
    """Pixels as (height, width), from one number or two."""
    return (size, size) if isinstance(size, int) else (int(size[0]), int(size[1]))


def value_at(schedule: list[tuple[Time, Any]], number: float) -> Any:
    return next(value for start, value in reversed(schedule) if start.number <= number)


def length(run: Run) -> Time:
    """Of a run: its steps, or else its epochs, 100 of them unless told otherwise."""
    return Time(run.steps, "steps") if run.steps is not None else Time(100.0 if run.epochs is None else run.epochs)


def last_size(data: Data, run: Run) -> Size:
    """The size of images at the end of a run, where that is known before the images are counted; else of its schedule.

    Counting is needed for changes in steps of a run in epochs alone.
    """
    end, schedule = length(run), read_changes("data.size", data.size, as_size)
    return [size for start, size in schedule if start.unit != end.unit or start.number < end.number][-1]


def check_times(data: Data, optim: Optim, run: Run) -> None:
    """UserError unless the run has one length, and all that follows from its times is fixed by that length's unit."""
    if run.epochs is not None and run.steps is not None:
        raise UserError(f"run.epochs {run.epochs:g} and run.steps {run.steps} are both given: set one to null")
    if run.epochs is not None and run.epochs <= 0:
        raise UserError(f"run.epochs is {run.epochs}, but has to be above 0")
    times = {"optim.warmup": [optim.warmup], "optim.milestones": optim.milestones}
    times |= {"optim.cosine_from": [] if optim.cosine_from is None else [optim.cosine_from]}
    times |= {"optim.freeze_encoder": [] if optim.freeze_encoder is None else [optim.freeze_encoder]}
    read = [(key, read_time(key, value)) for key, values in times.items() for value in values]
    for key, value in (("data.size", data.size), ("data.batch", data.batch), ("run.per_device", run.per_device)):
        read += [(key, time) for time, _ in read_changes(key, value)]
    for key, time in read:
        if run.steps is not None and time.unit == "epochs" and time.number:
            raise UserError(
                f"{key} has {said(time)} in it, but run.steps is given, and how many steps an epoch has depends on the "
                'images: give steps there too, as in "500 steps"'
            )
    if run.evaluate_every is not None:
        read_time("run.evaluate_every", run.evaluate_every)
