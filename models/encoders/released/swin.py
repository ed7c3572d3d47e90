"""SimMIM's and FastMIM's Swins."""

from __future__ import annotations

import math
import re

from torch import Tensor

from models.encoders.released.common import DERIVED, OTHERS, State, count, window_of

SIZES_SWIN = {128: "base", 192: "large"}


def swin(key: str) -> str | None:
    """SimMIM's and FastMIM's Swin; its stages end with the downsampling layer that timm's begin with."""
    key = key.removeprefix("encoder.")
    if key.startswith(OTHERS) or key.endswith(DERIVED):
        return None
    if key.startswith("patch_embed."):
        return key.replace("patch_embed.", "stem.", 1)
    return "backbone." + re.sub(r"^layers\.(\d+)\.downsample", lambda m: f"layers.{int(m[1]) + 1}.downsample", key)


def describe_swin(state: State) -> tuple[str, dict]:
    """As `describe_vit`, for a Swin. Its image size shows in the attention masks, or where windows had to shrink."""
    state = {key.removeprefix("encoder."): value for key, value in state.items()}
    width, _, patch, _ = state["patch_embed.proj.weight"].shape
    stages = range(count(state, r"layers\.(\d+)\."))
    tables = [state[f"layers.{i}.blocks.0.attn.relative_position_bias_table"] for i in stages]
    windows = [window_of(table) for table in tables]
    sides = [math.isqrt(len(m)) * windows[i] * 2**i for i in stages for m in masks(state, i)]
    sides += [w * 2**i for i, w in enumerate(windows) if w < windows[0]]
    args = {
        "patch_size": patch,
        "embed_dim": width,
        "depths": tuple(count(state, rf"layers\.{i}\.blocks\.(\d+)\.") for i in stages),
        "num_heads": tuple(table.shape[1] for table in tables),
        "window_size": windows[0],
        "mlp_ratio": state["layers.0.blocks.0.mlp.fc1.weight"].shape[0] / width,
        "qkv_bias": "layers.0.blocks.0.attn.qkv.bias" in state,
    }
    size = SIZES_SWIN.get(width, "small" if args["depths"][2] > 6 else "tiny")
    return f"swin_{size}_patch4_window7_224", args | ({"img_size": sides[0] * patch} if sides else {})


def masks(state: State, stage: int) -> list[Tensor]:
    """The stored masks of shifted windows of a stage, (windows, places, places)."""
    return [value for key, value in state.items() if re.match(rf"layers\.{stage}\.blocks\.\d+\.attn_mask$", key)]
