"""What a run leaves on disk: checkpoints to go on from, and the encoder to take elsewhere."""

from __future__ import annotations

import json
import os
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import nn
from torch.optim import Optimizer

from util import dist
from util.errors import UserError, first_line

LAST, BEFORE = "last.pt", "before.pt"


def save(folder: Path, task: nn.Module, optimizer: Optimizer, scaler: torch.amp.GradScaler, counts: dict) -> None:
    """Write folder/last.pt in full and only then put it in place; the checkpoint that it replaces becomes before.pt.

    counts: plain numbers of the loop, its "step" among them. What lies under `target.` is frozen and never saved.
    """
    if dist.rank() == 0:
        path, aside = folder / LAST, folder / f"{LAST}.writing"
        state = {
            "task": {k: v for k, v in task.state_dict().items() if not k.startswith("target.")},
            "optimizer": optimizer.state_dict(),
            "scaler": scaler.state_dict(),
            "counts": counts,
        }
        with open(aside, "wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
        if path.exists():
            os.replace(path, folder / BEFORE)
        os.replace(aside, path)


def there(folder: Path) -> bool:
    """Whether a run's folder holds a checkpoint to go on from."""
    return any((folder / name).exists() for name in (LAST, BEFORE))


def load(folder: Path, task: nn.Module, optimizer: Optimizer, scaler: torch.amp.GradScaler, log=print) -> dict:
    """Go on from folder/last.pt, or from before.pt if that is cut short; gives the counts, {} if there is neither.

    UserError if checkpoints are there and none can be read, or if they hold another model.
    """
    paths = [folder / name for name in (LAST, BEFORE) if (folder / name).exists()]
    for path in paths:
        try:
            # mapped: processes of a machine share what they read, and no tensor is in memory twice
            state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        except Exception as error:  # torch raises half a dozen kinds for a file that is cut short
            log(f"{path} cannot be read ({first_line(error)}); trying the one before it")
            continue
        fit(path, task, state["task"])
        optimizer.load_state_dict(state["optimizer"])
        scaler.load_state_dict(state["scaler"])
        return state["counts"]
    if paths:
        raise UserError(
            f"no checkpoint in {folder} can be read: remove {' and '.join(p.name for p in paths)} to start anew"
        )
    return {}


def fit(path: Path, task: nn.Module, state: dict) -> None:
    """Load a task's weights, all of them. UserError if the file holds another model."""
    try:
        missing, unread = task.load_state_dict(state, strict=False)
    except RuntimeError as error:
        raise UserError(
            f"{path} holds another model: {first_line(RuntimeError(str(error).split(': ')[-1]))}"
        ) from error
    missing = [key for key in missing if not key.startswith("target.")]
    if missing or unread:
        raise UserError(f"{path} holds another model: {len(missing)} tensors missing, {len(unread)} unknown "
                        f"({', '.join([*missing, *unread][:3])})")  # fmt: skip


def export(path: Path, encoder: nn.Module, normalization: dict, method: dict | None = None) -> None:
    """Write an encoder's weights, with how to build it and how its images are normalised as JSON in the metadata.

    normalization: {"mean", "std"} of each channel on the scale of [0, 1], and "size", (height, width) in pixels
    method:        {"name", "args"} of the method that pretrained it, whose decoder is in the checkpoint beside
    """
    if dist.rank() == 0:
        tensors = {key: value.detach().cpu().contiguous() for key, value in encoder.state_dict().items()}
        facts = {"encoder": encoder.plan, "normalization": normalization, "method": method}
        metadata = {"format": "pt"} | {key: json.dumps(fact) for key, fact in facts.items() if fact is not None}
        aside = path.with_suffix(".writing")
        save_file(tensors, aside, metadata)
        os.umask(mask := os.umask(0))
        os.chmod(aside, 0o666 & ~mask)  # safetensors leaves it to its owner alone
        os.replace(aside, path)
