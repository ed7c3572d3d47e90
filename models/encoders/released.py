"""Checkpoints of official repositories: what their keys are called here, and how to build the encoder they hold."""

from __future__ import annotations

import math
import re
from collections.abc import Callable

import timm
import torch
from timm.models import beit
from timm.models.swin_transformer import get_relative_position_index
from torch import Tensor

from models.encoders.layers import sincos

State = dict[str, Tensor]
DERIVED = ("relative_position_index", "relative_coords_table", "attn_mask")  # buffers: computed, not learned
OTHERS = ("decoder", "mask_token", "fc_norm.", "head.")  # what a checkpoint holds beside its encoder


def vit(key: str) -> str | None:
    """MAE's and FastMIM's ViT, pretrained or fine-tuned."""
    return None if key.startswith(OTHERS) else f"vit.{key}"


def simmim_vit(key: str) -> str | None:
    """SimMIM's ViT: one relative position table for all blocks, or one for each."""
    key = key.removeprefix("encoder.")
    if key.startswith(OTHERS) or key.endswith(DERIVED):
        return None
    key = re.sub(r"^(?:rel_pos_bias|blocks\.(\d+)\.attn)\.relative_position_bias_table$", table_name, key)
    return key if key.startswith("tables.") else f"vit.{key}"


def table_name(found: re.Match) -> str:
    return f"tables.{found[1] or 0}"


def swin(key: str) -> str | None:
    """SimMIM's and FastMIM's Swin; its stages end with the downsampling layer that timm's begin with."""
    key = key.removeprefix("encoder.")
    if key.startswith(OTHERS) or key.endswith(DERIVED):
        return None
    if key.startswith("patch_embed."):
        return key.replace("patch_embed.", "stem.", 1)
    return "backbone." + re.sub(r"^layers\.(\d+)\.downsample", lambda m: f"layers.{int(m[1]) + 1}.downsample", key)


def convnext(key: str) -> str | None:
    """ConvNeXt V2, dense."""
    if key.startswith((*OTHERS, "norm.")):
        return None
    for old, new in CONVNEXT:
        key = re.sub(old, new, key)
    return key if key.startswith("stem.") else f"backbone.{key}"


CONVNEXT = (
    (r"^downsample_layers\.0\.", "stem."),
    (r"^downsample_layers\.(\d+)\.", r"stages.\1.downsample."),
    (r"^stages\.(\d+)\.(\d+)\.", r"stages.\1.blocks.\2."),
    (r"\.dwconv\.", ".conv_dw."),
    (r"\.pwconv(\d)\.", r".mlp.fc\1."),
    (r"\.grn\.gamma$", ".mlp.grn.weight"),
    (r"\.grn\.beta$", ".mlp.grn.bias"),
)


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


def describe_simmim_vit(state: State) -> tuple[str, dict]:
    """As `describe_vit`, for SimMIM's ViT."""
    state = {key.removeprefix("encoder."): value for key, value in state.items()}
    width, _, patch, _ = state["patch_embed.proj.weight"].shape
    shared = state.get("rel_pos_bias.relative_position_bias_table")
    each = state.get("blocks.0.attn.relative_position_bias_table")
    args = plain(state, patch, width) | {
        "use_abs_pos_emb": "pos_embed" in state,
        "use_rel_pos_bias": each is not None,
        "use_shared_rel_pos_bias": shared is not None,
        "init_values": 0.1 if "blocks.0.gamma_1" in state else None,
        "qkv_bias": "blocks.0.attn.q_bias" in state,
    }
    table = shared if each is None else each
    if table is not None:
        args |= {"img_size": patch * window_of(table, extra=3), "num_heads": table.shape[1]}
    elif "pos_embed" in state:
        args["img_size"] = patch * math.isqrt(state["pos_embed"].shape[1] - 1)
    return sized("beit", SIZES.get(width, "base"), patch), args


def plain(state: State, patch: int, width: int) -> dict:
    """The arguments that all plain transformers share."""
    return {
        "patch_size": patch,
        "embed_dim": width,
        "depth": count(state, r"blocks\.(\d+)\."),
        "mlp_ratio": state["blocks.0.mlp.fc1.weight"].shape[0] / width,
        "qkv_bias": "blocks.0.attn.qkv.bias" in state,
        "final_norm": "norm.weight" in state,  # fine-tuning on the mean of the places norms after the mean
    }


