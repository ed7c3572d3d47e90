"""What the checkpoints of several repositories have in common."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence

import timm
import torch
from torch import Tensor

from models.encoders.layers import resample, sincos

State = dict[str, Tensor]
DERIVED = ("relative_position_index", "relative_coords_table", "attn_mask")  # buffers: computed, not learned
# what a checkpoint holds beside its encoder
OTHERS = ("decoder", "mask_token", "fc_norm.", "head.", "lm_head.", "cls_pt_layers.", "head_dist.", "attn_pool.")
OTHERS += ("text.", "buffers.", "pred_head.", "hogs.", "dino_head.", "ibot_head.", "local_cls_norm.")
MIXMIM_GRID = 56  # side of the grid at 224 px, from which MixMIM's fine-tuning at 384 px stretches its positions
SIZES = {192: "tiny", 384: "small", 768: "base", 1024: "large", 1280: "huge", 1408: "giant", 1536: "giant", 4096: "7b"}
HEADS = {1152: 16, 1280: 16, 1408: 16, 1536: 24, 1664: 16, 1792: 16}  # where a head has not 64 channels


class Unfit(ValueError):
    """A file holds no weights that are of use: why, in words that follow its name."""


def plain(state: State, patch: int, width: int) -> dict:
    """The arguments that all plain transformers share."""
    return {
        "patch_size": patch,
        "embed_dim": width,
        "depth": count(state, r"blocks\.(\d+)\."),
        "mlp_ratio": ratio(len(state["blocks.0.mlp.fc1.weight"]), width),
        "qkv_bias": "blocks.0.attn.qkv.bias" in state,
        # fine-tuning on the mean of the places norms after the mean
        "final_norm": "norm.weight" in state or "norm.bias" in state,
    }


def ratio(hidden: int, width: int) -> float:
    """The number by which a width is multiplied and cut to a whole number for that many hidden channels."""
    exact = hidden / width
    return exact if int(width * exact) == hidden else math.nextafter(exact, math.inf)


def heads_of(width: int) -> int | None:
    """The usual number of attention heads, which no tensor tells; None for a width that is not usual."""
    return HEADS.get(width) or (width // 64 if width % 64 == 0 else None)


def tell_heads(state: State, args: dict) -> list[str]:
    """What `heads_of` assumed, in words."""
    return [f"{args['num_heads']} heads"] if args.get("num_heads") else []


def tokens_and_places(state: State, patch: int) -> dict:
    """The size of image for which a table of positions was learned, and which tokens it is for besides the patches."""
    extra = [state[key].shape[1] for key in ("cls_token", "dist_token", "reg_token") if key in state]
    places = state["pos_embed"].shape[1]
    alone = math.isqrt(places) ** 2 == places and math.isqrt(places - sum(extra)) ** 2 != places - sum(extra)
    n = places if alone else places - sum(extra)
    side = math.isqrt(n)
    args = {"img_size": side * patch} if side**2 == n else {}
    return args | ({"no_embed_class": True} if alone and extra else {})


def renamed(state: State, names: Sequence[tuple[str, str]]) -> State:
    """The same tensors; each pattern that is found in a key is replaced, one after another."""
    new = {}
    for key, value in state.items():
        for old, other in names:
            key = re.sub(old, other, key)
        new[key] = value
    return new


def inside(state: State, prefix: str) -> State:
    """The same tensors, those of a prefix without it, all others as "text."; as it is for an empty prefix."""
    if not prefix:
        return state
    return {key.removeprefix(prefix) if key.startswith(prefix) else f"text.{key}": state[key] for key in state}


def sized(family: str, size: str, patch: int) -> str:
    """timm's name of a plain transformer, or its usual one where there is none of that patch."""
    name = f"{family}_{size}_patch{patch}_224"
    return name if timm.is_model(name) else f"{family}_base_patch16_224"


def count(state: State, pattern: str) -> int:
    """How many different numbers a pattern finds at the beginning of keys."""
    return len({found[1] for key in state if (found := re.match(pattern, key))})


def window_of(table: Tensor, extra: int = 0) -> int:
    """The side of the square window that a table of relative positions is for."""
    return (math.isqrt(len(table) - extra) + 1) // 2


def is_sincos(table: Tensor, side: int | None = None) -> bool:
    """Whether (1, n or 1 + n, C) is MAE's fixed table of a square grid, with zeros for the class token if any.

    side: of the grid that it was made for, if it was stretched since
    """
    across, width = math.isqrt(table.shape[1]), table.shape[2]
    prefix = table.shape[1] - across**2
    if width % 4 or prefix > 1:
        return False
    made = side or across
    fixed = resample(sincos(made, made, width).flatten(0, 1)[None], (made, made), across, across).flatten(0, 1)
    return bool(not table[0, :prefix].any() and torch.allclose(table[0, prefix:].float(), fixed, atol=1e-5))


def named(title: str, keys: list[str]) -> str:
    """ "; missing 2: first.key, second.key", for how many keys there are, and the first three; nothing for none."""
    more = f" and {len(keys) - 3} more" if len(keys) > 3 else ""
    return f"; {title} {len(keys)}: {', '.join(keys[:3])}{more}" if keys else ""
