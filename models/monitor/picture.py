"""What a method guesses, to look at: the pictures of a reconstruction panel."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from einops import repeat
from torch import Tensor, nn

from models.mim.loss import over_hidden
from models.mim.method import MIM
from models.monitor.draw import draw, legend
from models.monitor.health import still
from models.targets.target import Pixels, Target


@dataclass
class Pictures:
    """The columns of a panel from left to right, and what one must know to read them.

    columns: title -> (B, C, H, W) float32 in [0, 1] on the CPU; NaN where hidden. Glyphs are (B, 1, n H, n W)
    caption: sentences
    """

    columns: dict[str, Tensor]
    caption: str


@torch.no_grad()
def reconstruct(
    mim: nn.Module, images: Tensor, mean: Sequence[float], std: Sequence[float], seed: int = 0
) -> Pictures | None:
    """What `mim` sees of images (B, C, H, W), what it guesses, and what is true.

    None if its target has no pictures, or if it is no masked image modeling.

    mean, std: per channel, with which the images were normalised; they also set black and white, for data that use a
    small part of their range. Masks depend on `seed` alone; modes and random numbers are afterwards as they were.
    """
    target = mim.target
    if not isinstance(mim, MIM) or draw.dispatch(type(target)) is draw.dispatch(Target):
        return None
    with still(mim, seed):
        mask = mim.masker(images)
        guess = mim.head(mim.hide(images, mask), mask).float()
        truth = target(images)

    black, white = tones(mean, std)

    def photo(x: Tensor) -> Tensor:
        scale, shift = (x.new_tensor(v).view(1, -1, 1, 1) for v in (std, mean))
        return ((x.float() * scale + shift - black) / (white - black)).clamp(0, 1).cpu()

    def show(cells: Tensor) -> Tensor:
        drawn = draw(target, cells, images)
        return photo(drawn) if isinstance(target, Pixels) else drawn.cpu()

    columns = {"masked input": photo(images.masked_fill(mask.at(1)[:, None], math.nan))}
    guess, truth = show(guess), show(truth)
    pixels = truth.shape[-1] // mask.cells.shape[-1]  # of a masked cell, as drawn
    hidden = repeat(mask.cells.cpu(), "b h w -> b 1 (h p) (w q)", p=pixels, q=pixels)
    columns |= {"prediction": guess, "prediction + visible": torch.where(hidden, guess, truth)}
    if not isinstance(target, Pixels):
        columns["truth"] = truth
    columns["original"] = photo(images)
    return Pictures(columns, caption(mim, black, white))


def tones(mean: Sequence[float], std: Sequence[float]) -> tuple[float, float]:
    """What to show as black and white: 0 and 1 for photographs, nearer for data with four deviations inside of that."""
    return max(0.0, min(m - 4 * s for m, s in zip(mean, std))), min(1.0, max(m + 4 * s for m, s in zip(mean, std)))


def caption(mim: MIM, black: float, white: float) -> str:
    """What one must know to read the pictures of a method."""
    told = [legend(mim.target)]
    if mim.average is over_hidden:
        told.append("Only hidden cells were asked for: a prediction means nothing at visible ones.")
    if mim.pairs:
        told.append("Each cell was hidden once: those shown as visible were guessed from the others alone.")
    if (black, white) != (0, 1):
        told.append(f"Brightness is stretched: black is {black:.3g}, white {white:.3g} of the full range.")
    return " ".join(filter(None, told))
