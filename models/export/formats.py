"""Encoders for other libraries: what is written is read back by the other library and compared before it is kept."""

from __future__ import annotations

import difflib
import os
import pkgutil
import shutil
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from models.encoders.encoder import Encoder
from models.encoders.grid import Features
from models.export.card import card

FORMATS = {  # who writes and reads each; imported when it is asked for
    "safetensors": "models.export.safetensors",
    "timm": "models.export.timm",
    "transformers": "models.export.hf",
    "torchvision": "models.export.torchvision",
    "detectron2": "models.export.detectron2",
    "open_clip": "models.export.open_clip",
    "onnx": "models.export.onnx",
}
IMAGES, LIMIT = 8, 1e-4  # compared; the largest difference, as a part of the largest feature
PACKAGES = {"open_clip": "open_clip_torch"}  # where pip knows a module by another name


@dataclass
class Facts:
    """What is known of an encoder beside its weights.

    mean, std: by which its images are normalised, of each channel on the scale of [0, 1]
    size:      (height, width) of its images, in pixels
    method:    {"name", "args"} of the method that pretrained it
    report:    the final figures of its run
    config:    all options of its run
    licence:   of the weights; "unknown" where nobody says
    origin:    who wrote the weights, as `Weights.origin`
    source:    where they were read
    crop:      part of an image's side that was kept when it was cut from the centre
    any_size:  whether a format whose files may be for one size of images tries to make them for all
    notes:     what a format has to say of its files, a sentence each; for the card
    """

    mean: list[float]
    std: list[float]
    size: tuple[int, int]
    method: dict | None = None
    report: dict | None = None
    config: dict | None = None
    licence: str = "unknown"
    origin: str = "ours"
    source: str = ""
    crop: float = 0.875
    any_size: bool = True
    notes: list[str] = field(default_factory=list)


class Format(Protocol):
    """Files of some library.

    write: into an empty folder; ValueError if the library has no such model, saying which it has
    read:  the same files through the other library: normalised images (B, C, H, W) -> the last map, and the prefix
           tokens where the library gives them
    USE:   Python that loads them in their own folder, in which {name}, {mean}, {std}, {channels}, {height}, {width}
           are the encoder's; it leaves `features`
    """

    USE: str

    def write(self, encoder: Encoder, facts: Facts, folder: Path) -> None: ...

    def read(self, folder: Path, encoder: Encoder) -> Callable[[Tensor], Features]: ...


def export(encoder: Encoder, facts: Facts, to: str, folder: str | Path, images: Tensor | None = None) -> str:
    """Write an encoder in a format, with its card; gives a line such as "max |difference| 3e-6 over 8 images".

    to:     one of FORMATS
    folder: of the files; an older export there is replaced
    images: normalised, (B, C, H, W), by which the two libraries are compared; by default made up

    The folder appears whole, and only after the comparison. ValueError in one line if the format is unknown, its
    library missing or without such a model, if the library disagrees, or if the folder cannot be used.
    """
    form, folder = find(to), Path(folder)
    images = made(encoder, facts) if images is None else images
    aside, facts, training = folder.with_name(f"{folder.name}.writing"), replace(facts, notes=[]), encoder.training
    try:
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir(parents=True)
        form.write(encoder.eval(), facts, aside)
        line = compare(encoder, form, to, aside, images)
        (aside / "README.md").write_text(card(encoder, facts, to, form.USE, line))
        put_in_place(aside, folder)
    except ImportError as error:
        package = (error.name or str(error)).partition(".")[0]
        raise ValueError(f"{to} needs {package}: pip install {PACKAGES.get(package, package)}") from error
    except OSError as error:
        raise ValueError(f"{to}: {folder} cannot be written: {error.strerror or error}") from error
    finally:
        shutil.rmtree(aside, ignore_errors=True)
        encoder.train(training)
    return line


class Export:
    """Write an encoder for other libraries, a folder each; the other library reads it back before it is kept.

    to:      one of the formats, or several: safetensors, timm, transformers, torchvision, detectron2, open_clip, onnx
    licence: of the weights, where the file they are from does not tell it
    any_size: of onnx, images of any size where the encoder allows it; windows take minutes then, seconds without
    """

    images = IMAGES

    def __init__(self, to: str | list[str], licence: str | None = None, any_size: bool = True):
        self.to = [to] if isinstance(to, str) else list(to)
        self.licence, self.any_size = licence, any_size
        for one in self.to:
            find(one)

    def __call__(
        self, encoder: Encoder, facts: Facts, folder: Path, images: Tensor | None, log: Callable[[str], None]
    ) -> dict[str, str]:
        """Every format, and the line of each. ValueError if any fails; the others are kept."""
        facts = replace(facts, licence=self.licence or facts.licence, any_size=self.any_size)
        lines, wrong = {}, []
        for to in self.to:
            try:
                lines[to] = export(encoder, facts, to, folder / to, images)
                log(f"{to:13}{lines[to]}, in {folder / to}")
            except ValueError as error:
                wrong.append(str(error))
        if wrong:
            raise ValueError("; ".join(wrong) + (f"; {', '.join(lines)} done" if lines else ""))
        return lines

    @staticmethod
    def some(batches: Iterable[dict]) -> Tensor:
        """The first images of some batches, as many as are compared."""
        return torch.cat([batch["image"] for batch in batches])[:IMAGES]


