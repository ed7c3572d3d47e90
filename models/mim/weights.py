"""Pretraining checkpoints of official repositories into methods: the encoder, and the decoder beside it."""

from __future__ import annotations

import re

from einops import rearrange
from torch import Tensor

from models.encoders import released
from models.encoders.released.common import State, is_sincos
from models.encoders.released.convnext import BLOCK, dense, substitute
from models.encoders.released.derived import check_derived
from models.encoders.weights import named
from models.mim.method import MIM
from models.targets.target import HOG, Pixels

TRANSFORMER = (
    (r"^decoder_embed\.", "head.project."),
    (r"^decoder_blocks\.", "head.blocks."),
    (r"^decoder_norm\.", "head.norm."),
    (r"^decoder_pred\.", "head.cells.linear."),
)
BEIT = ((r"^mask_token$", "hide.fill.token"), (r"^lm_head\.", "head.cells.linear."))
HEADS = {  # what lies beside the encoder: official key, ours
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
    "beitv2": (*BEIT, (r"^cls_pt_layers\.", "head.blocks."), (r"^norm\.", "head.norm.")),
}


def method_key(kind: str, key: str, rename: released.Rename) -> str | None:
    """Our key of MIM for an official one of a kind in HEADS; None if it is computed, not learned.

    rename: the encoder's, from `released.source`
    """
    bare = key.removeprefix("encoder.")
    for old, new in HEADS[kind]:
        if re.match(old, bare):
            return re.sub(old, new, bare)
    inner = None if bare == "decoder_pos_embed" else rename(key)
    return None if inner is None else f"hide.encoder.{inner}"


# the numbers that a decoder gives for a place, in the order of each repository: cells p, q; pixels y, x; channels c
CELLS_FIRST, CHANNELS_FIRST = "(p y q x c)", "(c p y q x)"
ORDER = {
    "mae": CELLS_FIRST,
    "milan": CELLS_FIRST,
    "fastmim": CELLS_FIRST,
    "simmim": CHANNELS_FIRST,
    "mixmim": CELLS_FIRST,
    "hiera": CHANNELS_FIRST,
    "convnextv2": CELLS_FIRST,
}


def load_method_state(mim: MIM, kind: str, state: State) -> str:
    """Load the whole official state of a pretraining model of a kind in HEADS; one line on what was read.

    ValueError, naming the first keys, if any tensor of the method is missing or any of the file is left over.
    """
    rename, _ = released.source(kind, state)
    check_derived(state)
    own = {key: value for key, value in mim.state_dict().items() if not key.startswith("target.")}  # which is frozen
    ours, unread, misfits = {}, [], []
    for key, value in state.items():
        new = method_key(kind, key, rename)
        if key == "decoder_pos_embed" and new is None:
            check_positions(value)
        elif new is not None and new not in own:
            unread.append(key)
        elif new is not None:
            value = dense(key, value)
            value = in_our_order(mim, kind, new, value) if ".cells.linear." in new else value
            if value.numel() != own[new].numel():
                misfits.append(f"{key} ({tuple(value.shape)} in the file, {tuple(own[new].shape)} here)")
            else:
                ours[new] = value.reshape(own[new].shape)
    missing = [key for key in own if key not in ours]
    line = f"method {len(ours)}/{len(own)} tensors"
    wrong = named("missing", missing) + named("unread", unread) + named("of other shape", misfits)
    if wrong:
        raise ValueError(f"the weights do not fit: {line}{wrong}")
    mim.load_state_dict(ours, strict=False)
    return line


def in_our_order(mim: MIM, kind: str, key: str, value: Tensor) -> Tensor:
    """The rows of a decoder's last layer in the order of `Cells`: cells, then what the target says of each."""
    cells = mim.get_submodule(key.partition(".linear.")[0])
    split, target, channels = cells.split, mim.target, mim.encoder.in_chans
    if kind not in ORDER or len(value) != split**2 * target.dim:
        return value
    if isinstance(target, HOG):  # FastMIM: all cells of a number, then the next number
        return rearrange(value, "(d p q) ... -> (p q d) ...", p=split, q=split)
    if not isinstance(target, Pixels):
        return value
    sizes = {"p": split, "q": split, "y": target.unit, "x": target.unit, "c": channels}
    return rearrange(value, f"{ORDER[kind]} ... -> (p q y x c) ...", **sizes)


def check_positions(table: Tensor) -> None:
    """ValueError unless a decoder's positions are the fixed ones, which ours computes."""
    if not is_sincos(table):
        raise ValueError(f"decoder_pos_embed {tuple(table.shape)} is not the sine-cosine table that this decoder adds")
