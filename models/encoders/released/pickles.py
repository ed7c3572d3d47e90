"""Files of torch.save, read without importing or calling anything that they name.

torch reads them with weights_only=True, always. What it refuses there is, in files that people bring, mostly a config
object or numpy's numbers beside the weights (yacs in Swin's, omegaconf, mmengine's log). Those need no import either: a
class that nobody here knows is read as an empty stand-in, and told as ignored. Two things are refused, by name, however
harmless they may be, as only running them would show: whatever of Python's own library is not a plain type, and every
call of a function or class, but those of MADE.
"""

from __future__ import annotations

import argparse
import pickle
import pickletools
import sys
import warnings
import zipfile
from _compat_pickle import IMPORT_MAPPING, NAME_MAPPING
from collections import OrderedDict
from collections.abc import Iterator
from io import BufferedIOBase
from pathlib import Path
from typing import Any

import torch

from models.encoders.released.common import Unfit

ZIP = b"PK\x03\x04"
ALLOWED = [argparse.Namespace]  # MAE stores its options beside the weights
ALLOWED_NAMES = {f"{kind.__module__}.{kind.__qualname__}" for kind in ALLOWED}
PLAIN = ("bool", "bytearray", "bytes", "complex", "dict", "float", "int", "list", "object", "set", "str", "tuple")
MADE = {  # calls that make nothing but a value: read as an empty one
    "numpy.core.multiarray._reconstruct",
    "numpy.core.multiarray.scalar",
    "numpy._core.multiarray._reconstruct",
    "numpy._core.multiarray.scalar",
    "numpy.dtype",
    "collections.defaultdict",
    "pathlib.PosixPath",
    "pathlib.PurePosixPath",
    "pathlib.PureWindowsPath",
    "pathlib.WindowsPath",
    "datetime.date",
    "datetime.datetime",
    "datetime.timedelta",
}
HARMLESS = MADE | {f"builtins.{name}" for name in PLAIN}
HARMLESS |= {"argparse.Namespace", "collections.OrderedDict", "collections.Counter", "_codecs.encode", "typing.Any"}
STRINGS = ("STRING", "BINSTRING", "SHORT_BINSTRING", "UNICODE", "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8")


class Refused(ValueError):
    """A file wants something run."""


class Value:
    """In place of a number, an array or a path beside the weights."""

    def __init__(self, *_):
        pass

    def __setstate__(self, state: Any) -> None:
        pass


class Uncallable(type):
    def __call__(cls, *_):
        raise Refused(cls.__name__)


def load(path: Path) -> tuple[Any, list[str]]:
    """What torch.save wrote, and the names of the classes of which there were objects that are not read.

    Refused, a ValueError that names it, for a file that wants something run; otherwise torch's own errors.
    """
    with warnings.catch_warnings(), torch.serialization.safe_globals(ALLOWED):
        warnings.simplefilter("ignore")  # of other protocols, which are refused
        try:
            return saved(path), []
        except pickle.UnpicklingError:
            found, met = names(path), []
        check(found)
        stand_ins = [stand_in(name, met) for name in found if name not in ALLOWED_NAMES]
        with torch.serialization.safe_globals(stand_ins):
            try:
                return saved(path), list(dict.fromkeys(met))
            except pickle.UnpicklingError as error:
                if met and "call reduce" in str(error):
                    raise Refused(f"an object of {met[-1]}") from error
                if "Unsupported operand" in str(error):
                    raise Unfit("was pickled in another way: save it again by torch.save, with no protocol") from error
                why = str(error).split("\n\n")[-2:][0]  # the last words but for a reference
                raise Unfit(f"holds what torch reads only by running it ({why}): give a plain state_dict") from error


def saved(path: Path) -> Any:
    if path.suffix == ".safetensors":  # else torch believes the name
        with open(path, "rb") as file:
            return torch.load(file, "cpu", weights_only=True)
    return torch.load(path, "cpu", weights_only=True, mmap=is_zip(path))  # mapped, only what is used is read


def is_zip(path: Path) -> bool:
    with open(path, "rb") as file:
        return file.read(4) == ZIP


def stand_in(name: str, met: list[str]) -> tuple[Any, str]:
    """What torch, which knows its own names better, makes of another name; `met` receives it where there is an object.

    torch fills no mapping but its own kinds, so an object, which may be one, is an OrderedDict.
    """

    def make(*_) -> OrderedDict:
        met.append(name)
        return OrderedDict()

    if name == "collections.defaultdict":
        return lambda *_: OrderedDict(), name
    if name in MADE:
        return type(name, (Value,), {}), name
    return Uncallable(name, (), {"__new__": make}), name


def check(found: list[str]) -> None:
    """Refused if any of these names is one of Python's own library that does more than hold a value."""
    for name in found:
        if name.partition(".")[0] in sys.stdlib_module_names and name not in HARMLESS:
            raise Refused(name)


def names(path: Path) -> list[str]:
    """The "module.name" of all that the pickles in a file name, in order. ValueError if they are damaged."""
    if is_zip(path):
        with zipfile.ZipFile(path) as archive:
            inner = [name for name in archive.namelist() if name.endswith(".pkl")]
            return list(dict.fromkeys(name for member in inner for name in named(archive.open(member))))
    with open(path, "rb") as file:
        return list(dict.fromkeys(sequence(file)))


def sequence(file: BufferedIOBase) -> Iterator[str]:
    """The names in the pickles with which an older file of torch.save begins, or in a single pickle."""
    for i in range(5):  # a magic number, the protocol, the system, what was saved, its storages
        try:
            yield from named(file)
        except ValueError:
            if i == 0:
                raise
            return


def named(file: BufferedIOBase) -> Iterator[str]:
    """The names in one pickle. ValueError if it is damaged, or made to fill the memory."""
    strings, top, memo = ["", ""], None, {}  # the last two strings; the top of the stack, if it is one; those kept
    for count, (code, value, _) in enumerate(pickletools.genops(file)):
        if code.name in ("MEMOIZE", "PUT", "BINPUT", "LONG_BINPUT"):
            place = len(memo) if value is None else value
            if place > count:
                raise ValueError(f"it numbers its parts to {place} after {count} steps")
            memo[place] = top
            continue
        if code.name in ("GLOBAL", "INST"):
            yield today(*value.split(" ", 1))
        elif code.name == "STACK_GLOBAL":
            yield today(*strings)
        top = memo.get(value) if code.name in ("GET", "BINGET", "LONG_BINGET") else None
        if code.name in STRINGS:
            top = value if isinstance(value, str) else value.decode("latin1")
        if top is not None:
            strings = [strings[-1], top]


def today(module: str, name: str) -> str:
    """A name as Python 3 has it: pickles of torch.save call `builtins` by its older name."""
    module, name = NAME_MAPPING.get((module, name), (IMPORT_MAPPING.get(module, module), name))
    return f"{module}.{name}"
