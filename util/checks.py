"""Options that cannot be meant, refused in one line before anything is read or written."""

from __future__ import annotations

from pathlib import Path

from util import checkpoint, dist
from util.config import Data, Optim, Run
from util.data.loader import read_schedule
from util.errors import UserError
from util.times import check_times, read_changes

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
    "optim.encoder_lr_scale": 0,
}


def check(data: Data, optim: Optim, run: Run, images: bool = True) -> None:
    """UserError, before anything is read, for numbers and names that cannot be meant; `images`: some are needed."""
    sections = {"data": data, "optim": optim, "run": run}
    for key, least in LEAST.items():
        section, name = key.split(".")
        for _, value in read_changes(key, getattr(sections[section], name)):
            if value is not None and value < least:
                raise UserError(f"{key} is {value}, but has to be at least {least}")
    for _, size in [] if data.size is None else read_schedule(data.size):
        if min(size) < 1:
            side = size[0] if size[0] == size[1] else list(size)
            raise UserError(f"data.size is {side}, but has to be at least 1 px, as in 224 or [192, 256]")
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
        if value is not None and value not in choices:
            raise UserError(f"{key} is {value}, but has to be {', '.join(choices[:-1])} or {choices[-1]}")
    if not all(0 <= beta < 1 for beta in optim.betas):
        raise UserError(f"optim.betas is {optim.betas}, but each has to be at least 0 and below 1")
    if optim.weight_decay_end is not None and not (optim.weight_decay > 0 and optim.weight_decay_end >= 0):
        raise UserError(
            f"optim.weight_decay goes from {optim.weight_decay} to {optim.weight_decay_end}, but has to start above 0 "
            "and end at 0 or above"
        )
    if images and data.root == "none":
        raise UserError("data.root is needed: a folder of images, a list, tar shards or fashion_mnist")
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


def check_start(folder: Path, weights: str) -> None:
    """UserError where to resume a run and to start one from weights are taken for each other."""
    place = Path(weights.rpartition(":")[2])  # what stands before the colon tells of what kind the weights are
    if place.name in (checkpoint.LAST, checkpoint.BEFORE) and place.is_file():
        raise UserError(
            f"--weights {weights} is a checkpoint, which is there to resume its run, by the command that began it; the "
            f"weights to start another run from lie beside it: --weights {place.parent}"
        )
    if place.exists() and folder.resolve() == (place if place.is_dir() else place.parent).resolve():
        raise UserError(
            f"--weights {weights} lies in run.folder itself: to resume the run that is there, give the command that "
            "began it; to start a new one from these weights, choose another run.folder"
        )
    own = folder / "encoder.safetensors"
    if own.exists() and not (folder / "config.yaml").exists():
        raise UserError(
            f"run.folder {folder} holds weights, but no run to resume: to start from them, give --weights {own} and "
            "another run.folder"
        )
