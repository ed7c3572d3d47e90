"""Hiera."""

from __future__ import annotations

import math

from models.encoders.released.common import OTHERS, State, count

SIZES_HIERA = {(96, 12): "tiny", (96, 16): "small", (96, 24): "base", (112, 24): "base_plus", (144, 48): "large"}
HEADS_HIERA = {96: 1, 112: 2, 144: 2, 256: 4}  # of the first stage, by width: no tensor tells


def hiera(key: str) -> str | None:
    """Hiera, pretrained or fine-tuned; its last norm comes after the encoder, in either."""
    if key.startswith((*OTHERS, "norm.", "encoder_norm.", "multi_scale_fusion_heads.")):
        return None
    return key.replace("patch_embed.", "stem.", 1) if key.startswith("patch_embed.") else f"backbone.{key}"


def describe_hiera(state: State) -> tuple[str, dict]:
    """As `describe_vit`, for Hiera. How many stages pool shows in the decoder; without one, it is a classifier."""
    width, places = len(state["patch_embed.proj.weight"]), state["pos_embed"].shape[1]
    depth = count(state, r"blocks\.(\d+)\.")
    starts = [0, *(i for i in range(depth) if f"blocks.{i}.proj.weight" in state), depth]
    args = {
        "embed_dim": width,
        "num_heads": HEADS_HIERA.get(width),
        "stages": tuple(end - start for start, end in zip(starts, starts[1:])),
        "mlp_ratio": len(state["blocks.0.mlp.fc1.weight"]) / width,
        "q_pool": 3,
    }
    if "decoder_pos_embed" in state:
        args["q_pool"] = round(math.log(places / state["decoder_pos_embed"].shape[1], 4))
    side = math.isqrt(places)
    square = {"img_size": 4 * side} if side**2 == places else {}
    return f"hiera_{SIZES_HIERA.get((width, depth), 'huge')}_224", args | square
