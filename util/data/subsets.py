import numpy as np

from util.data.dice import hash_names
from util.data.mnist import CLASSES, Pixels
from util.data.names import Names
from util.data.sources import Source
from util.errors import UserError

HELD_OUT, AT_MOST = 0.01, 5000


def hold_out(names: Names) -> tuple[np.ndarray, np.ndarray]:
    """Part images into rows to train on and rows to validate, by their names alone."""
    if len(names) < 2:
        raise UserError(f"{len(names)} image was found: at least 2 are needed, one of them to be held out")
    held = np.zeros(len(names), bool)
    count = max(1, min(AT_MOST, int(HELD_OUT * len(names))))
    held[np.argsort(hash_names(names, "hold out"), kind="stable")[:count]] = True
    return np.flatnonzero(~held), np.flatnonzero(held)


def read_classes(source: Source | Pixels) -> list[str]:
    if isinstance(source, Pixels):
        count = int(source.labels.max()) + 1
        return CLASSES if count == len(CLASSES) else [str(label) for label in range(count)]
    names = set()
    for i in range(len(source.names)):
        if source.tag(i) is None:
            raise UserError(
                f"{source.path(i)} has no label: labels come from the first folder level, the second column of a list, "
                "or the .cls or .json members of tar shards"
            )
        names.add(source.tag(i))
    return sorted(names, key=int) if all(name.isdecimal() for name in names) else sorted(names)


def read_labels(source: Source | Pixels, classes: list[str]) -> np.ndarray:
    """(n,) int64 places in `classes`; folders 0, 1, ... may stand for the places themselves (ImageNetV2)."""
    if isinstance(source, Pixels):
        return source.labels
    places = {name: place for place, name in enumerate(classes)}
    everything = range(len(source.names))
    found = np.fromiter((places.get(source.tag(i), -1) for i in everything), np.int64, len(everything))
    if (found >= 0).all():
        return found
    tags = [source.tag(i) for i in everything]
    unknown = sorted({str(tag) for tag in tags} - places.keys())
    if all(str(tag).isdecimal() and int(tag) < len(classes) for tag in tags):
        return np.array([int(tag) for tag in tags])
    lone = next(i for i, tag in enumerate(tags) if str(tag) == unknown[0])
    raise UserError(
        f"{source.path(lone)}: its class {unknown[0]} is not among the {len(classes)} classes of the training images, "
        f"nor are {len(unknown) - 1} others"
    )


def choose(
    names: Names, rows: np.ndarray, labels: np.ndarray | None, fraction: float, budget: int | None, seed: int
) -> np.ndarray:
    """Positions in `rows` of the images to use, sorted: a share, and of those so many labels, even over the classes.

    A smaller choice of the same seed is a subset of a larger one, whatever the order of the names.
    """
    if not 0 < fraction <= 1:
        raise UserError(f"data.fraction is {fraction}: it must be above 0 and at most 1")
    shuffled = np.argsort(hash_names((names[row] for row in rows), f"subset {seed}"), kind="stable")
    shuffled = shuffled[: max(1, round(fraction * len(rows)))]
    if budget is not None:
        there = 0 if labels is None else len(shuffled)
        if not 0 < budget <= there:
            raise UserError(f"data.labels is {budget}, but there are {there} labelled images to choose from")
        turn = np.empty(len(shuffled), np.int64)  # the first of each class, then the second of each, ...
        for label in np.unique(labels):
            of_class = labels[shuffled] == label
            turn[of_class] = np.arange(of_class.sum())
        shuffled = shuffled[np.lexsort((labels[shuffled], turn))[:budget]]
    return np.sort(shuffled)
