"""How a run is going: means of what it computes, its speed, and one line that says so."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

from util import dist
from util.log import duration
from util.plan import Plan

EVERY = 10  # seconds between lines of a pass that trains nothing


def line(step: int, steps: int, figures: dict[str, float]) -> str:
    """One line of progress for the console."""
    wait, memory = figures["data_wait"], figures.get("memory_gb")
    advice = f" (raise data.workers: {os.cpu_count()} cores here)" if wait > 0.2 else ""
    parts = [
        f"step {step}/{steps}",
        f"epoch {figures['epoch']:.2f}",
        f"loss {figures['loss']:.4f}",
        f"lr {figures['lr']:.2e}",
        f"norm {figures['norm']:.2f}",
        f"{figures['images_per_s']:.0f} images/s",
        f"data wait {100 * wait:.0f} %{advice}",
        *([f"{memory:.1f} GB"] if memory else []),
        *([f"skipped {figures['skipped']:.0f}"] if figures["skipped"] else []),
        f"{duration(figures['eta_s'])} left",
    ]
    return "  ".join(parts)


class Sums:
    """Means of a task's scalars and of the gradient's norm since the last reading, kept on the device till then."""

    def __init__(self, device: torch.device):
        self.streak = torch.zeros((), device=device)  # non-finite gradients in a row, up to now
        self.clear()

    def clear(self) -> None:
        self.sums: dict[str, Tensor] = {}
        self.worst = self.streak.clone()

    def add(self, losses: dict[str, Tensor]) -> None:
        for name, value in losses.items():
            self.add_one(name, value.detach().float())

    def add_one(self, name: str, value: Tensor) -> None:
        finite = torch.isfinite(value)
        pair = torch.stack([torch.where(finite, value, 0.0), finite.float()])  # a sum, and of how many
        self.sums[name] = self.sums[name] + pair if name in self.sums else pair

    def judge(self, norm: Tensor) -> Tensor:
        """Whether a gradient's norm is finite, as a tensor; also counted."""
        finite = torch.isfinite(norm)
        self.add_one("norm", norm.float())
        self.add_one("skipped", (~finite).float())
        self.streak = torch.where(finite, 0.0, self.streak + 1)
        self.worst = torch.maximum(self.worst, self.streak)
        return finite

    def read(self) -> tuple[dict[str, float], int, int]:
        """The means over all processes, the steps skipped, and the longest streak of them; waits for the device."""
        pairs = dist.total(torch.stack(list(self.sums.values()))).tolist()
        means = {name: total / count if count else float("nan") for name, (total, count) in zip(self.sums, pairs)}
        skipped = round(self.sums["skipped"][0].item())
        streak = round(self.worst.item())
        del means["skipped"]
        self.clear()
        return means, skipped, streak


class Count:
    """Says how far a pass over images is, every ten seconds at most; `rate` is images/s so far.

    total: images of this process, `done` of which were done before
    """

    def __init__(self, total: int, done: int, log: Callable[[str], None]):
        self.total, self.before, self.done, self.log = total, done, done, log
        self.began = self.told = time.perf_counter()

    def __call__(self, images: int) -> None:
        """So many more."""
        self.done += images
        if time.perf_counter() - self.told > EVERY or self.done == self.total:
            self.told = time.perf_counter()
            left = duration((self.total - self.done) / max(self.rate, 1e-9))
            self.log(f"images    {self.done:,}/{self.total:,}  {self.rate:.0f} images/s  {left} left")

    @property
    def rate(self) -> float:
        return (self.done - self.before) / max(time.perf_counter() - self.began, 1e-9)


class Fed(Protocol):
    """What is known of a loader: the plan of its steps, and seconds spent waiting for images so far."""

    plan: Plan
    waited: float


class Watch:
    """How fast the run goes: images/s, the share of time spent waiting for data, the time left."""

    def __init__(self, loader: Fed, step: int):
        self.loader, self.images, self.began, self.began_at = loader, loader.plan.images, time.perf_counter(), step
        self.restart(step)

    def restart(self, step: int) -> None:
        """Measure from here on."""
        self.since, self.waited, self.step = time.perf_counter(), self.loader.waited, step

    def read(self, step: int, steps: int) -> dict[str, float]:
        """The figures since the last reading."""
        now = time.perf_counter()
        seconds = max(now - self.since, 1e-9)
        seen, left = self.images(step) - self.images(self.began_at), self.images(steps) - self.images(step)
        figures = {
            "images_per_s": (self.images(step) - self.images(self.step)) / seconds,
            "data_wait": min((self.loader.waited - self.waited) / seconds, 1.0),
            "eta_s": (now - self.began) / max(seen, 1) * left,
        }
        if torch.cuda.is_available():
            figures["memory_gb"] = torch.cuda.max_memory_allocated() / 1e9
        self.restart(step)
        return figures
