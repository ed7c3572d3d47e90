"""Numbers that a part can be built of; others are refused at once, by the name of the argument."""

from __future__ import annotations


def at_least(low: int, /, **numbers: int) -> None:
    """ValueError for a number below `low`."""
    for name, number in numbers.items():
        if not number >= low:
            raise ValueError(f"{name} is {number}: it has to be at least {low}")


def check_mask(unit: int, ratio: float) -> None:
    """ValueError unless cells of `unit` px can be hidden by this ratio."""
    at_least(1, unit=unit)
    if not 0 < ratio < 1:
        raise ValueError(f"ratio is {ratio}: it has to lie between 0 and 1")


def check_heads(width: int, heads: int) -> None:
    """ValueError unless so many attention heads share `width` channels evenly."""
    at_least(1, width=width, heads=heads)
    if width % heads:
        near = max(n for n in range(1, heads) if width % n == 0)
        raise ValueError(f"heads is {heads}, which does not divide width {width}: {near} would")