def find(to: str) -> Format:
    """The format of a name. ValueError, naming the nearest, for an unknown one."""
    if to not in FORMATS:
        near = difflib.get_close_matches(to, FORMATS, n=1, cutoff=0.0)
        raise ValueError(f'no format is called "{to}"; the nearest is "{near[0]}" of {", ".join(FORMATS)}')
    try:
        return pkgutil.resolve_name(FORMATS[to])
    except ImportError as error:
        raise ValueError(f"{to} cannot be written here: {error}") from error


def made(encoder: Encoder, facts: Facts) -> Tensor:
    """Images of noise, normalised, the same at each call: (8, C, H, W)."""
    mean, std = (torch.tensor(values).view(-1, 1, 1) for values in (facts.mean, facts.std))
    noise = torch.rand(IMAGES, encoder.in_chans, *facts.size, generator=torch.Generator().manual_seed(0))
    return (noise - mean) / std


@torch.no_grad()
def compare(encoder: Encoder, form: Format, to: str, folder: Path, images: Tensor) -> str:
    """A line on how far the other library is from the encoder. ValueError if it cannot read, or is too far."""
    try:
        theirs = form.read(folder, encoder)(images)
    except (ImportError, OSError):
        raise
    except Exception as error:  # whatever another library raises
        why = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise ValueError(f"{to}: what was written cannot be read back, so it is not kept: {why[:200]}") from error
    furthest, largest = difference(encoder(images), theirs, to)
    line = f"max |difference| {short(furthest)} over {len(images)} images"
    if not furthest <= LIMIT * largest:  # nor if either is not a number
        raise ValueError(f"{to}: what was written gives other features, so it is not kept: {line}, where the largest "
                         f"feature is {largest:.3g}")  # fmt: skip
    return line


def difference(ours: Features, theirs: Features, to: str) -> tuple[float, float]:
    """The largest difference in the last map and, where the other library gives them, the prefix tokens; and the
    largest feature. ValueError if shapes differ."""
    pairs = [("map", ours.maps[-1], theirs.maps[-1])]
    if theirs.prefix is not None:
        none = ours.maps[-1].new_zeros(len(ours.maps[-1]), 0, ours.maps[-1].shape[1])
        pairs.append(("prefix", none if ours.prefix is None else ours.prefix, theirs.prefix))
    for what, here, there in pairs:
        if here.shape != there.shape:
            raise ValueError(f"{to}: its {what} is {tuple(there.shape)}, but {tuple(here.shape)} here: it is not kept")
    furthest = torch.stack([(here - there).abs().amax() for _, here, there in pairs]).amax()  # NaN stays NaN
    return furthest.item(), torch.stack([here.abs().amax() for _, here, _ in pairs]).amax().item()


def short(number: float) -> str:
    """3.2e-06 -> "3e-6" """
    digits, _, power = f"{number:.0e}".partition("e")
    return "0" if number == 0 else f"{digits}e{int(power)}" if power else digits


def put_in_place(aside: Path, folder: Path) -> None:
    """Rename a folder, over an older export if need be. ValueError if anything else is there."""
    mask = os.umask(0)
    os.umask(mask)
    for path in aside.rglob("*"):
        path.chmod((0o777 if path.is_dir() else 0o666) & ~mask)  # safetensors leaves files to their owner alone
    if not folder.exists():
        os.rename(aside, folder)
        return
    new, old = ({str(path.relative_to(place)) for path in place.rglob("*")} for place in (aside, folder))
    if not folder.is_dir() or old - new:
        other = f"holds {min(old - new)}, which is not of this export" if folder.is_dir() else "is a file"
        raise ValueError(f"{folder} {other}: choose another folder or remove it")
    gone = folder.with_name(f"{folder.name}.old")
    os.rename(folder, gone)
    os.rename(aside, folder)
    shutil.rmtree(gone)
