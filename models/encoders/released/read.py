"""The tensors of a file, read without running anything that it holds."""

from __future__ import annotations

import argparse
import pickle
import zipfile
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from models.encoders.released.archive import read_archive
from models.encoders.released.common import State

UNREADABLE = SafetensorError, pickle.UnpicklingError, RuntimeError, EOFError, OSError, ValueError, KeyError, TypeError
WRAPPERS = ("model_ema", "state_dict_ema", "model", "model_state", "state_dict", "module", "teacher", "task")
PREFIXES = ("module.", "_orig_mod.", "model.")  # of DDP, torch.compile and Lightning


@dataclass
class Content:
    """What is in a file of weights.

    state:    tensors by key, without wrappers and prefixes
    metadata: of a safetensors file
    beside:   what lay beside the weights, such as "optimizer"
    """

    state: State
    metadata: dict[str, str] = field(default_factory=dict)
    beside: list[str] = field(default_factory=list)


def read(path: Path) -> Content:
    """What is in a file. ValueError in one line if it cannot be read, or only by running code that it holds."""
    try:
        if path.suffix == ".safetensors":
            with safe_open(path, "pt") as file:
                return Content({key: file.get_tensor(key) for key in file.keys()}, file.metadata() or {})  # noqa: SIM118
        with torch.serialization.safe_globals([argparse.Namespace]):  # MAE stores its options beside the weights
            mapped = zipfile.is_zipfile(path)  # then only what is used is read
            content = read_archive(path) or torch.load(path, "cpu", weights_only=True, mmap=mapped)
    except UNREADABLE as error:
        why = str(error).strip().split("\n")[0][:120]
        raise ValueError(f"{path} cannot be read, it may be cut short: {why}") from error
    beside = []
    while isinstance(content, dict):
        wrapper = next((key for key in WRAPPERS if isinstance(content.get(key), dict)), None)
        if wrapper is None:
            break
        beside += [str(key) for key in content if key != wrapper]
        content = content[wrapper]
    state = {k: v for k, v in content.items() if isinstance(v, Tensor)} if isinstance(content, dict) else {}
    if not state:
        raise ValueError(f"{path} holds no tensors by name")
    return Content(without_prefixes(state), beside=beside)


def without_prefixes(state: State) -> State:
    """The same tensors, by keys without a prefix that all of them have."""
    while prefix := next((p for p in PREFIXES if all(key.startswith(p) for key in state)), None):
        state = {key.removeprefix(prefix): value for key, value in state.items()}
    return state
