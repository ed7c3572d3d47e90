"""The two values that travel between the parts: which cells are hidden, and what an encoder made of the rest."""

from __future__ import annotations

from dataclasses import dataclass

from jaxtyping import Bool, Float, Int
from torch import Tensor


@dataclass(frozen=True)
class Mask:
    """The hidden cells of a batch of images. True means hidden, everywhere in this codebase.

    cells: (B, h, w) bool
    unit:  side of a cell, in pixels
    count: cells hidden in each image; the same for all, so that shapes stay static and nothing waits for the GPU
    """

    cells: Bool[Tensor, "B h w"]
    unit: int
    count: int

    def at(self, unit: int) -> Bool[Tensor, "B rows columns"]:
        """The same mask on a finer grid, (B, H / unit, W / unit) bool. ValueError if `unit` does not divide its own."""
        if self.unit % unit:
            raise ValueError(f"a mask of {self.unit} px cells has no grid of {unit} px: {unit} must divide {self.unit}")
        times = self.unit // unit
        return self.cells.repeat_interleave(times, 1).repeat_interleave(times, 2)

    def visible(self, unit: int) -> Int[Tensor, "B n"]:
        """Flat indices of the visible cells on a finer grid, in raster order: (B, n) int64."""
        hidden = self.at(unit).flatten(1)
        n = hidden.shape[1] - self.count * (self.unit // unit) ** 2
        return hidden.byte().argsort(dim=1, stable=True)[:, :n]

    def __invert__(self) -> Mask:
        return Mask(~self.cells, self.unit, self.cells[0].numel() - self.count)


@dataclass
class Features:
    """What an encoder gives.

    maps:   (B, C_i, H / s_i, W / s_i), fine to coarse; zeros where the encoder skipped hidden cells
    prefix: class and register tokens (B, P, C), if the encoder has any
    """

    maps: list[Float[Tensor, "B _ _ _"]]
    prefix: Float[Tensor, "B P C"] | None = None
