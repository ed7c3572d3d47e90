"""A table of features on disk, a row for each image: written batch by batch, and what is done stays done."""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from util import dist
from util.errors import UserError

CHUNK = 64 * 2**20  # bytes of a row group of parquet


class Table:
    """Rows of float32 in a folder, filled by any number of processes that share it.

    to:     "npy", features.npy (N, *shape) with paths.txt beside it; or "parquet", features.parquet with the columns
            "path" and "features", the numbers of a row in the order of its shape, which is in the file's metadata
    paths:  of the images, a row each
    batch:  images at a time; batches are always cut at the same places, so that a run that goes on computes the same
    weights: a number that tells one encoder from another

    UserError if the folder holds rows of other images or weights, or has no room.
    """

    def __init__(self, folder: Path, to: str, paths: Sequence[str], shape: Sequence[int], batch: int, weights: int):
        self.folder, self.to, self.paths, self.shape, self.batch = folder, to, paths, tuple(shape), batch
        self.file, self.rows_file, self.done_file = (
            folder / name for name in (f"features.{to}", "features.writing.npy", "done.npy")
        )
        lines = "".join(path.replace("\n", "\\n") + "\n" for path in paths).encode(errors="surrogateescape")
        told = {"images": len(paths), "shape": list(self.shape), "batch": batch, "weights": weights}
        with dist.main_first():
            if dist.rank() == 0:
                self.claim(told | {"paths": zlib.crc32(lines)}, lines)
        self.complete = self.file.exists()
        if not self.complete:
            self.rows = np.lib.format.open_memmap(self.rows_file, "r+")
            self.done = np.lib.format.open_memmap(self.done_file, "r+")

    def claim(self, told: dict, lines: bytes) -> None:
        """Begin, unless the same rows were begun before."""
        known = self.folder / "features.json"
        if known.exists():
            before = json.loads(known.read_text())
            other = [
                f"{key} ({before.get(key)} there, {told[key]} here)" for key in told if before.get(key) != told[key]
            ]
            if other:
                raise UserError(f"{self.folder} holds features of other images or weights: {', '.join(other)} differ; "
                                "choose another run.folder or remove it")  # fmt: skip
            if self.file.exists() or self.done_file.exists():
                return
        try:
            for path, kind, shape in ((self.rows_file, np.float32, (len(self.paths), *self.shape)),
                                      (self.done_file, np.uint8, (-(-len(self.paths) // self.batch),))):  # fmt: skip
                aside = path.with_suffix(".new")
                np.lib.format.open_memmap(aside, "w+", kind, shape).flush()
                with open(aside, "r+b") as file:  # a full disk is told now, and kills nobody later
                    os.posix_fallocate(file.fileno(), 0, os.path.getsize(aside))
                os.replace(aside, path)
            (self.folder / "paths.txt").write_bytes(lines)
            known.write_text(json.dumps(told, indent=2) + "\n")
        except OSError as error:
            size = 4 * len(self.paths) * int(np.prod(self.shape)) / 1e9
            raise UserError(f"run.folder {self.folder} cannot hold {size:.3g} GB of features: {error}") from error

    def todo(self) -> list[np.ndarray]:
        """The places of the images of each batch that is not done yet; this process's share of them."""
        if self.complete:
            return []
        left = np.flatnonzero(self.done == 0)[dist.rank() :: dist.world()]
        return [np.arange(k * self.batch, min((k + 1) * self.batch, len(self.paths))) for k in left.tolist()]

    def put(self, places: np.ndarray, rows: np.ndarray) -> None:
        """Write the rows of a batch of `todo`, and only then note that it is done."""
        self.rows[places[0] : places[-1] + 1] = rows
        self.rows.flush()
        self.done[places[0] // self.batch] = 1
        self.done.flush()

    def finish(self) -> Path:
        """Put the file in place once all processes are done."""
        dist.any_of(False)  # waits for all
        with dist.main_first():
            if dist.rank() == 0:
                if not self.complete:
                    if self.to == "parquet":
                        aside = self.file.with_suffix(".writing")
                        write_parquet(aside, self.paths, self.rows)
                        os.replace(aside, self.file)
                    else:
                        os.replace(self.rows_file, self.file)
                for path in (self.rows_file, self.done_file):
                    path.unlink(missing_ok=True)
        return self.file


def write_parquet(path: Path, paths: Sequence[str], rows: np.ndarray) -> None:
    """Columns "path" and "features", of which each row is flat; its shape is in the schema's metadata."""
    import pyarrow as pa
    from pyarrow import parquet

    length, shape = int(np.prod(rows.shape[1:])), json.dumps(rows.shape[1:])
    kind = pa.list_(pa.float32(), length)
    schema = pa.schema([("path", pa.string()), ("features", kind)], metadata={"shape": shape})
    step = max(1, CHUNK // (4 * length))
    with parquet.ParquetWriter(path, schema) as file:
        for start in range(0, len(rows), step):
            flat = pa.array(np.ascontiguousarray(rows[start : start + step]).reshape(-1))
            some = [paths[i] for i in range(start, min(start + step, len(rows)))]
            names = [path.encode(errors="surrogateescape").decode(errors="replace") for path in some]
            columns = [pa.array(names, pa.string()), pa.FixedSizeListArray.from_arrays(flat, type=kind)]
            file.write_table(pa.table(columns, schema=schema))
