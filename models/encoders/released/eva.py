"""EVA's plain transformers and those with rotary positions: EVA, EVA-02, EVA-CLIP, DINOv3, and timm's of that kind."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from models.encoders.released.common import (
    OTHERS,
    SIZES,
    State,
    count,
    heads_of,
    inside,
    ratio,
    renamed,
    tell_heads,
    tokens_and_places,
)
from models.encoders.released.vit import first

COMPUTED = (r"^(.*(?:\.bias_mask|\.freqs_cos|\.freqs_sin|rope_embed\.periods))$", r"buffers.\1")
EVA = (
    COMPUTED,
    (r"\.attn\.inner_attn_ln\.", ".attn.norm."),
    (r"\.mlp\.ffn_ln\.", ".mlp.norm."),
    (r"\.mlp\.w12\.", ".mlp.fc1."),
    (r"\.mlp\.w1\.", ".mlp.fc1_g."),
    (r"\.mlp\.w2\.", ".mlp.fc1_x."),
    (r"\.mlp\.w3\.", ".mlp.fc2."),
)
SEPARATE = ((r"\.attn\.([qv])_bias$", r".attn.\1_proj.bias"),)  # where queries, keys and values have their own layers
DINOV3 = ((r"^backbone\.", ""), *EVA, (r"^storage_tokens$", "reg_token"), (r"\.ls(\d)\.gamma$", r".gamma_\1"))
PRETRAINED = 16  # places along a side for which EVA-02's angles were made
HEADS = {1280: 20, 4096: 32}  # where these have others than CLIP and MAE


def is_eva(state: State) -> bool:
    """Whether biases of queries and values stand alone, as BEiT's, but positions are learned for places, not pairs."""
    pairs = any("relative_position_bias_table" in key for key in state)
    alone = any(key.endswith((".attn.q_bias", ".attn.q_proj.weight", ".mlp.fc1_g.weight")) for key in state)
    return alone and not pairs and any(key.removeprefix("visual.") == "pos_embed" for key in state)


def is_rotary(state: State) -> bool:
    """Whether a plain transformer has no positions but in its attention and no tables for them, or learned angles."""
    tables = any("pos_embed" in key or "relative_position_bias_table" in key for key in state)
    return "blocks.0.attn.qkv.weight" in state and ("rope.freqs" in state or not tables)


def is_perception(state: State) -> bool:
    """Whether it is timm's Perception Encoder: it norms before its blocks as CLIP does, but pools otherwise or not."""
    pools = "attn_pool.latent" in state or not ("norm.weight" in state or "fc_norm.weight" in state)
    return "norm_pre.weight" in state and pools


def eva(key: str) -> str | None:
    """A transformer of EVA's kind, pretrained or fine-tuned."""
    return None if key.startswith(OTHERS) else f"vit.{key}"


def unify_eva(state: State) -> State:
    """EVA's, EVA-02's or EVA-CLIP's spelling, in timm's."""
    state = renamed(inside(state, "visual." if "visual.pos_embed" in state else ""), EVA)
    return renamed(state, SEPARATE) if "blocks.0.attn.q_proj.weight" in state else state


def dinov3(state: State) -> State:
    """DINOv3's spelling, in timm's, whose biases have none for keys: it is masked in DINOv3."""
    ours, named = {}, renamed(state, DINOV3)
    for key, value in named.items():
        if key.endswith("qkv.bias"):
            queries, keys, values = value.chunk(3)
            if f"buffers.{key}_mask" not in named and keys.any():
                raise ValueError(f"{key} holds biases of keys, which is not what DINOv3 released")
            ours |= {key.replace("qkv.bias", "q_bias"): queries, key.replace("qkv.bias", "v_bias"): values}
        else:
            ours[key] = value
    return ours


def describe_eva(state: State) -> tuple[str, dict]:
    """As `describe_vit`, for transformers of EVA's kind."""
    width, _, patch, _ = state["patch_embed.proj.weight"].shape
    block, separate = "blocks.0.", "blocks.0.attn.q_proj.weight" in state
    gates, hidden = "blocks.0.mlp.fc1_g.weight" in state, state["blocks.0.mlp.fc2.weight"].shape[1]
    packed = not gates and len(state["blocks.0.mlp.fc1.weight"]) == 2 * hidden
    args = {
        "patch_size": patch,
        "embed_dim": width,
        "depth": count(state, r"blocks\.(\d+)\."),
        "num_heads": heads_told(state) or HEADS.get(width) or heads_of(width),
        "mlp_ratio": ratio(hidden, width),
        "qkv_bias": any(f"{block}attn.{key}" in state for key in ("q_bias", "q_proj.bias", "qkv.bias")),
        "qkv_fused": not separate,
        "swiglu_mlp": gates or packed,
        "swiglu_align_to": int(gates),  # apart, for any number of hidden channels
        "scale_mlp": f"{block}mlp.norm.weight" in state,
        "scale_attn_inner": f"{block}attn.norm.weight" in state,
        "init_values": 1e-5 if f"{block}gamma_1" in state else None,
        "class_token": "cls_token" in state,
        "num_reg_tokens": state["reg_token"].shape[1] if "reg_token" in state else 0,
        "final_norm": "norm.weight" in state,
    }
    if "pos_embed" in state:
        args |= tokens_and_places(state, patch)
    if "buffers.rope.freqs_cos" in state:
        places = rotated_places(state["buffers.rope.freqs_cos"], state["buffers.rope.freqs_sin"])
        args |= {"use_rot_pos_emb": True, "ref_feat_shape": (places, places)}
    return eva_name(state, width, patch, gates or packed), args


