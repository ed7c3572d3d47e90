import hashlib
from collections.abc import Iterable

import numpy as np

GOLDEN = np.uint64(0x9E3779B97F4A7C15)


def mix(bits: np.ndarray) -> np.ndarray:
    """Scramble uint64s, one to one (the finaliser of SplitMix64)."""
    bits = (bits ^ (bits >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    bits = (bits ^ (bits >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return bits ^ (bits >> np.uint64(31))


class Dice:
    """Random numbers that follow from (seed, epoch, index) alone: the same on any worker, rank, resume and machine.

    indices: (B,) of the images; each draws from a stream of its own.
    """

    def __init__(self, seed: int, epoch: int, indices: np.ndarray):
        state = np.zeros(len(indices), np.uint64)
        for part in (seed, epoch, indices):
            state = mix(state + np.asarray(part).astype(np.uint64) + GOLDEN)
        self.state = state[:, None]
        self.drawn = 0

    def uniform(self, count: int) -> np.ndarray:
        """The next `count` numbers of each stream, (B, count) in [0, 1)."""
        turns = np.arange(self.drawn + 1, self.drawn + 1 + count, dtype=np.uint64)
        self.drawn += count
        return (mix(self.state + GOLDEN * turns) >> np.uint64(11)) * 2.0**-53

    def seeds(self) -> list[int]:
        """One seed for another generator from each stream."""
        return (self.uniform(1)[:, 0] * 2**32).astype(np.int64).tolist()


def hash_names(names: Iterable[str], purpose: str) -> np.ndarray:
    """(n,) uint64 that follow from each name and the purpose alone: a shuffle that no order or machine can change."""
    key = purpose.encode()
    digests = (
        hashlib.blake2b(name.encode("utf8", "surrogateescape"), digest_size=8, key=key).digest() for name in names
    )
    return np.fromiter((int.from_bytes(digest, "little") for digest in digests), np.uint64)
