"""MAE's and FastMIM's plain transformers."""

from __future__ import annotations

import math

from models.encoders.released.common import OTHERS, SIZES, State, is_sincos, plain, sized


def vit(key: str) -> str | None:
    """MAE's and FastMIM's ViT, pretrained or fine-tuned."""
    return None if key.startswith(OTHERS) else f"vit.{key}"


def describe_vit(state: State) -> tuple[str, dict]:
    """The name and arguments with which `build_encoder` makes the ViT of a state of official keys."""
    width, _, patch, _ = state["patch_embed.proj.weight"].shape
    table = state["pos_embed"][0, 1:]
    side = math.isqrt(len(table))
    args = plain(state, patch, width) | {"img_size": side * patch, "position": "learned"}
    if is_sincos(state["pos_embed"]):
        args["position"] = "sincos"
    heads = 16 if width == 1280 else width // 64 if width % 64 == 0 else None  # no tensor tells
    if width == 768 and "decoder_embed.weight" in state and state["mask_token"].shape[1:] == (3, 1, 1):
        heads = 6  # as FastMIM pretrained it
    return sized("vit", SIZES.get(width, "base"), patch), args | {"num_heads": heads}
