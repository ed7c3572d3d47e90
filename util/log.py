"""Where a run's figures go: the console, log.jsonl and TensorBoard; only the main process writes."""

from __future__ import annotations

import fcntl
import json
import math
import time
from functools import cached_property
from pathlib import Path

import numpy as np

from util import dist
from util.errors import UserError


class Log:
    """Writes a run's figures and remarks.

    folder: gets log.jsonl, one object a line, and tensorboard/
    """

    def __init__(self, folder: Path):
        self.folder, self.file = folder, None
        if dist.rank() == 0:
            self.file = open(folder / "log.jsonl", "a", buffering=1)  # noqa: SIM115
            try:
                fcntl.lockf(self.file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # the system lets go of it, however a run ends
            except OSError as error:
                raise UserError(
                    f"another run is writing {folder}: wait for it, or choose another run.folder"
                ) from error

    @cached_property
    def curves(self):
        """TensorBoard's writer, once there is something to draw."""
        from torch.utils.tensorboard import SummaryWriter  # takes a second

        return SummaryWriter(str(self.folder / "tensorboard"))

    def __call__(self, text: str) -> None:
        """A remark, for the console and for log.jsonl."""
        if self.file is not None:
            print(text, flush=True)
            self.file.write(json.dumps({"time": round(time.time(), 1), "text": text}) + "\n")

    def figures(self, step: int, figures: dict[str, float], line: str = "") -> None:
        """Numbers at a step, for log.jsonl and TensorBoard; `line` says them on the console."""
        if self.file is not None:
            if line:
                print(line, flush=True)
            plain = {k: v if math.isfinite(v) else str(v) for k, v in figures.items()}
            self.file.write(json.dumps({"time": round(time.time(), 1), "step": step, **plain}) + "\n")
            for name, value in figures.items():
                self.curves.add_scalar(name, value, step)
            self.curves.flush()

    def picture(self, step: int, name: str, image: np.ndarray) -> None:
        """An image (H, W, 3) uint8 for TensorBoard."""
        if self.file is not None:
            self.curves.add_image(name, image, step, dataformats="HWC")

    def close(self) -> None:
        if self.file is not None:
            self.file.close()
            if "curves" in vars(self):
                self.curves.close()


def duration(seconds: float) -> str:
    """75 -> "1:15", 7270 -> "2:01:10" """
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"
