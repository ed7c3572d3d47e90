"""Buffers that are computed, not learned: where a checkpoint's are meant, they must be what the encoder computes."""

from __future__ import annotations

import math

import torch
from timm.models import beit
from timm.models.swin_transformer import get_relative_position_index
from torch import Tensor

from models.encoders.released.common import DERIVED, MIXMIM_GRID, State, is_sincos
from models.encoders.released.swin import coordinates, pretrained_window


def check_derived(state: State) -> list[str]:
    """The keys of computed buffers that hold something else, placeholders say; ours are used instead.

    ValueError if one is a buffer of its kind, but of another geometry: then the weights beside it mean other places.
    """
    strange = []
    for key, value in state.items():
        if key.endswith(DERIVED[::2]) and (value.ndim < 2 or value.shape[-1] != value.shape[-2]):
            same, meant = False, True  # what is computed for it could be of any size
        elif key.endswith("relative_position_index"):
            same, meant = compare_index(value)
        elif key.endswith("attn_mask"):
            ours = shifted_mask(math.isqrt(len(value)), math.isqrt(value.shape[1]))
            same = value.shape == ours.shape and torch.equal(value.float(), ours)
            meant = set(value.unique().tolist()) == {-100, 0}
        elif key.endswith("relative_coords_table"):
            ours = coordinates((value.shape[1] + 1) // 2, pretrained_window(value))
            same, meant = torch.allclose(value.float(), ours, atol=1e-3), bool(value.any())
        elif key.endswith("absolute_pos_embed"):
            same, meant = is_sincos(value) or is_sincos(value, MIXMIM_GRID), False
        elif key == "decoder_pos_embed" and "multi_scale_fusion_heads.0.weight" not in state:  # Hiera's is learned
            same, meant = is_sincos(value), False
        else:
            continue
        if meant and not same:
            raise ValueError(f"{key} of the checkpoint is not what this encoder computes: it has another geometry")
        strange += [] if same else [key]
    return strange


def compare_index(value: Tensor) -> tuple[bool, bool]:
    """Whether an index of relative positions (n, n) is ours, and whether it is one at all: all offsets occur in it."""
    side = math.isqrt(len(value))  # with a class token, (1 + n, 1 + n), n is a square; without, n itself is
    if side**2 == len(value):
        ours = get_relative_position_index(side, side)
    else:
        side = math.isqrt(len(value) - 1)
        ours = beit.gen_relative_position_index((side, side))
    meant = torch.equal(value.unique().long(), ours.unique())
    return value.shape == ours.shape and torch.equal(value.long(), ours), meant


def shifted_mask(across: int, window: int) -> Tensor:
    """-100 between places of a shifted window that are no neighbours in the image: (across^2, window^2, window^2)."""
    along = torch.zeros(across * window, dtype=torch.long)
    along[-window:] = 1
    along[-(window // 2) :] = 2
    region = (3 * along[:, None] + along).unflatten(0, (across, window)).unflatten(2, (across, window))
    region = region.transpose(1, 2).reshape(across**2, window**2)
    return (region[:, :, None] != region[:, None, :]).float() * -100
