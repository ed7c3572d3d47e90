"""Plain transformers whose parts are called as timm's: MAE's, FastMIM's, DeiT's, DINOv2's, BEiT-3's, MaskFeat's."""

from __future__ import annotations

import timm
import torch

from models.encoders.released.common import (
    OTHERS,
    SIZES,
    State,
    heads_of,
    is_sincos,
    plain,
    renamed,
    sized,
    tell_heads,
    tokens_and_places,
)

DEIT3 = ((r"\.gamma_(\d)$", r".ls\1.gamma"),)
DINOV2 = (
    (r"^backbone\.", ""),
    (r"^blocks\.\d+\.(\d+)\.", r"blocks.\1."),  # chunks of blocks, which keep their numbers
    (r"\.mlp\.w12\.", ".mlp.fc1."),
    (r"\.mlp\.w3\.", ".mlp.fc2."),
    (r"^register_tokens$", "reg_token"),
)
BEIT3 = (  # A are the experts for images, B those for text
    (r"^(?!beit3\.|fc_norm\.|head\.)", "text."),
    (r"^beit3\.(.*\.B\.|text_embed\.)", r"text.\1"),
    (r"^beit3\.", ""),
    (r"\.A\.", "."),
    (r"^vision_embed\.proj\.", "patch_embed.proj."),
    (r"^vision_embed\.", ""),
    (r"^encoder\.embed_positions\.weight$", "pos_embed"),
    (r"^encoder\.layer_norm\.", "norm."),
    (r"^encoder\.layers\.", "blocks."),
    (r"\.self_attn_layer_norm\.", ".norm1."),
    (r"\.final_layer_norm\.", ".norm2."),
    (r"\.self_attn\.inner_attn_ln\.", ".attn.norm."),
    (r"\.self_attn\.out_proj\.", ".attn.proj."),
    (r"\.self_attn\.", ".attn."),
    (r"\.ffn\.ffn_layernorm\.", ".mlp.norm."),
    (r"\.ffn\.", ".mlp."),
)
MASKFEAT = ((r"^pred_head\.transforms\.0\.0\.(weight|bias)$", r"norm.\1"),)  # its only norm after the blocks


def vit(key: str) -> str | None:
    """A plain transformer, pretrained or fine-tuned."""
    return None if key.startswith(OTHERS) else f"vit.{key}"


def deit3(state: State) -> State:
    """DeiT III's spelling, in timm's."""
    return renamed(state, DEIT3)


def dinov2(state: State) -> State:
    """DINOv2's spelling, its backbone's alone or within a training's, in timm's; registers have no positions there."""
    state = renamed(state, DINOV2)
    if "reg_token" in state:
        table = state["pos_embed"]
        state |= {"cls_token": state["cls_token"] + table[:, :1], "pos_embed": table[:, 1:]}
    return state


def beit3(state: State) -> State:
    """BEiT-3's spelling, in timm's; positions of images start at the third."""
    state = renamed(state, BEIT3)
    return fuse(state | {"pos_embed": state["pos_embed"][None, 2:]})


def fuse(state: State) -> State:
    """Queries, keys and values that have layers of their own, in one layer."""
    state = dict(state)
    for key in [key for key in state if ".attn.q_proj." in key]:
        parts = [state.pop(key.replace(".q_proj.", f".{part}_proj.")) for part in "qkv"]
        state[key.replace(".q_proj.", ".qkv.")] = torch.cat(parts)
    return state


def assumed_of_deit3(state: State, args: dict) -> list[str]:
    return tell_heads(state, args) + ["DeiT III (timm's vit_*_rope_ape, alike, needs its config.json beside it)"]


def maskfeat(state: State) -> State:
    """MaskFeat's spelling (SlowFast's, for images), in timm's."""
    return renamed(state, MASKFEAT)


def describe_vit(state: State) -> tuple[str, dict]:
    """The name and arguments with which `build_encoder` makes the ViT of a state of official keys."""
    width, _, patch, _ = state["patch_embed.proj.weight"].shape
    args = plain(state, patch, width) | tokens_and_places(state, patch) | {"position": "learned"}
    if is_sincos(state["pos_embed"]):
        args["position"] = "sincos"
    heads = 16 if width == 1536 and "attn_pool.latent" in state else heads_of(width)  # SigLIP's
    if width == 768 and "decoder_embed.weight" in state and state["mask_token"].shape[1:] == (3, 1, 1):
        heads = 6  # as FastMIM pretrained it
    return name_of(state, args), args | parts_of(state) | {"num_heads": heads}


def parts_of(state: State) -> dict:
    """Arguments for what not every ViT has."""
    block = "blocks.0."
    args = {
        "init_values": 1e-5 if f"{block}ls1.gamma" in state else None,
        "qk_norm": f"{block}attn.q_norm.weight" in state,
        "scale_attn_norm": f"{block}attn.norm.weight" in state,
        "scale_mlp_norm": f"{block}mlp.norm.weight" in state,
        "reg_tokens": state["reg_token"].shape[1] if "reg_token" in state else 0,
    }
    absent = {"class_token": "cls_token", "proj_bias": f"{block}attn.proj.bias"}
    args = {key: value for key, value in args.items() if value}
    return args | {key: False for key, tensor in absent.items() if tensor not in state}


def name_of(state: State, args: dict) -> str:
    """timm's name of a ViT, which stands for what cannot be said in arguments: epsilons, and gates in the MLP."""
    size, patch = SIZES.get(args["embed_dim"], "base"), args["patch_size"]
    registers = "_reg4" if "reg_token" in state else ""
    if "blocks.0.attn.norm.weight" in state:
        return first(f"beit3_{size}_patch{patch}_224", "beit3_base_patch16_224")
    if len(state["blocks.0.mlp.fc1.weight"]) == 2 * state["blocks.0.mlp.fc2.weight"].shape[1]:
        return f"vit_giant_patch14{registers}_dinov2"
    if "blocks.0.ls1.gamma" in state and args.get("no_embed_class") and not registers:
        return first(f"deit3_{size}_patch{patch}_224", "deit3_base_patch16_224")
    if "blocks.0.ls1.gamma" in state:
        return first(f"vit_{size}_patch{patch}{registers}_dinov2", f"vit_base_patch14{registers}_dinov2")
    if "dist_token" in state:
        return first(f"deit_{size}_distilled_patch{patch}_224", "deit_base_distilled_patch16_224")
    if not any(key in state for key in ("cls_token", "reg_token", "blocks.0.attn.qkv.bias")):
        return "vit_base_patch16_rpn_224"  # norms after each part of its blocks
    return sized("vit", size, patch)


def first(*names: str) -> str:
    """The first of the names that timm knows."""
    return next(name for name in names if timm.is_model(name))