def describe_perception(state: State) -> tuple[str, dict]:
    """As `describe_vit`, for timm's Perception Encoder, whose angles are for the grid that it learned."""
    _, args = describe_eva(state)
    places = args["img_size"] // args["patch_size"]
    name = "vit_pe_core_base_patch16_224" if args["class_token"] else "vit_pe_core_gigantic_patch14_448"
    heads = 16 if args["embed_dim"] == 1536 else args["num_heads"]
    return name, args | {"ref_feat_shape": (places, places), "num_heads": heads}


def eva_name(state: State, width: int, patch: int, gates: bool) -> str:
    """timm's name of such a transformer, which stands for epsilons and the kind of its rotary positions."""
    size = SIZES.get(width, "base")
    if "rope.freqs" in state:
        return f"vit_base_patch16_rope_mixed{'_ape' if 'pos_embed' in state else ''}_224"
    if "pos_embed" in state and (gates or "buffers.rope.freqs_cos" in state):
        clip = "_clip" if "blocks.0.attn.norm.weight" in state else ""
        return first(f"eva02_{size}_patch{patch}{clip}_224", f"eva02_base_patch{16 if clip else 14}{clip}_224")
    if "pos_embed" in state:
        return "eva02_enormous_patch14_clip_224" if width == 1792 else "eva_giant_patch14_224"
    if "reg_token" not in state:
        return first(f"vit_{size}_patch16_rope_224", "vit_base_patch16_rope_224")
    if "cls_token" not in state:
        return "vit_base_patch16_rope_reg1_gap_256"
    biased = "_qkvb" if "blocks.0.attn.q_bias" in state else ""
    names = [f"vit_{size}{plus}_patch{patch}_dinov3{biased}" for plus in (["_plus"] if gates else []) + [""]]
    return first(*names, f"vit_base_patch16_dinov3{biased}")


def heads_told(state: State) -> int | None:
    """The number of heads, where a table of rotary angles tells the channels of one."""
    width = len(state["patch_embed.proj.weight"])
    if "buffers.rope.freqs_cos" in state:
        return width // state["buffers.rope.freqs_cos"].shape[1]
    if "buffers.rope_embed.periods" in state:
        return width // (4 * len(state["buffers.rope_embed.periods"]))
    return None


def assumed_of_eva(state: State, args: dict) -> list[str]:
    """In words, what no tensor told. ValueError if rotary angles are meant, but not those that are computed here."""
    notes = [] if heads_told(state) else tell_heads(state, args)
    if "buffers.rope.freqs_cos" in state:
        cos, sin = state["buffers.rope.freqs_cos"].float(), state["buffers.rope.freqs_sin"].float()
        ours = angles(math.isqrt(len(cos)), cos.shape[1], args["ref_feat_shape"][0])
        same = cos.shape == ours.shape and torch.allclose(cos, ours.cos(), atol=1e-2)
        meant = torch.allclose(cos**2 + sin**2, torch.ones(()), atol=1e-2)
    elif "buffers.rope_embed.periods" in state:
        periods = state["buffers.rope_embed.periods"].float()
        ours = 100 ** (torch.arange(len(periods)) / len(periods))
        same, meant = torch.allclose(periods, ours, rtol=1e-2), bool((periods.diff() > 0).all() and periods[0] > 0)
    else:
        return notes
    if meant and not same:
        raise ValueError("its rotary angles are not what this encoder computes: it has another geometry")
    return notes if same else [*notes, "the published rotary angles, in place of the file's"]


def angles(side: int, head: int, places: int) -> Tensor:
    """EVA-02's rotary angles for a square grid, (side * side, head): as if it had `places` places along a side."""
    frequencies = 10000 ** -(torch.arange(head // 4) / (head // 4))
    along = (torch.arange(side)[:, None] / side * places * frequencies).repeat_interleave(2, 1)  # (side, head / 2)
    rows, columns = along[:, None].expand(-1, side, -1), along.expand(side, -1, -1)
    return torch.cat([rows, columns], -1).flatten(0, 1)


def rotated_places(cos: Tensor, sin: Tensor) -> int:
    """For how many places along a side a table of EVA-02's angles was made; 16 where that cannot be read off."""
    side, slowest = math.isqrt(len(cos)), cos.shape[1] // 2 - 1  # its angle is far from a whole turn
    y, x = (table[side % len(table), slowest].item() for table in (sin, cos))
    steps = math.atan2(y, x) * side * 10000 ** (1 - 4 / cos.shape[1])
    turned = abs(math.hypot(x, y) - 1) < 1e-2  # else they are a cosine and a sine of nothing
    return round(steps) if turned and steps > 0.5 else PRETRAINED
