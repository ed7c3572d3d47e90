"""Which cells of an image to hide. Every masker is a way to score cells; `hide_top` does the rest."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from models.encoders.grid import Mask
from models.targets.limits import at_least, check_mask


@runtime_checkable
class Masker(Protocol):
    """Draws a mask for a batch of images (B, C, H, W); `unit` is the side of its cells in pixels."""

    unit: int

    def __call__(self, images: Float[Tensor, "B C H W"]) -> Mask: ...


def hide_top(scores: Float[Tensor, "B h w"], ratio: float, unit: int) -> Mask:
    """Hide the cells of highest score, ceil(ratio * cells) in each image: (B, h, w) -> Mask.

    Rounding up gives the published counts: 147 of 196 for MAE, 22 of 36 for SimMIM, 30 of 49 for FCMAE.
    """
    flat = scores.flatten(1)
    count = math.ceil(ratio * flat.shape[1] - 1e-6)  # 0.6 * 5 is 3.0000000000000004 in floating point
    if not 0 < count < flat.shape[1]:
        many = f"{count} of {flat.shape[1]} cells of {unit} px"
        raise ValueError(f"ratio {ratio} hides {many}: it must hide some, not all")
    top = flat.topk(count, dim=1).indices
    cells = torch.zeros_like(flat, dtype=torch.bool).scatter(1, top, True)
    return Mask(cells.view_as(scores), unit, count)


def grid(images: Float[Tensor, "B C H W"], unit: int) -> tuple[int, int, int]:
    """Batch size, cells down, cells across. ValueError, naming the nearest sizes, unless the unit divides both."""
    b, _, *sides = images.shape
    for side in sides:
        if side % unit:
            near = f"{side // unit * unit} or {side // unit * unit + unit}" if side > unit else f"{unit}"
            raise ValueError(f"an image side of {side} px is no whole number of {unit} px cells: use {near} px")
    return b, sides[0] // unit, sides[1] // unit


@dataclass(frozen=True)
class RandomMasker:
    """Every cell is as likely to be hidden as any other (MAE, SimMIM, FastMIM).

    unit: side of a cell in pixels; ratio: hidden part of the cells; shared: one mask for the whole batch (MixMIM)
    """

    unit: int
    ratio: float
    shared: bool = False

    def __post_init__(self) -> None:
        check_mask(self.unit, self.ratio)

    def __call__(self, images: Float[Tensor, "B C H W"]) -> Mask:
        b, h, w = grid(images, self.unit)
        scores = torch.rand(1 if self.shared else b, h, w, device=images.device)
        return hide_top(scores.expand(b, h, w), self.ratio, self.unit)


@dataclass(frozen=True)
class BlockMasker:
    """Rectangles are hidden until the ratio is reached (BEiT, MaskFeat, EVA), all images of a batch at once.

    unit:   side of a cell in pixels
    ratio:  hidden part of the cells, exact (BEiT's own counts vary from image to image)
    least:  cells of the smallest rectangle (BEiT: 16)
    most:   cells of the largest rectangle; as many as may still be hidden, if not given
    aspect: narrowest ratio of a rectangle's sides; the widest is its inverse
    """

    unit: int
    ratio: float
    least: int = 16
    aspect: float = 0.3
    most: int | None = None
    draws: int = 32  # rectangles drawn for each image; enough to reach the ratio nearly always

    def __post_init__(self) -> None:
        check_mask(self.unit, self.ratio)
        at_least(1, least=self.least)

    def __call__(self, images: Float[Tensor, "B C H W"]) -> Mask:
        b, h, w = grid(images, self.unit)
        hidden = torch.zeros(b, h, w, device=images.device)
        room = torch.full((b,), math.ceil(self.ratio * h * w - 1e-6), device=images.device)
        rows, columns = torch.arange(h, device=images.device), torch.arange(w, device=images.device)
        for order in range(self.draws, 0, -1):  # earlier rectangles score higher, so that cutting spares them
            u = torch.rand(4, b, device=images.device)
            area = self.least + u[0] * (room.clamp(max=self.most or h * w) - self.least)
            slant = torch.exp((2 * u[1] - 1) * -math.log(self.aspect))
            tall, wide = (area * slant).sqrt().round(), (area / slant).sqrt().round()
            top, left = (u[2] * (h - tall + 1)).floor(), (u[3] * (w - wide + 1)).floor()
            inside_rows = (rows >= top[:, None]) & (rows < (top + tall)[:, None])  # (B, h)
            inside_columns = (columns >= left[:, None]) & (columns < (left + wide)[:, None])
            inside = inside_rows[:, :, None] & inside_columns[:, None, :] & (hidden == 0)
            new = inside.sum((1, 2))
            fits = (tall < h) & (wide < w) & (new > 0) & (new <= room)
            hidden = torch.where(inside & fits[:, None, None], float(order), hidden)
            room = room - new * fits
        return hide_top(hidden + torch.rand(b, h, w, device=images.device) * 0.5, self.ratio, self.unit)