def describe_swin(state: State) -> tuple[str, dict]:
    """As `describe_vit`, for a Swin. Its image size shows in the attention masks, or where windows had to shrink."""
    state = {key.removeprefix("encoder."): value for key, value in state.items()}
    width, _, patch, _ = state["patch_embed.proj.weight"].shape
    stages = range(count(state, r"layers\.(\d+)\."))
    tables = [state[f"layers.{i}.blocks.0.attn.relative_position_bias_table"] for i in stages]
    windows = [window_of(table) for table in tables]
    sides = [math.isqrt(len(m)) * windows[i] * 2**i for i in stages for m in masks(state, i)]
    sides += [w * 2**i for i, w in enumerate(windows) if w < windows[0]]
    args = {
        "patch_size": patch,
        "embed_dim": width,
        "depths": tuple(count(state, rf"layers\.{i}\.blocks\.(\d+)\.") for i in stages),
        "num_heads": tuple(table.shape[1] for table in tables),
        "window_size": windows[0],
        "mlp_ratio": state["layers.0.blocks.0.mlp.fc1.weight"].shape[0] / width,
        "qkv_bias": "layers.0.blocks.0.attn.qkv.bias" in state,
    }
    size = SIZES_SWIN.get(width, "small" if args["depths"][2] > 6 else "tiny")
    return f"swin_{size}_patch4_window7_224", args | ({"img_size": sides[0] * patch} if sides else {})


def masks(state: State, stage: int) -> list[Tensor]:
    """The stored masks of shifted windows of a stage, (windows, places, places)."""
    return [value for key, value in state.items() if re.match(rf"layers\.{stage}\.blocks\.\d+\.attn_mask$", key)]


def describe_convnext(state: State) -> tuple[str, dict]:
    """As `describe_vit`, for ConvNeXt V2."""
    stages = range(count(state, r"stages\.(\d+)\."))
    args = {
        "depths": tuple(count(state, rf"stages\.{i}\.(\d+)\.") for i in stages),
        "dims": tuple(state[f"stages.{i}.0.norm.weight"].shape[0] for i in stages),
        "conv_mlp": False,
    }
    return f"convnextv2_{SIZES_CONVNEXT.get(args['dims'][0], 'tiny')}", args


SIZES = {192: "tiny", 384: "small", 768: "base", 1024: "large", 1280: "huge"}
SIZES_SWIN = {128: "base", 192: "large"}
SIZES_CONVNEXT = {40: "atto", 48: "femto", 64: "pico", 80: "nano", 96: "tiny", 128: "base", 192: "large", 352: "huge"}


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


def is_sincos(table: Tensor) -> bool:
    """Whether (1, 1 + n, C) is MAE's fixed table of a square grid, with zeros for the class token."""
    side, width = math.isqrt(table.shape[1] - 1), table.shape[2]
    if width % 4 or side**2 != table.shape[1] - 1:
        return False
    fixed = sincos(side, side, width).flatten(0, 1)
    return bool(not table[0, 0].any() and torch.allclose(table[0, 1:].float(), fixed, atol=1e-5))


def check_derived(state: State) -> None:
    """ValueError if a buffer that the encoder computes anew is not what a checkpoint holds."""
    for key, value in state.items():
        if key.endswith("relative_position_index"):
            side = math.isqrt(len(value))  # with a class token, (1 + n, 1 + n), n is a square; without, n itself is
            swins = side**2 == len(value)
            side = side if swins else math.isqrt(len(value) - 1)
            ours = get_relative_position_index(side, side) if swins else beit.gen_relative_position_index((side, side))
            same = value.shape == ours.shape and torch.equal(value, ours)
        elif key.endswith("attn_mask"):
            same = torch.equal(value.float(), shifted_mask(math.isqrt(len(value)), math.isqrt(value.shape[1])))
        else:
            continue
        if not same:
            raise ValueError(f"{key} of the checkpoint is not what this encoder computes: it has another geometry")


def shifted_mask(across: int, window: int) -> Tensor:
    """-100 between places of a shifted window that are no neighbours in the image: (across^2, window^2, window^2)."""
    along = torch.zeros(across * window, dtype=torch.long)
    along[-window:] = 1
    along[-(window // 2) :] = 2
    region = (3 * along[:, None] + along).unflatten(0, (across, window)).unflatten(2, (across, window))
    region = region.transpose(1, 2).reshape(across**2, window**2)
    return (region[:, :, None] != region[:, None, :]).float() * -100


Source = tuple[Callable[[str], str | None], Callable[[State], tuple[str, dict]]]
KINDS = ("mae", "simmim", "fastmim", "convnextv2")


def source(kind: str, state: State) -> Source:
    """The renaming and the description for a checkpoint of a kind, by whether it holds a Swin."""
    if kind == "convnextv2":
        return convnext, describe_convnext
    if any(key.removeprefix("encoder.").startswith("layers.0.") for key in state):
        return swin, describe_swin
    return (simmim_vit, describe_simmim_vit) if kind == "simmim" else (vit, describe_vit)
