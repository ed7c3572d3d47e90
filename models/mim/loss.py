"""What counts: how wrong a guess is in each cell, and over which cells the error is averaged."""

from __future__ import annotations

from collections.abc import Callable

import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

Cells = Float[Tensor, "B h w D"]
Errors = Float[Tensor, "B h w"]
Distance = Callable[[Tensor, Tensor], Tensor]  # guess, truth (B, h, w, D) -> error of each cell (B, h, w)
Average = Callable[[Tensor, Tensor], Tensor]  # error, hidden (B, h, w) -> scalar


def l1(guess: Cells, truth: Cells) -> Errors:
    """Mean absolute error of each cell (SimMIM)."""
    return (guess.float() - truth.float()).abs().mean(-1)


def l2(guess: Cells, truth: Cells) -> Errors:
    """Mean squared error of each cell (MAE)."""
    return (guess.float() - truth.float()).square().mean(-1)


def cosine(guess: Cells, truth: Cells) -> Errors:
    """2 - 2 cos of each cell: the squared distance of unit vectors (MILAN, EVA up to scale and shift)."""
    return 2 - 2 * F.cosine_similarity(guess.float(), truth.float(), dim=-1)


def cross_entropy(guess: Float[Tensor, "B h w *guesses V"], ids: Int[Tensor, "B h w"]) -> Errors:
    """Minus the log of each class id's probability (BEiT); the errors of several guesses add up (BEiT v2)."""
    guesses = guess.shape[3:-1].numel()
    each = F.cross_entropy(guess.float().flatten(0, -2), ids.flatten().repeat_interleave(guesses), reduction="none")
    return each.view(*ids.shape, guesses).sum(-1)


def over_hidden(error: Errors, hidden: Bool[Tensor, "B h w"]) -> Float[Tensor, ""]:
    """The mean over hidden cells."""
    return (error * hidden).sum() / hidden.sum()


def over_all(error: Errors, hidden: Bool[Tensor, "B h w"]) -> Float[Tensor, ""]:
    """The mean over all cells, seen and hidden."""
    return error.mean()
