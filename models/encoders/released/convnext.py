"""ConvNeXt V1 and V2."""

from __future__ import annotations

import math
import re

from einops import rearrange
from torch import Tensor

from models.encoders.released.common import OTHERS, State, count

SIZES_CONVNEXT = {40: "atto", 48: "femto", 64: "pico", 80: "nano", 96: "tiny", 128: "base", 192: "large", 352: "huge"}
BLOCK = (
    (r"\.(ln|linear)\.", "."),  # MinkowskiEngine's wrappers, in sparse pretraining
    (r"\.kernel$", ".weight"),
    (r"\.dwconv\.", ".conv_dw."),
    (r"\.pwconv(\d)\.", r".mlp.fc\1."),
    (r"\.grn\.gamma$", ".mlp.grn.weight"),
    (r"\.grn\.beta$", ".mlp.grn.bias"),
)
CONVNEXT = (
    (r"^downsample_layers\.0\.", "stem."),
    (r"^downsample_layers\.(\d+)\.", r"stages.\1.downsample."),
    (r"^stages\.(\d+)\.(\d+)\.", r"stages.\1.blocks.\2."),
    *BLOCK,
)


def convnext(key: str) -> str | None:
    """ConvNeXt, fine-tuned or pretrained, dense or sparse."""
    key = key.removeprefix("encoder.")
    if key.startswith((*OTHERS, "norm.", "proj.", "pred.")):
        return None
    key = substitute(CONVNEXT, key)
    return key if key.startswith("stem.") else f"backbone.{key}"


def substitute(patterns: tuple[tuple[str, str], ...], key: str) -> str:
    for old, new in patterns:
        key = re.sub(old, new, key)
    return key


def dense(key: str, value: Tensor) -> Tensor:
    """A MinkowskiEngine kernel, its places first and column by column, as the weight of a convolution; others as is."""
    if not key.endswith(".kernel"):
        return value
    order = "(x y) c -> c 1 y x" if value.ndim == 2 else "(x y) i o -> o i y x"
    return rearrange(value, order, x=math.isqrt(len(value)))


def describe_convnext(state: State) -> tuple[str, dict]:
    """As `describe_vit`, for ConvNeXt."""
    state = {key.removeprefix("encoder.").replace(".ln.", "."): value for key, value in state.items()}
    stages = range(count(state, r"stages\.(\d+)\."))
    args = {
        "depths": tuple(count(state, rf"stages\.{i}\.(\d+)\.") for i in stages),
        "dims": tuple(state[f"stages.{i}.0.norm.weight"].shape[0] for i in stages),
        "conv_mlp": False,
    }
    version = "v2" if "stages.0.0.grn.gamma" in state else ""
    return f"convnext{version}_{SIZES_CONVNEXT.get(args['dims'][0], 'tiny')}", args
