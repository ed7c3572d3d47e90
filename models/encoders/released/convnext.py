"""ConvNeXt V2."""

from __future__ import annotations

import re

from models.encoders.released.common import OTHERS, State, count

SIZES_CONVNEXT = {40: "atto", 48: "femto", 64: "pico", 80: "nano", 96: "tiny", 128: "base", 192: "large", 352: "huge"}
CONVNEXT = (
    (r"^downsample_layers\.0\.", "stem."),
    (r"^downsample_layers\.(\d+)\.", r"stages.\1.downsample."),
    (r"^stages\.(\d+)\.(\d+)\.", r"stages.\1.blocks.\2."),
    (r"\.dwconv\.", ".conv_dw."),
    (r"\.pwconv(\d)\.", r".mlp.fc\1."),
    (r"\.grn\.gamma$", ".mlp.grn.weight"),
    (r"\.grn\.beta$", ".mlp.grn.bias"),
)


def convnext(key: str) -> str | None:
    """ConvNeXt V2, dense."""
    if key.startswith((*OTHERS, "norm.")):
        return None
    for old, new in CONVNEXT:
        key = re.sub(old, new, key)
    return key if key.startswith("stem.") else f"backbone.{key}"


def describe_convnext(state: State) -> tuple[str, dict]:
    """As `describe_vit`, for ConvNeXt V2."""
    stages = range(count(state, r"stages\.(\d+)\."))
    args = {
        "depths": tuple(count(state, rf"stages\.{i}\.(\d+)\.") for i in stages),
        "dims": tuple(state[f"stages.{i}.0.norm.weight"].shape[0] for i in stages),
        "conv_mlp": False,
    }
    return f"convnextv2_{SIZES_CONVNEXT.get(args['dims'][0], 'tiny')}", args
