"""TorchScript archives, such as OpenAI's CLIP files: their tensors, without running anything that they hold."""

from __future__ import annotations

import collections
import pickle
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from models.encoders.released.common import State
from models.encoders.released.pickles import Refused, named, today


def rebuild(storage: Tensor, offset: int, size: tuple[int, ...], stride: tuple[int, ...], *_) -> Tensor:
    return storage.as_strided(size, stride, offset)


KNOWN = {
    "collections.OrderedDict": collections.OrderedDict,
    "torch._utils._rebuild_tensor_v2": rebuild,
    "torch.jit._pickle.restore_type_tag": lambda value, tag: value,
    **{f"torch.jit._pickle.build_{kind}list": list for kind in ("int", "double", "bool", "tensor")},
    "torch.FloatStorage": torch.float32,
    "torch.HalfStorage": torch.float16,
    "torch.BFloat16Storage": torch.bfloat16,
    "torch.LongStorage": torch.int64,
}


class Shell:
    """An object of a class that only the archive knows: its attributes."""


class Reader(pickle.Unpickler):
    """Reads tensors, plain values and shells; Refused for anything else."""

    def __init__(self, archive: zipfile.ZipFile, root: str):
        super().__init__(archive.open(f"{root}data.pkl"))
        self.archive, self.root = archive, root
        self.shell = type("Shell", (Shell,), {})  # the file's own, so that it can change no other

    def find_class(self, module: str, name: str) -> Any:
        if module == "__torch__" or module.startswith("__torch__."):
            return self.shell
        if f"{module}.{name}" not in KNOWN:
            raise Refused(today(module, name))
        return KNOWN[f"{module}.{name}"]

    def persistent_load(self, saved: tuple) -> Tensor:
        _, dtype, key, _, count = saved
        content = bytearray(self.archive.read(f"{self.root}data/{key}"))
        return torch.frombuffer(content, dtype=dtype, count=count) if count else torch.empty(0, dtype=dtype)


def read_archive(path: Path) -> State:
    """The tensors of a TorchScript module by their names. Refused if the file wants something else."""
    with zipfile.ZipFile(path) as archive:
        root = next(n for n in archive.namelist() if n.endswith("/constants.pkl")).removesuffix("constants.pkl")
        with archive.open(f"{root}data.pkl") as file:
            list(named(file))  # ValueError if it is made to fill the memory
        return dict(tensors(Reader(archive, root).load()))


def tensors(shell: Shell, prefix: str = "") -> Iterator[tuple[str, Tensor]]:
    for name, value in vars(shell).items():
        if isinstance(value, Tensor):
            yield prefix + name, value
        elif isinstance(value, Shell):
            yield from tensors(value, f"{prefix}{name}.")
