"""How a target's numbers are drawn: pixels as pixels, histograms as strokes, a teacher's features as colours."""

from __future__ import annotations

import math
from functools import singledispatch

import torch
import torch.nn.functional as F
from einops import rearrange, reduce, repeat
from jaxtyping import Float, Shaped
from torch import Tensor

from models.targets.frozen import Codebook, Teacher
from models.targets.target import HOG, LocalPixels, Pixels, Target, mean_and_spread

GLYPH = 12  # least pixels of a cell's glyph, so that it can be read


@singledispatch
def draw(
    target: Target, cells: Shaped[Tensor, "B h w *D"], images: Float[Tensor, "B C H W"]
) -> Float[Tensor, "B _ rows columns"] | None:
    """Cells of a target's numbers as a picture; None if there is none for such a target.

    Numbers that stand for pixels give (B, C, H, W) on the scale of `images`; others signs (B, 1 or 3, n H, n W) in
    [0, 1], for a whole n. Of a target that gives class ids, cells are ids (B, h, w), or scores of all ids as guessed.
    """
    return None


@draw.register
def _(target: Pixels, cells: Tensor, images: Tensor) -> Tensor:
    """Cells that were normalised borrow mean and contrast from `images`."""
    if target.normalize:
        mean, spread = mean_and_spread(Pixels(target.unit, images.shape[1], normalize=False)(images))
        cells = cells * spread + mean
    return rearrange(cells, "b h w (p q c) -> b c (h p) (w q)", p=target.unit, q=target.unit)


@draw.register
def _(target: LocalPixels, cells: Tensor, images: Tensor) -> Tensor:
    mean, spread = target.surroundings(images)
    return draw.dispatch(Pixels)(target, cells, images) * spread + mean


@draw.register
def _(target: HOG, cells: Tensor, images: Tensor) -> Tensor:
    """In each cell, a stroke along each kind of edge.

    A stroke is as bright as its bin's square, averaged over the channels: a cell's strokes share a light of 1, and a
    hesitant guess is dim.
    """
    side = target.unit * math.ceil(GLYPH / target.unit)
    light = reduce(cells.float().clamp_min(0).square(), "b h w (c n) -> b h w n", "mean", n=target.bins)
    drawn = torch.einsum("bhwn,npq->bhpwq", light, edge_strokes(target.bins, side, cells.device))
    return rearrange(drawn, "b h p w q -> b 1 (h p) (w q)").clamp(0, 1)


@draw.register
def _(target: Teacher, cells: Tensor, images: Tensor) -> Tensor:
    """Directions of features along the three principal axes of what is true in these images, as red, green and blue."""
    truth = F.normalize(target(images).flatten(0, 2), dim=1)
    with torch.autocast(images.device.type, enabled=False):
        axes = torch.linalg.eigh(truth.T.cov()).eigenvectors[:, -3:].flip(1)  # (D, 3), the widest first
        low, high = torch.quantile(truth @ axes, truth.new_tensor([0.02, 0.98]), dim=0)
        places = F.normalize(cells.float(), dim=-1) @ axes
    colours = ((places - low) / (high - low).clamp_min(1e-6)).clamp(0, 1)
    return repeat(colours, "b h w c -> b c (h p) (w q)", p=target.unit, q=target.unit)


@draw.register
def _(target: Codebook, cells: Tensor, images: Tensor) -> Tensor:
    """Each id in its colour; a guess in the mean of all colours, weighted by how likely it takes each id to be."""
    colours = palette(target.tokenizer.codes)
    painted = (cells.softmax(-1) @ colours).float() if cells.is_floating_point() else colours[cells]
    painted = painted if painted.ndim == 4 else painted.mean(3)  # of several guesses
    return repeat(painted, "b h w c -> b c (h p) (w q)", p=target.unit, q=target.unit)


def palette(codes: Float[Tensor, "V D"]) -> Float[Tensor, "V 3"]:
    """A colour in [0, 1] for each vector: its rank along each of the three directions in which they spread the most."""
    centred = codes.double() - codes.double().mean(0)
    directions = torch.linalg.eigh(centred.T @ centred).eigenvectors[:, -3:].flip(1)
    ranks = (centred @ directions).argsort(0).argsort(0) / max(len(codes) - 1, 1)
    return F.pad(ranks, (0, 3 - ranks.shape[1]), value=0.5)


def edge_strokes(bins: int, side: int, device: torch.device) -> Float[Tensor, "bins side side"]:
    """A line through a cell's centre for each orientation, along the edge that votes for it: (bins, side, side)."""
    # bin k holds atan2(across, down) in [k, k + 1) / bins * pi; the edge runs at right angles to the gradient
    angle = (torch.arange(bins, device=device) + 0.5) / bins * math.pi
    along_row, along_column = -torch.sin(angle), torch.cos(angle)
    place = torch.arange(side, device=device) - (side - 1) / 2
    row, column = torch.meshgrid(place, place, indexing="ij")
    distance = (row[None] * along_column[:, None, None] - column[None] * along_row[:, None, None]).abs()
    return (1.5 - distance).clamp(0, 1) * (row**2 + column**2 <= (side / 2) ** 2)


def legend(target: Target) -> str:
    """What one must know to read the pictures of a target."""
    if isinstance(target, HOG):
        return "Strokes follow the edges in a cell; dim ones are a hesitant guess."
    if isinstance(target, Teacher):
        return "Like colours are like features: the three main axes of what the teacher sees in these images."
    if isinstance(target, Codebook):
        return "Ids have colours, like ones for like ids; a guess mixes those of the ids it expects: grey if unsure."
    if isinstance(target, LocalPixels):
        return "Mean and contrast around each guessed pixel are borrowed from the original."
    if isinstance(target, Pixels) and target.normalize:
        return "Mean and contrast of each guessed cell are borrowed from the original."
    return ""
