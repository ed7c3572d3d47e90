from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch

from util.data.channels import fits
from util.data.decode import Header, peek
from util.data.dice import Dice
from util.data.mnist import Pixels
from util.data.sources import Joined
from util.errors import UserError

LOOKED_AT, MEASURED, MEASURED_PIXELS = 2000, 1000, 200_000_000
THREADS = 8


@dataclass
class Survey:
    """What a data set looks like, from the headers of a sample; sizes are (width, height) in pixels.

    train: images to train on, of `there` training images; the sample is of these, whatever part of them is used
    found: of each root, the channels that its images have, with their number in the sample
    repeated: files left out because another name leads to them, too
    known: images to validate that are trained on as well
    """

    roots: list[str]
    there: int
    train: int
    val: int
    held_out: bool
    looked_at: int
    unreadable: int
    kinds: Counter
    sizes: list[tuple[int, int]]
    found: list[Counter[int]]
    channels: int
    bits: int
    repeated: int = 0
    known: int = 0

    def __str__(self) -> str:
        root = ", ".join(self.roots)
        split = " (held out by a hash of the path)" if self.held_out else ""
        part = "" if self.train == self.there else f" (of {self.there:,})"
        uses = f" to train on{part}, {self.val:,} to validate{split}" if self.val else ""
        sample = "all looked at" if self.looked_at == self.there else f"{self.looked_at:,} looked at"
        bad = f", {self.unreadable:,} unreadable" if self.unreadable else ""
        kinds = ", ".join(f"{kind} {count:,}" for kind, count in self.kinds.most_common(5))
        by_area = sorted(self.sizes, key=lambda size: size[0] * size[1])
        low, middle, high = ("{} x {}".format(*by_area[i]) for i in (0, len(by_area) // 2, -1))
        common, count = Counter(self.sizes).most_common(1)[0]
        often = f"{100 * count / len(self.sizes):.0f} % are {common[0]} x {common[1]}"
        return (
            f"images    {self.train:,}{uses}, from {root}\n"
            f"formats   {kinds} ({sample}{bad}); {self.channels} channel{'s' * (self.channels > 1)}, {self.bits}-bit\n"
            f"sizes     {low} at least, {middle} median, {high} at most (width x height); {often}"
            + "".join(f"\n{line}" for line in self.remarks())
        )

    def remarks(self) -> Iterator[str]:
        """What a user may not have meant, a line each."""
        if self.repeated:
            yield f"repeated  {self.repeated:,} names of files named before were left out: a file counts once"
        if self.known:
            yield (
                f"warning   {self.known:,} of {self.val:,} images to validate are trained on, too: they tell what it "
                "knows by heart, not what it learned"
            )
        usual = [(root, found.most_common(1)[0][0]) for root, found in zip(self.roots, self.found) if found]
        if len({given for _, given in usual}) > 1:
            yield f"channels  {', '.join(f'{given} in {root}' for root, given in usual)}: the run takes {self.channels}"
        for given, count in sorted(sum(self.found, Counter()).items()):
            if not fits(given, self.channels):
                yield (
                    f"warning   {count:,} of {self.looked_at:,} images looked at have {given} channels, which cannot "
                    f"be made {self.channels}: they count as unreadable, so leave them out of data.root"
                )


def make_survey(
    source, rows: np.ndarray, val: int, held_out: bool, roots: list[str], channels: int | None, seed: int
) -> Survey:
    """Look at the headers of at most 2,000 images; channels: 1 if all are gray, 3 if any has colour, else the bands."""
    if isinstance(source, Pixels):
        bands, height, width = source.pixels.shape[1:]
        kinds, sizes = Counter({"idx uint8": len(rows)}), [(width, height)]
        seen = [Counter({bands: len(rows)})]
        return Survey(
            roots, len(rows), len(rows), val, held_out, len(rows), 0, kinds, sizes, seen, channels or bands, 8
        )

    def look(row: int) -> Header | Exception:
        try:
            with source.open(row) as file:
                return peek(file)
        except Exception as error:  # whatever a broken file makes its reader raise
            return error

    sample = rows[pick(len(rows), LOOKED_AT, seed)]
    with ThreadPoolExecutor(THREADS) as pool:
        found = list(pool.map(look, sample.tolist()))
    headers = [header for header in found if isinstance(header, Header)]
    if not headers:
        raise UserError(
            f"none of {len(sample):,} images looked at can be read; {source.path(int(sample[0]))}: {found[0]}"
        )
    bands = Counter(header.channels for header in headers)
    channels = channels or (max(bands) if set(bands) <= {1, 3} else bands.most_common(1)[0][0])
    seen = [Counter() for _ in roots]
    for row, header in zip(sample.tolist(), found):
        if isinstance(header, Header):
            root = source.at(row)[0] if isinstance(source, Joined) else 0
            seen[root][header.channels + (header.alpha and channels == 4)] += 1
    return Survey(
        roots=roots,
        there=len(rows),
        train=len(rows),
        val=val,
        held_out=held_out,
        looked_at=len(sample),
        unreadable=len(found) - len(headers),
        kinds=Counter(header.kind for header in headers),
        sizes=[(header.width, header.height) for header in headers],
        found=seen,
        channels=channels,
        bits=max(header.bits for header in headers),
    )


def measure(images, seed: int = 0) -> tuple[list[float], list[float]]:
    """Mean and standard deviation of each channel, on the scale of [0, 1], over at most 1,000 images.

    Large images are sampled more sparsely (200 million pixels in all), unreadable ones passed over.
    """

    def moments(position: int) -> tuple[np.ndarray, np.ndarray, int] | None:
        try:
            image = images.read(position)
        except Exception:  # a broken file may raise anything; the loader counts and names it
            return None
        pixels = image.numpy().reshape(len(image), -1).astype(np.float32) / (255 if image.dtype == torch.uint8 else 1)
        return pixels.mean(1, dtype=np.float64), (pixels**2).mean(1, dtype=np.float64), pixels.shape[1]

    sample = pick(len(images), MEASURED, seed).tolist()
    done, pixels = [], 0
    with ThreadPoolExecutor(THREADS) as pool:
        for start in range(0, len(sample), 4 * THREADS):
            if pixels > MEASURED_PIXELS:
                break
            done += [found for found in pool.map(moments, sample[start : start + 4 * THREADS]) if found]
            pixels = sum(found[2] for found in done)
    if not done:
        raise UserError(f"none of {len(sample):,} images tried can be read; the first is {images.path(sample[0])}")
    mean = np.mean([found[0] for found in done], axis=0)
    square = np.mean([found[1] for found in done], axis=0)
    std = np.sqrt(np.maximum(square - mean**2, 1e-6))  # constant images must not become infinite
    return mean.tolist(), std.tolist()


def pick(count: int, at_most: int, seed: int) -> np.ndarray:
    """At most so many of `count` positions, shuffled, the same for the same seed."""
    return np.argsort(Dice(seed, 0, np.arange(count)).uniform(1)[:, 0], kind="stable")[:at_most]
