"""What lies beside the encoder in pretraining checkpoints of others: their keys, as a method here calls them."""

from __future__ import annotations

import re

from models.encoders.released.convnext import BLOCK, substitute
from models.encoders.released.layout import Rename

TRANSFORMER = (
    (r"^decoder_embed\.", "head.project."),
    (r"^decoder_blocks\.", "head.blocks."),
    (r"^decoder_norm\.", "head.norm."),
    (r"^decoder_pred\.", "head.cells.linear."),
)
BEIT = ((r"^mask_token$", "hide.fill.token"), (r"^lm_head\.", "head.cells.linear."))
HEADS = {  # by origin: official key, ours
    "mae": ((r"^mask_token$", "head.fill.token"), *TRANSFORMER),
    "milan": ((r"^mask_token$", "head.fill.token"), *TRANSFORMER),
    "simmim": ((r"^mask_token$", "hide.fill.token"), (r"^decoder\.0\.", "head.cells.linear.")),
    "fastmim": ((r"^mask_token$", "hide.fill.token"), *TRANSFORMER),
    "hiera": (
        (r"^mask_token$", "head.fill.token"),
        (r"^multi_scale_fusion_heads\.", "head.fuse."),
        (r"^encoder_norm\.", "head.fused_norm."),
        (r"^decoder_pos_embed$", "head.table"),
        *TRANSFORMER,
    ),
    "convnextv2": (
        (r"^mask_token$", "head.fill.token"),
        (r"^proj\.", "head.project."),
        (r"^pred\.", "head.cells.linear."),
        (r"^decoder\.(\d+\..*)", lambda found: f"head.blocks.{substitute(BLOCK, found[1])}"),
    ),
    "mixmim": ((r"^mask_token$", "head.head.fill.token"), *((old, f"head.{new}") for old, new in TRANSFORMER)),
    "beit": BEIT,
    "eva": BEIT,
    "maskfeat": ((r"^mask_token$", "hide.fill.token"), (r"^pred_head\.projections\.0\.", "head.cells.linear.")),
    "beitv2": (*BEIT, (r"^cls_pt_layers\.", "head.blocks."), (r"^norm\.", "head.norm.")),
}
# the numbers that a decoder gives for a place, in the order of each repository: cells p, q; pixels y, x; channels c
CELLS_FIRST, CHANNELS_FIRST = "(p y q x c)", "(c p y q x)"
ORDER = {
    "mae": CELLS_FIRST,
    "milan": CELLS_FIRST,
    "fastmim": CELLS_FIRST,
    "simmim": CHANNELS_FIRST,
    "mixmim": CELLS_FIRST,
    "maskfeat": CHANNELS_FIRST,
    "hiera": CHANNELS_FIRST,
    "convnextv2": CELLS_FIRST,
}


def method_key(origin: str, key: str, rename: Rename) -> str | None:
    """Our key of a method for one of an origin in HEADS; None if it is computed, not learned.

    rename: the encoder's, of its family
    """
    bare = key.removeprefix("encoder.")
    for old, new in HEADS[origin]:
        if re.match(old, bare):
            return re.sub(old, new, bare)
    inner = None if bare == "decoder_pos_embed" else rename(key)
    return None if inner is None else f"hide.encoder.{inner}"
