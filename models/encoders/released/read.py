"""The tensors of a file, read without running anything that it holds."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from models.encoders.released import pickles
from models.encoders.released.archive import read_archive
from models.encoders.released.common import DERIVED, State, Unfit
from models.encoders.released.magic import AGAIN, one_line, what_it_is

AVERAGES = ("model_ema", "state_dict_ema", "ema_state_dict", "ema")  # come first: they are the better weights
TEACHERS = ("target_encoder", "teacher")  # before the student whose average they are; beside a model they are others
RUN = "task"  # of our own checkpoints
WRAPPERS = (*AVERAGES, "model", "state_dict", "model_state", "model_state_dict", "module", *TEACHERS, "student")
WRAPPERS += ("encoder", RUN)
PREFIXES = ("module.", "_orig_mod.", "model.")  # of DDP, torch.compile and Lightning
FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
MOST = 2**34  # bytes that tensors may claim beyond those of their file


@dataclass
class Content:
    """What is in a file of weights.

    state:    tensors by key, without wrappers and prefixes
    metadata: of a safetensors file
    beside:   what lay beside the weights, such as "optimizer"
    wrappers: in which they lay, the outer first
    """

    state: State
    metadata: dict[str, str] = field(default_factory=dict)
    beside: list[str] = field(default_factory=list)
    wrappers: list[str] = field(default_factory=list)

    @property
    def average(self) -> str | None:
        """The wrapper of averaged weights that these are from; None if they are none."""
        return next((wrapper for wrapper in self.wrappers if wrapper in (*AVERAGES, *TEACHERS)), None)


def read(path: Path) -> Content:
    """What is in a file. ValueError in one line if it cannot be read, is damaged, or wants to run code."""
    try:
        with torch.device("cpu"):
            content = open_up(path)
        check(content.state, path.stat().st_size)
    except pickles.Refused as error:
        raise ValueError(
            f"{one_line(path, 1000)} is refused: to be read it wants to run {one_line(error, 80)}; nothing was run; "
            "ask whoever made it for a safetensors file or a plain state_dict"
        ) from error
    except SafetensorError as error:
        why = one_line(error, 80)
        raise ValueError(f"{one_line(path, 1000)} is a safetensors file cut short or damaged ({why}){AGAIN}") from error
    except Unfit as error:
        raise ValueError(f"{one_line(path, 1000)} {one_line(error, 400)}") from error
    except Exception as error:  # torch, zipfile and pickle raise a dozen kinds for a file that is not whole
        why = one_line(f"{type(error).__name__}: {error}", 120)
        raise ValueError(f"{one_line(path, 1000)} cannot be read, it is cut short or damaged ({why})") from error
    return content


def open_up(path: Path) -> Content:
    """What is in a file, whatever it is called. Errors of many kinds."""
    kind = what_it_is(path)
    if kind == "safetensors":
        with safe_open(path, "pt") as file:
            state = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
            metadata = file.metadata() or {}
        return Content(state, metadata) if "encoder" in metadata else unwrapped(state, metadata, [])
    content, objects = (read_archive(path), []) if kind == "torchscript" else pickles.load(path)
    return unwrapped(content, {}, objects)


def unwrapped(content: Any, metadata: dict[str, str], objects: list[str]) -> Content:
    """The tensors in a file's content, out of wrappers, their keys without prefixes."""
    beside, wrappers = [], []
    while isinstance(content, dict) and len(wrappers) < 8:  # a pickle can hold itself
        wrapper = next((key for key in WRAPPERS if filled(content.get(key))), None)
        if wrapper is None:
            break
        beside += [str(key) for key in content if key != wrapper]
        wrappers.append(wrapper)
        content = content[wrapper]
    state = {k: v for k, v in content.items() if isinstance(v, Tensor)} if isinstance(content, dict) else {}
    whose = few(objects)
    if not state:
        if objects:
            raise Objects(f"holds no tensors by name but objects of {whose}: give what their state_dict() holds")
        raise Unfit("holds no tensors by name")
    if wrong := [key for key in state if not (isinstance(key, str) and key.isprintable())]:
        raise Unfit(f"has a tensor by the name {one_line(ascii(wrong[0]), 60)}: no model has")
    state, others = without_prefixes(state)
    beside += [f"{what} {n}" for what, n in others.items()]
    beside = [one_line(name, 40) for name in beside] + ([f"objects of {whose}"] if objects else [])
    return Content(state, metadata, beside, wrappers)


def filled(content: Any) -> bool:
    """Whether there are tensors by name in a dict, or in a wrapper in it."""
    if not isinstance(content, dict):
        return False
    values = content.values()
    return any(isinstance(value, Tensor) for value in values) or any(filled(content.get(key)) for key in WRAPPERS)


def without_prefixes(state: State) -> tuple[State, Counter[str]]:
    """The same tensors, by keys without a wrapper's prefix, and how many without it lay beside, by what they are.

    A prefix is a wrapper's if most keys have it: Lightning's files hold a loss or a metric beside the model.
    """
    beside = Counter()
    while prefix := next((p for p in PREFIXES if sum(key.startswith(p) for key in state) > len(state) / 2), None):
        beside.update(key.split(".")[0] for key in state if not key.startswith(prefix))
        state = {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}
    return state, beside


class Objects(Unfit):
    """A file holds a module or the like, of which only the class itself could tell the tensors."""


def check(state: State, size: int) -> None:
    """Unfit if a tensor holds no plain numbers, or any that is not finite.

    size: of the file in bytes, of which its tensors may not claim many times as much
    """
    claimed = sum(value.numel() * value.element_size() for value in state.values())
    if claimed > size + MOST:
        raise Unfit(f"has {size} bytes, but tensors of {claimed}")
    wrong = []
    for key, value in state.items():
        kind = kind_of(value)
        if kind is not None:
            raise Unfit(f"has {one_line(key, 80)} {kind}: give weights of float32, float16 or bfloat16")
        if key.endswith((*DERIVED, "mask")) or not value.is_floating_point():  # masks of attention may hide by -inf
            continue
        if not value.sum(dtype=torch.float32).isfinite():  # or it overflows
            count = value.numel() - int(value.isfinite().sum())
            wrong += [(key, count, value.numel())] if count else []
    if wrong:
        key, count, among = wrong[0]
        more = f", and {len(wrong) - 1} more tensors have such" if wrong[1:] else ""
        raise Unfit(f"is damaged, or its training diverged: {count} of {among} numbers of {one_line(key, 80)} are NaN "
                    f"or infinite{more}; take another checkpoint, as nothing good comes from this one")  # fmt: skip


def kind_of(value: Tensor) -> str | None:
    """How a tensor is stored, if not as plain numbers."""
    if value.is_meta:
        return "without its numbers (on the meta device)"
    if value.layout != torch.strided:
        return f"as a sparse tensor ({value.layout})"
    if value.is_quantized or value.is_complex() or value.is_floating_point() and value.dtype not in FLOATS:
        return f"as {value.dtype}"
    return None


def few(names: list[str]) -> str:
    return one_line(", ".join(names[:2]), 100) + (f" and {len(names) - 2} more" if len(names) > 2 else "")
