"""MixMIM's Swin without shifted windows."""

from __future__ import annotations

import math

from models.encoders.released.common import MIXMIM_GRID, State, is_sincos, window_of
from models.encoders.released.swin import describe_swin, swin

SIZES_MIXMIM = {128: "base", 192: "large", 352: "huge"}


def mixmim(key: str) -> str | None:
    """MixMIM's encoder, pretrained or fine-tuned; its positions are computed."""
    return None if key == "absolute_pos_embed" else swin(key)


def describe_mixmim(state: State) -> tuple[str, dict]:
    """As `describe_vit`, for MixMIM's encoder, whose image size shows in its positions."""
    _, args = describe_swin(state)
    positions, patch = state["absolute_pos_embed"], args["patch_size"]
    stretched = is_sincos(positions, MIXMIM_GRID) and not is_sincos(positions)
    tables = [state[f"layers.{i}.blocks.0.attn.relative_position_bias_table"] for i in range(len(args["depths"]))]
    args["window_size"] = tuple(window_of(table) for table in tables)
    args["img_size"] = math.isqrt(positions.shape[1]) * patch
    args["pos_size"] = MIXMIM_GRID * patch if stretched else None
    return f"mixmim_{SIZES_MIXMIM.get(args['embed_dim'], 'base')}", args
