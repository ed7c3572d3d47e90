"""Buffers that are computed, not learned: a checkpoint's must be what the encoder computes."""

from __future__ import annotations

import math

import torch
from timm.models import beit
from timm.models.swin_transformer import get_relative_position_index

from models.encoders.released.common import DERIVED, MIXMIM_GRID, State, is_sincos


def check_derived(state: State) -> None:
    """ValueError if a buffer that the encoder computes anew is not what a checkpoint holds."""
    for key, value in state.items():
        if key.endswith(DERIVED[::2]) and len({*value.shape[-2:]}) != 1:  # else what is computed could be of any size
            same = False
        elif key.endswith("relative_position_index"):
            side = math.isqrt(len(value))  # with a class token, (1 + n, 1 + n), n is a square; without, n itself is
            swins = side**2 == len(value)
            side = side if swins else math.isqrt(len(value) - 1)
            ours = get_relative_position_index(side, side) if swins else beit.gen_relative_position_index((side, side))
            same = value.shape == ours.shape and torch.equal(value, ours)
        elif key.endswith("attn_mask"):
            same = torch.equal(value.float(), shifted_mask(math.isqrt(len(value)), math.isqrt(value.shape[1])))
        elif key.endswith("absolute_pos_embed"):
            same = is_sincos(value) or is_sincos(value, MIXMIM_GRID)
        else:
            continue
        if not same:
            raise ValueError(f"{key} of the checkpoint is not what this encoder computes: it has another geometry")


def shifted_mask(across: int, window: int) -> Tensor:
    """-100 between places of a shifted window that are no neighbours in the image: (across^2, window^2, window^2)."""
    along = torch.zeros(across * window, dtype=torch.long)
    along[-window:] = 1
    along[-(window // 2) :] = 2
    region = (3 * along[:, None] + along).unflatten(0, (across, window)).unflatten(2, (across, window))
    region = region.transpose(1, 2).reshape(across**2, window**2)
    return (region[:, :, None] != region[:, None, :]).float() * -100
