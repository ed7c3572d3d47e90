import io
import json
import os
import tarfile
from array import array
from collections.abc import Iterator
from typing import BinaryIO

import numpy as np

from util.data.names import EXTENSIONS, Names
from util.errors import UserError


class Shards:
    """Images inside tar files, found by their offsets, so that any of them can be read at any time."""

    def __init__(self, shards: list[str], names: Names, where: np.ndarray, tags: Names | None):
        self.shards, self.names, self.tags = shards, names, tags
        self.where = where  # (n, 3): shard, offset and size in bytes

    def path(self, i: int) -> str:
        return f"{self.shards[self.where[i, 0]]}/{self.names[i].partition('/')[2]}"

    def open(self, i: int) -> BinaryIO:
        shard, offset, size = self.where[i].tolist()
        with open(self.shards[shard], "rb") as file:
            file.seek(offset)
            return io.BytesIO(file.read(size))

    def tag(self, i: int) -> str | None:
        return (self.tags[i] or None) if self.tags else None

    def places(self) -> Iterator[str]:
        """Where each image is, in one spelling however its shard was reached."""
        shards = [os.path.realpath(shard) for shard in self.shards]
        for shard, name in zip(self.where[:, 0], self.names):
            yield f"{shards[shard]}/{name.partition('/')[2]}"

    def take(self, rows: np.ndarray) -> "Shards":
        return Shards(self.shards, self.names.take(rows), self.where[rows], self.tags and self.tags.take(rows))


def scan_shards(shards: list[str], labels: bool) -> Shards:
    """Read the headers of tar files in webdataset's convention: members that differ by extension are one sample."""
    from webdataset.tariterators import base_plus_ext

    names, where, tags = Names(), array("q"), Names()
    for number, shard in enumerate(shards):
        if not os.path.exists(shard):
            raise UserError(f"the shard {shard} does not exist")
        images: dict[str, tarfile.TarInfo] = {}
        labelled: dict[str, str] = {}
        try:
            with tarfile.open(shard, "r:") as tar:
                for member in tar:
                    key, extension = base_plus_ext(member.name)
                    if not member.isreg() or key is None:
                        continue
                    if ("." + extension.lower()).endswith(EXTENSIONS):
                        images.setdefault(key, member)
                    elif labels and extension in ("cls", "json"):
                        labelled[key] = _tag(extension, tar.extractfile(member).read()) or labelled.get(key, "")
        except tarfile.TarError as error:
            raise UserError(f"the shard {shard} cannot be read as an uncompressed tar file: {error}") from error
        for key, member in images.items():
            names.append(f"{os.path.basename(shard)}/{member.name}")
            where.extend((number, member.offset_data, member.size))
            tags.append(labelled.get(key, ""))
    if not names:
        raise UserError(f"0 images in {len(shards)} tar files such as {shards[0]} (looked for {' '.join(EXTENSIONS)})")
    return Shards(shards, names, np.array(where).reshape(-1, 3), tags if tags.text else None)


def _tag(extension: str, data: bytes) -> str:
    if extension == "cls":
        return data.decode().strip()
    content = json.loads(data)
    if not isinstance(content, dict):
        return str(content)
    return next((str(content[key]) for key in ("label", "cls", "class") if key in content), "")
