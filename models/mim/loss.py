"""What counts: how wrong a guess is in each cell, and over which cells the error is averaged."""

from __future__ import annotations

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor

Distance = Callable[[Tensor, Tensor], Tensor]  # guess, truth (B, h, w, D) -> error of each cell (B, h, w)
Average = Callable[[Tensor, Tensor], Tensor]  # error, hidden (B, h, w) -> scalar


def l1(guess: Tensor, truth: Tensor) -> Tensor:
    """Mean absolute error of each cell (SimMIM)."""
    return (guess.float() - truth.float()).abs().mean(-1)


def l2(guess: Tensor, truth: Tensor) -> Tensor:
    """Mean squared error of each cell (MAE)."""
    return (guess.float() - truth.float()).square().mean(-1)


def cosine(guess: Tensor, truth: Tensor) -> Tensor:
    """2 - 2 cos of each cell: the squared distance of unit vectors (MILAN, EVA up to scale and shift)."""
    return 2 - 2 * F.cosine_similarity(guess.float(), truth.float(), dim=-1)


def over_hidden(error: Tensor, hidden: Tensor) -> Tensor:
    """The mean over hidden cells."""
    return (error * hidden).sum() / hidden.sum()


def over_all(error: Tensor, hidden: Tensor) -> Tensor:
    """The mean over all cells, seen and hidden."""
    return error.mean()
