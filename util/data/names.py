import os
from array import array
from collections.abc import Iterable, Iterator

import numpy as np

EXTENSIONS = (
    *(".jpg", ".jpeg", ".png", ".tif", ".tiff", ".webp", ".bmp", ".gif", ".npy"),
    *(".jp2", ".ppm", ".pgm", ".pnm", ".tga"),
)


class Names:
    """Many strings in two arrays: tens of bytes each, and forked workers share them without copying."""

    def __init__(self, names: Iterable[str] = ()):
        self.text, self.ends = bytearray(), array("q", [0])
        for name in names:
            self.append(name)

    def append(self, name: str) -> None:
        self.text += os.fsencode(name)
        self.ends.append(len(self.text))

    def __len__(self) -> int:
        return len(self.ends) - 1

    def __getitem__(self, i: int) -> str:
        return os.fsdecode(bytes(self.text[self.ends[i] : self.ends[i + 1]]))

    def take(self, rows: np.ndarray) -> "Names":
        return Names(self[row] for row in rows)

    def __iter__(self) -> Iterator[str]:
        return (self[i] for i in range(len(self)))


def walk(root: str, folder: str = "") -> Iterator[str]:
    """All files under a folder, relative to it, sorted folder by folder; no hidden ones, no links that lead upwards."""
    here = os.path.join(root, folder)
    with os.scandir(here) as entries:
        entries = sorted((entry.name, entry.is_dir(), entry.is_symlink()) for entry in entries if entry.name[0] != ".")
    for name, is_folder, is_link in entries:
        if not is_folder:
            yield folder + name
        elif not (is_link and _leads_up(here, name)):
            yield from walk(root, f"{folder}{name}/")


def _leads_up(here: str, link: str) -> bool:
    """Whether a link in a folder leads to that folder or one above it, so that following it would never end."""
    return f"{os.path.realpath(here)}/".startswith(f"{os.path.realpath(os.path.join(here, link))}/")
