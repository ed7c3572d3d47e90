"""SimMIM's and BEiT's plain transformers."""

from __future__ import annotations

import math
import re

from models.encoders.released.common import DERIVED, OTHERS, SIZES, State, plain, sized, window_of


def simmim_vit(key: str) -> str | None:
    """SimMIM's and BEiT's ViT: one relative position table for all blocks, or one for each."""
    key = key.removeprefix("encoder.")
    if key.startswith(OTHERS) or key.endswith(DERIVED):
        return None
    key = re.sub(r"^(?:rel_pos_bias|blocks\.(\d+)\.attn)\.relative_position_bias_table$", table_name, key)
    return key if key.startswith("tables.") else f"vit.{key}"


def table_name(found: re.Match) -> str:
    return f"tables.{found[1] or 0}"


def describe_simmim_vit(state: State) -> tuple[str, dict]:
    """As `describe_vit`, for SimMIM's and BEiT's ViT."""
    state = {key.removeprefix("encoder."): value for key, value in state.items()}
    width, _, patch, _ = state["patch_embed.proj.weight"].shape
    shared = state.get("rel_pos_bias.relative_position_bias_table")
    each = state.get("blocks.0.attn.relative_position_bias_table")
    args = plain(state, patch, width) | {
        "use_abs_pos_emb": "pos_embed" in state,
        "use_rel_pos_bias": each is not None,
        "use_shared_rel_pos_bias": shared is not None,
        "init_values": 0.1 if "blocks.0.gamma_1" in state else 0.0,  # timm takes None for its default
        "qkv_bias": "blocks.0.attn.q_bias" in state,
    }
    table = shared if each is None else each
    if table is not None:
        args |= {"img_size": patch * window_of(table, extra=3), "num_heads": table.shape[1]}
    elif "pos_embed" in state:
        args["img_size"] = patch * math.isqrt(state["pos_embed"].shape[1] - 1)
    return sized("beit", SIZES.get(width, "base"), patch), args
