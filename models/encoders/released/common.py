"""What the checkpoints of several repositories have in common."""

from __future__ import annotations

import math
import re

import timm
import torch
from torch import Tensor

from models.encoders.layers import resample, sincos

State = dict[str, Tensor]
DERIVED = ("relative_position_index", "relative_coords_table", "attn_mask")  # buffers: computed, not learned
# what a checkpoint holds beside its encoder
OTHERS = ("decoder", "mask_token", "fc_norm.", "head.", "lm_head.", "cls_pt_layers.")
MIXMIM_GRID = 56  # side of the grid at 224 px, from which MixMIM's fine-tuning at 384 px stretches its positions
SIZES = {192: "tiny", 384: "small", 768: "base", 1024: "large", 1280: "huge"}


class Unfit(ValueError):
    """A file holds no weights that are of use: why, in words that follow its name."""


def plain(state: State, patch: int, width: int) -> dict:
    """The arguments that all plain transformers share."""
    return {
        "patch_size": patch,
        "embed_dim": width,
        "depth": count(state, r"blocks\.(\d+)\."),
        "mlp_ratio": state["blocks.0.mlp.fc1.weight"].shape[0] / width,
        "qkv_bias": "blocks.0.attn.qkv.bias" in state,
        # fine-tuning on the mean of the places norms after the mean
        "final_norm": "norm.weight" in state or "norm.bias" in state,
    }


def sized(family: str, size: str, patch: int) -> str:
    """timm's name of a plain transformer, or its usual one where there is none of that patch."""
    name = f"{family}_{size}_patch{patch}_224"
    return name if timm.is_model(name) else f"{family}_base_patch16_224"


def count(state: State, pattern: str) -> int:
    """How many different numbers a pattern finds at the beginning of keys."""
    return len({found[1] for key in state if (found := re.match(pattern, key))})


def window_of(table: Tensor, extra: int = 0) -> int:
    """The side of the square window that a table of relative positions is for."""
    return (math.isqrt(len(table) - extra) + 1) // 2


def is_sincos(table: Tensor, side: int | None = None) -> bool:
    """Whether (1, n or 1 + n, C) is MAE's fixed table of a square grid, with zeros for the class token if any.

    side: of the grid that it was made for, if it was stretched since
    """
    across, width = math.isqrt(table.shape[1]), table.shape[2]
    prefix = table.shape[1] - across**2
    if width % 4 or prefix > 1:
        return False
    made = side or across
    fixed = resample(sincos(made, made, width).flatten(0, 1)[None], (made, made), across, across).flatten(0, 1)
    return bool(not table[0, :prefix].any() and torch.allclose(table[0, prefix:].float(), fixed, atol=1e-5))
