from collections.abc import Sequence

import numpy as np

from util.errors import UserError


class Order:
    """Which images an epoch takes, and in which order: follows from (seed, epoch) alone.

    bounds: (sources + 1,) where the images of each source begin, and where they all end.
    weights: of each source; of an epoch's images it gives its share of all weights, to the image. Each source goes
        through its own images again and again, every time in a new order, and goes on in the next epoch where it was.
        None: an epoch takes every image once.
    """

    def __init__(self, bounds: np.ndarray, weights: Sequence[float] | None = None, seed: int = 0):
        self.bounds, self.weights, self.seed = bounds, weights, seed
        for source, size in enumerate(np.diff(bounds)):
            if weights is not None and not size:
                raise UserError(f"root {source + 1} of data.root has no image to train on, so it can have no weight")

    @property
    def shares(self) -> np.ndarray:
        """(sources,) of an epoch's images."""
        parts = np.diff(self.bounds) if self.weights is None else np.asarray(self.weights, float)
        return parts / parts.sum()

    def describe(self, roots: Sequence[str]) -> list[str]:
        """What an epoch takes from each of several roots, a line each."""
        found = zip(roots, np.diff(self.bounds), self.shares)
        return [
            f"source {number}  {root}: {size:,} images, each {share * self.bounds[-1] / size:.3g} times an epoch, "
            f"{100 * share:.3g} % of what is drawn"
            for number, (root, size, share) in enumerate(found, 1)
            if len(roots) > 1
        ]

    def __call__(self, epoch: int, count: int) -> np.ndarray:
        """(n,) positions in the order of an epoch, at least `count`; beyond all images they are copies of the same."""
        count = max(count, int(self.bounds[-1]))
        shuffle = np.random.default_rng([self.seed, epoch])
        if self.weights is None:
            return shuffle.permutation(count)
        quotas = apportion(count, self.shares)
        order = np.concatenate([self.walk(s, epoch * quota, quota) for s, quota in enumerate(quotas.tolist())])
        shuffle.shuffle(order)
        return order

    def walk(self, source: int, start: int, count: int) -> np.ndarray:
        """`count` positions from `start` on of an endless walk through a source's images, pass after pass."""
        begin, size, parts = int(self.bounds[source]), int(np.diff(self.bounds)[source]), []
        first = start // size
        for number in range(first, -(-(start + count) // size)):
            before = number * size
            order = np.random.default_rng([self.seed, number, source + 1]).permutation(size)
            part = order[max(start - before, 0) : start + count - before]
            parts.append(begin + part + (number - first) * int(self.bounds[-1]))  # a copy for each further pass
        return np.concatenate(parts) if parts else np.empty(0, np.int64)


def apportion(count: int, shares: np.ndarray) -> np.ndarray:
    """Whole numbers in proportion to shares, `count` in all (largest remainders)."""
    whole = np.floor(count * shares).astype(np.int64)
    largest = np.argsort(whole - count * shares, kind="stable")
    whole[largest[: count - whole.sum()]] += 1
    return whole
