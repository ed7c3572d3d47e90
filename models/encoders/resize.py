"""Tensors of a file in the shapes that an encoder wants: other grids of positions, other windows, other channels."""

from __future__ import annotations

import math
import re

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from scipy.interpolate import RectBivariateSpline
from timm.layers import resample_abs_pos_embed, resample_patch_embed
from torch import Tensor

from models.encoders.encoder import Encoder
from models.encoders.layers import sincos
from models.encoders.released.common import window_of
from models.encoders.vit import ViT

STEM = ("stem.", "vit.patch_embed.")
POSITIONS = ("vit.pos_embed", "backbone.pos_embed")


def fit(
    encoder: Encoder, key: str, value: Tensor, like: Tensor, grid: tuple[int, int] | None
) -> tuple[Tensor | None, str | None]:
    """A tensor in the shape that the encoder wants and how it got there; None where there is no way.

    grid: the places, down and across, for which the file's positions are, if known
    """
    if key == "vit.pos_embed" and encoder.fixed:
        return fixed_positions(encoder, value, like, grid), None
    if value.shape == like.shape:
        return value, None
    if alike(value, like):
        return value.reshape(like.shape), None
    if key.startswith(STEM) and value.ndim == like.ndim == 4 and len(value) == len(like):
        return fit_stem(encoder, value, like)
    if key in POSITIONS and value.ndim == like.ndim == 3 and value.shape[2] == like.shape[2]:
        old, new, prefix = grids(encoder, value, like, grid)
        if old is not None:
            table = resample_abs_pos_embed(value.float(), new, old, prefix, antialias=False)
            return table, f"positions {size(old)} to {size(new)}"
    if re.search(r"\.rel_pos_[hw]$", key) and value.shape[1] == like.shape[1]:
        return stretch(value, len(like)), f"positions of {len(value)} to {len(like)} offsets"
    if re.search(r"(relative_position_bias_table|^tables\.\d+)$", key) and value.ndim == like.ndim == 2:
        owner = encoder if key.startswith("tables.") else encoder.get_submodule(key.rpartition(".")[0])
        window, extra = encoder.grid if owner is encoder else owner.window_size, 3 if owner is encoder else 0
        square = (window_of(value, extra),) * 2
        old = grid if extra and grid and offsets(grid) == len(value) - extra and min(grid) > 1 else square
        if value.shape[1] == like.shape[1] and offsets(old) == len(value) - extra:
            return resize_table(value, window, extra, old), f"bias tables {size(old)} to {size(window)}"
    return None, None


def alike(value: Tensor, like: Tensor) -> bool:
    """Whether shapes are the same but for sides of 1: a 1x1 convolution is a linear layer."""
    return [n for n in value.shape if n > 1] == [n for n in like.shape if n > 1]


def grids(
    encoder: Encoder, table: Tensor, like: Tensor, grid: tuple[int, int] | None
) -> tuple[tuple[int, int] | None, tuple[int, int], int]:
    """The grid of a table of positions, None if it cannot be told; that of the encoder; and the prefix tokens in it."""
    new = encoder.grid
    prefix = like.shape[1] - math.prod(new)
    n = table.shape[1] - prefix
    side, scale = math.isqrt(n), math.sqrt(n / math.prod(new))
    for old in (grid or (0, 0), (side, side), (round(new[0] * scale), round(new[1] * scale))):
        if math.prod(old) == n:
            return old, new, prefix
    return None, new, prefix


def fixed_positions(encoder: ViT, value: Tensor, like: Tensor, grid: tuple[int, int] | None) -> Tensor | None:
    """The encoder's own sine-cosine table, if that is what the file holds, for whichever grid."""
    old, _, prefix = grids(encoder, value, like, grid)
    if old is None or value.shape[::2] != (1, encoder.width):
        return None
    table = sincos(*old, encoder.width).flatten(0, 1)
    if value[:, :prefix].any() or not torch.allclose(value[0, prefix:].float(), table, atol=1e-5):
        raise ValueError('the file\'s positions are not the sine-cosine ones: use position="learned"')
    return like


def fit_stem(encoder: Encoder, value: Tensor, like: Tensor) -> tuple[Tensor | None, str | None]:
    """A stem's weights for patches of another size, as FlexiViT resizes them, and for another number of channels."""
    how, sides = [], (value.shape[2:], like.shape[2:])
    if sides[0] != sides[1]:
        if encoder.overlaps:
            return None, None
        value = resample_patch_embed(value, list(sides[1]))
        how.append("patches of {} to {} px".format(*(side[0] if side[0] == side[1] else size(side) for side in sides)))
    if value.shape[1] != like.shape[1]:
        how.append(f"{value.shape[1]} to {like.shape[1]} channels")
        value = adapt_channels(value, like.shape[1])
    return value, ", ".join(how)


def adapt_channels(weight: Tensor, in_chans: int) -> Tensor:
    """A stem's weights (D, I, p, p) for another number of channels: repeated, or summed for one; their sum stays."""
    if in_chans == 1:
        return weight.sum(1, keepdim=True)
    old = weight.shape[1]
    return weight[:, [i % old for i in range(in_chans)]] * (old / in_chans)


def offsets(window: tuple[int, int]) -> int:
    """How many relative positions there are in a window."""
    return math.prod(2 * side - 1 for side in window)


def resize_table(table: Tensor, window: tuple[int, int], extra: int = 0, old: tuple[int, int] | None = None) -> Tensor:
    """A table of relative positions, (n + extra, heads), for another window; its last `extra` rows stay.

    Offsets of the old window are spread over the new one in geometric progression, so that near places keep their
    distances, and a bicubic spline through them is read off (BEiT, SimMIM). `old` is the window that it is for, a
    square unless told.
    """
    places, rest = table[: len(table) - extra], table[len(table) - extra :]
    sides = [2 * side - 1 for side in window]
    n, m = [2 * side - 1 for side in old or (window_of(places),) * 2]
    if n == m == 1:
        return torch.cat([places.expand(math.prod(sides), -1), rest])
    to = [np.arange(side) - side // 2 for side in sides]
    rows, columns = spread(n, sides[0]), spread(m, sides[1])
    heads, degree = places.double().T.reshape(-1, n, m).numpy(), {"kx": min(3, n - 1), "ky": min(3, m - 1)}
    read = [RectBivariateSpline(rows, columns, head, **degree)(*to).ravel() for head in heads]
    return torch.cat([torch.from_numpy(np.stack(read, -1)).to(table.dtype), rest])


def stretch(table: Tensor, length: int) -> Tensor:
    """A table of relative positions along a side, (n, C) -> (length, C), interpolated as MViTv2 does."""
    if len(table) == length:
        return table
    return rearrange(F.interpolate(rearrange(table, "n c -> 1 c n"), length, mode="linear"), "1 c n -> n c")


def spread(source: int, target: int) -> np.ndarray:
    """`source` offsets around 0 whose steps grow by a factor, found by bisection, so that they reach `target` // 2."""
    low, high = 1.01, 1.5
    while high - low > 1e-6:
        factor = (low + high) / 2
        if (factor ** np.arange(source // 2)).sum() > target // 2:
            high = factor
        else:
            low = factor
    steps = np.cumsum(factor ** np.arange(source // 2))
    return np.concatenate([-steps[::-1], [0.0], steps])


def size(sides: tuple[int, int]) -> str:
    return "x".join(map(str, sides))
