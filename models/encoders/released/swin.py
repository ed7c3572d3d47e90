"""SimMIM's, FastMIM's and supervised Swins, and SwinV2s."""

from __future__ import annotations

import math
import re

import timm
from torch import Tensor

from models.encoders.released.common import DERIVED, OTHERS, State, count, window_of

SIZES_SWIN = {128: "base", 192: "large"}


def swin(key: str) -> str | None:
    """An official Swin or SwinV2; its stages end with the downsampling layer that timm's begin with."""
    key = key.removeprefix("encoder.")
    if key.startswith(OTHERS) or key.endswith(DERIVED):
        return None
    if key.startswith("patch_embed."):
        return key.replace("patch_embed.", "stem.", 1)
    return "backbone." + re.sub(r"^layers\.(\d+)\.downsample", lambda m: f"layers.{int(m[1]) + 1}.downsample", key)


def describe_swin(state: State) -> tuple[str, dict]:
    """As `describe_vit`, for a Swin. Its image size shows in the attention masks, or where windows had to shrink."""
    state = {key.removeprefix("encoder."): value for key, value in state.items()}
    args = sizes(state)
    tables = [state[f"layers.{i}.blocks.0.attn.relative_position_bias_table"] for i in range(len(args["depths"]))]
    windows = [window_of(table) for table in tables]
    args |= {
        "num_heads": tuple(table.shape[1] for table in tables),
        "window_size": windows[0],
        "qkv_bias": "layers.0.blocks.0.attn.qkv.bias" in state,
    }
    return f"swin_{size_name(args)}_patch4_window7_224", args | image_size(state, windows, args["patch_size"])


def describe_swinv2(state: State) -> tuple:
    """As `describe_swin`, for a SwinV2: its windows, and those of pretraining, show in the tables of coordinates."""
    state = {key.removeprefix("encoder."): value for key, value in state.items()}
    args = sizes(state)
    stages = range(len(args["depths"]))
    args |= {
        "num_heads": tuple(len(state[f"layers.{i}.blocks.0.attn.logit_scale"]) for i in stages),
        "qkv_bias": "layers.0.blocks.0.attn.q_bias" in state,
    }
    name = f"swinv2_{size_name(args)}_window8_256"
    name = name if timm.is_model(name) else "swinv2_large_window12_192"
    if "layers.0.blocks.0.attn.relative_coords_table" not in state:
        return name, args, f"no tensor tells the windows: window_size and img_size as in {name}"
    tables = [state[f"layers.{i}.blocks.0.attn.relative_coords_table"] for i in stages]
    windows = [(table.shape[1] + 1) // 2 for table in tables]
    args |= {"window_size": windows[0], "pretrained_window_sizes": tuple(pretrained_window(t) for t in tables)}
    return name, args | image_size(state, windows, args["patch_size"])


def pretrained_window(table: Tensor) -> int:
    """The window on whose scale coordinates (1, 2 window - 1, 2 window - 1, 2) are: log2(1 + 8 offset / side) / 3."""
    window, most = (table.shape[1] + 1) // 2, float(table.flatten()[-1])
    return round(1 + 8 * (window - 1) / (8**most - 1)) if most > 0 else 0


def sizes(state: State) -> dict:
    """What tensors tell of any Swin."""
    width, _, patch, _ = state["patch_embed.proj.weight"].shape
    stages = range(count(state, r"layers\.(\d+)\."))
    return {
        "patch_size": patch,
        "embed_dim": width,
        "depths": tuple(count(state, rf"layers\.{i}\.blocks\.(\d+)\.") for i in stages),
        "mlp_ratio": state["layers.0.blocks.0.mlp.fc1.weight"].shape[0] / width,
    }


def size_name(args: dict) -> str:
    return SIZES_SWIN.get(args["embed_dim"], "small" if max(args["depths"]) > 6 else "tiny")


def image_size(state: State, windows: list[int], patch: int) -> dict:
    """The image size, where it shows: in attention masks, or in windows that had to shrink."""
    sides = [math.isqrt(len(m)) * windows[i] * 2**i for i in range(len(windows)) for m in masks(state, i)]
    sides += [w * 2**i for i, w in enumerate(windows) if w < windows[0]]
    return {"img_size": sides[0] * patch} if sides else {}


def masks(state: State, stage: int) -> list[Tensor]:
    """The stored masks of shifted windows of a stage, (windows, places, places)."""
    return [value for key, value in state.items() if re.match(rf"layers\.{stage}\.blocks\.\d+\.attn_mask$", key)]
