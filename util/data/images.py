from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from util.data.channels import match
from util.data.decode import decode
from util.data.mnist import Pixels, append, find_fashion_mnist, has_idx, open_idx
from util.data.sources import Joined, Source, once, open_source
from util.data.subsets import choose, hold_out, read_classes, read_labels
from util.data.survey import Survey, make_survey
from util.errors import UserError

VAL_FOLDERS = "val", "validation", "valid", "test"


class Images:
    """Some images of a source, by position, all with the same number of channels; labels: (n,) int64 or None."""

    def __init__(self, source: Source | Pixels, rows: np.ndarray, channels: int, labels: np.ndarray | None = None):
        self.source, self.rows, self.channels, self.labels = source, rows, channels, labels
        self.pixels: Tensor | None = None  # (n, C, H, W) when all of them are in memory already
        if isinstance(source, Pixels):
            self.pixels = torch.from_numpy(source.pixels[rows]).expand(-1, channels, -1, -1)

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def bounds(self) -> np.ndarray:
        """(sources + 1,) positions at which the images of each source begin, and the end of all; rows are sorted."""
        starts = self.source.starts if isinstance(self.source, Joined) else [0, len(self.source.names)]
        return np.searchsorted(self.rows, starts)

    def path(self, position: int) -> str:
        return self.source.path(int(self.rows[position]))

    def read(self, position: int) -> Tensor:
        """(C, H, W): uint8, or float32 when the file has more than 8 bits. Raises what decoding raises."""
        if self.pixels is not None:
            return self.pixels[position]
        with self.source.open(int(self.rows[position])) as file:
            pixels = decode(file, keep_alpha=self.channels == 4)
        return torch.from_numpy(match(pixels, self.channels)).permute(2, 0, 1)

    def take(self, positions: np.ndarray) -> "Images":
        """Only these images, in this order."""
        labels = None if self.labels is None else self.labels[positions]
        return Images(self.source, self.rows[positions], self.channels, labels)


@dataclass
class Dataset:
    """What `open_images` found; `str(survey)` is its summary, a line for each thing to know.

    pool: the training images before a fraction or a budget was taken of them, what every fraction is measured by
    """

    roots: list[str]
    pool: Images
    train: Images
    val: Images
    classes: list[str] | None
    survey: Survey


def open_images(
    root: str | Sequence[str],
    val: str | None = None,
    labels: bool = False,
    channels: int | None = None,
    fraction: float = 1.0,
    budget: int | None = None,
    seed: int = 0,
) -> Dataset:
    """Find the images of a folder, a text list, tar shards or `fashion_mnist`, or of several, for train and val.

    val: a root of its own for validation; else, where root has folders `train` and `val` (or `validation`, `valid`,
        `test`), those; else 1 % of the images, at most 5,000, chosen by a hash of their paths relative to root.
    labels: read them (first folder level, second column of the list, .cls or .json in shards); classes are sorted by
        name, or as integers where all are.
    channels: of every image; None takes it from the data.
    fraction: share of the training images to use; smaller shares are subsets of larger ones of the same seed.
    budget: number of labelled training images to use, balanced over the classes, nested like `fraction`.

    A file counts once, for the first root that names it: what is held out through one root is trained on through none.
    Validation images, channels and whatever else is read off the data are the same for every fraction and budget.
    """
    roots = [root] if isinstance(root, str) else list(root)
    split = [_split(one) for one in roots]
    source, files, repeated = _join([_open(train, "train", labels) for train, _ in split])
    val_roots = [val] if val else [part for _, part in split if part]
    if val_roots:
        val_source, val_files, _ = _join([_open(part, "t10k", labels) for part in val_roots])
        rows, val_rows, known = np.arange(len(files)), np.arange(len(val_files)), np.isin(val_files, files).sum()
    else:
        (rows, val_rows), val_source, known = hold_out(source.names), source, 0
    classes = read_classes(source) if labels else None
    train_labels = read_labels(source, classes)[rows] if labels else None
    val_labels = read_labels(val_source, classes)[val_rows] if labels else None
    survey = make_survey(source, rows, len(val_rows), not val_roots, roots, channels, seed)
    survey.repeated, survey.known = repeated, int(known)
    pool = train = Images(source, rows, survey.channels, train_labels)
    if fraction != 1 or budget is not None:
        train = pool.take(choose(source.names, rows, train_labels, fraction, budget, seed))
        survey.train = len(train)
    val_images = Images(val_source, val_rows, survey.channels, val_labels)
    return Dataset(roots, pool, train, val_images, classes, survey)


def open_all(root: str | Sequence[str], channels: int | None = None, seed: int = 0) -> Dataset:
    """Every image of a root or several, training and validation alike; nothing is held out, no labels are needed.

    They come in the order of their paths, those of a list in its own; a file counts once.
    """
    roots = [root] if isinstance(root, str) else list(root)
    parts = [_open(one, split, False) for one in roots for split in (("train", "t10k") if _is_idx(one) else ("train",))]
    if len(roots) == 1 and len(parts) == 2:
        source, repeated = append(*parts), 0
    else:
        source, _, repeated = _join(parts)
    rows = np.arange(len(source.names))
    survey = make_survey(source, rows, 0, False, roots, channels, seed)
    survey.repeated = repeated
    images = Images(source, rows, survey.channels)
    return Dataset(roots, images, images, images.take(rows[:0]), None, survey)


def _is_idx(root: str) -> bool:
    return root.partition(":")[0] == "fashion_mnist" or has_idx(Path(root))


def _split(root: str) -> tuple[str, str | None]:
    """Where the training and the validation images of a root are; None for validation where it has none."""
    if _is_idx(root):
        return root, root
    if "{" in root or not Path(root).is_dir():
        return root, None
    folders = {entry.name for entry in Path(root).iterdir() if entry.is_dir() and entry.name[0] != "."}
    val = next((name for name in VAL_FOLDERS if name in folders), None)
    if "train" in folders and (val or len(folders) == 1):  # beside `bus` and `car`, `train` is a class
        return f"{root}/train", f"{root}/{val}" if val else None
    return root, None


def _open(root: str, split: str, labels: bool) -> Source | Pixels:
    if root.partition(":")[0] == "fashion_mnist":
        return open_idx(find_fashion_mnist(root.partition(":")[2]), split)
    return open_idx(Path(root), split) if has_idx(Path(root)) else open_source(root, labels)


def _join(sources: list[Source | Pixels]) -> tuple[Source | Pixels, np.ndarray, int]:
    """Sources as one, a number for each of its files, and how many were left out because they are there already."""
    if len(sources) > 1 and any(isinstance(source, Pixels) for source in sources):
        raise UserError("data.root: fashion_mnist cannot be joined with other roots")
    sources, files, repeated = once(sources)
    return sources[0] if len(sources) == 1 else Joined(sources), files, repeated
