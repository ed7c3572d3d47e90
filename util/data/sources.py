import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import BinaryIO

import numpy as np

from util.data.names import EXTENSIONS, Names, walk
from util.data.shards import Shards, scan_shards
from util.errors import UserError


class Files:
    """Image files under a folder, named relative to it; tags: their labels as text, where a list gave them."""

    def __init__(self, root: Path, names: Names, tags: Names | None = None):
        self.root, self.names, self.tags = root, names, tags

    def path(self, i: int) -> str:
        return os.path.join(self.root, self.names[i])

    def open(self, i: int) -> BinaryIO:
        return open(self.path(i), "rb")

    def tag(self, i: int) -> str | None:
        if self.tags is not None:
            return self.tags[i] or None
        folder, slash, _ = self.names[i].partition("/")
        return folder if slash else None

    def places(self) -> Iterator[str]:
        """Where each file is, in one spelling; a folder is resolved once for all its files."""
        resolve = cache(lambda folder: os.path.realpath(os.path.join(self.root, folder)))
        for name in self.names:
            folder, slash, file = name.rpartition("/")
            yield f"{resolve(folder + slash)}/{file}"

    def take(self, rows: np.ndarray) -> "Files":
        return Files(self.root, self.names.take(rows), self.tags and self.tags.take(rows))


class Joined:
    """Several sources, one after the other."""

    def __init__(self, sources: Sequence[Files | Shards]):
        self.sources = sources
        self.names = Names(name for source in sources for name in source.names)
        self.starts = np.cumsum([0, *(len(source.names) for source in sources)])

    def at(self, i: int) -> tuple[int, int]:
        """The number of the source that an image is in, and its place there."""
        part = int(np.searchsorted(self.starts, i, side="right")) - 1
        return part, i - int(self.starts[part])

    def path(self, i: int) -> str:
        part, i = self.at(i)
        return self.sources[part].path(i)

    def open(self, i: int) -> BinaryIO:
        part, i = self.at(i)
        return self.sources[part].open(i)

    def tag(self, i: int) -> str | None:
        part, i = self.at(i)
        return self.sources[part].tag(i)


Source = Files | Shards | Joined


def once(sources: Sequence[Source]) -> tuple[list[Source], np.ndarray, int]:
    """The sources without the files that one before or the same named already; a number for each file; how many went.

    The numbers, (n,) int64, are the same for the same file in all calls of this process.
    """
    files = np.fromiter((hash(place) for source in sources for place in source.places()), np.int64)
    first = np.zeros(len(files), bool)
    first[np.unique(files, return_index=True)[1]] = True
    if first.all():
        return list(sources), files, 0
    parts = np.split(first, np.cumsum([len(source.names) for source in sources])[:-1])
    kept = [source.take(np.flatnonzero(part)) for source, part in zip(sources, parts)]
    return kept, files[first], int((~first).sum())


def open_source(root: str | Path, labels: bool = False) -> Source:
    """A folder of images or of tar shards at any nesting, a text list, one shard, or `shard-{000..012}.tar`.

    The order is that of the sorted names, whatever the file system's is. `labels` reads those inside shards.
    """
    if "{" in str(root):
        from webdataset.shardlists import expand_urls

        return scan_shards(expand_urls(str(root)), labels)
    path = Path(root)
    if not path.exists():
        parent = next(parent for parent in path.absolute().parents if parent.exists())
        raise UserError(f"{path} does not exist (the nearest folder that does is {parent}): correct data.root")
    if path.is_file():
        return scan_shards([str(path)], labels) if path.suffix == ".tar" else read_list(path)
    others: Counter[str] = Counter()
    names = Names(_only_images(walk(str(path)), others))
    if len(names):
        return Files(path, names)
    if others[".tar"]:
        return scan_shards([os.path.join(path, name) for name in walk(str(path)) if name.endswith(".tar")], labels)
    found = ", ".join(f"{count:,} {extension or 'without extension'}" for extension, count in others.most_common(5))
    raise UserError(f"0 images under {path} (looked for {' '.join(EXTENSIONS)}); found {found or 'no file at all'}")


def _only_images(names: Iterable[str], others: Counter) -> Iterator[str]:
    for name in names:
        extension = os.path.splitext(name)[1].lower()
        if extension in EXTENSIONS:
            yield name
        else:
            others[extension] += 1


def read_list(path: Path) -> Files:
    """A text list of `path` or `path label` (space, tab or comma), paths relative to the list, `#` for comments."""
    names, tags, unlabelled = Names(), Names(), None
    try:
        with open(path) as file:
            for line in map(str.strip, file):
                if not line or line.startswith("#"):
                    continue
                labelled = None if line.lower().endswith(EXTENSIONS) else re.fullmatch(r"(.+?)[\s,]+([^\s,]+)", line)
                names.append(labelled[1] if labelled else line)
                tags.append(labelled[2] if labelled else "")
                unlabelled = unlabelled or (None if labelled else line)
    except UnicodeDecodeError:
        raise UserError(f"{path} is neither a folder, a .tar, nor a text list of images") from None
    if not names:
        raise UserError(f"0 images in the list {path}: it needs a line `path` or `path label` for each image")
    if tags.text and unlabelled:
        count = sum(map(bool, tags))
        raise UserError(f"{path} labels {count:,} of {len(tags):,} images, for instance not {unlabelled}")
    return Files(path.parent, names, tags)
