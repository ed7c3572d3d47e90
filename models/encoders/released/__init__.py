"""Checkpoints of others: what wrote them, what their keys are called here, and how to build the encoder they hold.

A file is recognised by its keys. `FAMILIES` are ways to spell an encoder, `ORIGINS` the repositories that used them,
`DIALECTS` libraries with spellings of their own. In each table the special comes before the general.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import partial

from timm.data.constants import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD

from models.encoders.released import hf, mmpretrain
from models.encoders.released.beit import describe_simmim_vit, simmim_vit
from models.encoders.released.capi import describe_capi
from models.encoders.released.common import State, inside, tell_heads
from models.encoders.released.eva import (
    assumed_of_eva,
    describe_eva,
    describe_perception,
    dinov3,
    eva,
    is_eva,
    is_perception,
    is_rotary,
    unify_eva,
)
from models.encoders.released.hiera import describe_hiera, hiera
from models.encoders.released.layout import Dialect, Family, begins, has
from models.encoders.released.mixmim import describe_mixmim, mixmim
from models.encoders.released.spark import (
    describe_spark_convnext,
    describe_spark_resnet,
    spark_convnext,
    spark_resnet,
)
from models.encoders.released.swin import describe_swin, describe_swinv2, swin
from models.encoders.released.timm import TIMM
from models.encoders.released.tower import describe_tower, exact, has_clip, is_larger, quick, tower, unify
from models.encoders.released.vit import assumed_of_deit3, beit3, deit3, describe_vit, dinov2, maskfeat, vit


def changes_width(state: State) -> bool:
    """Whether blocks of a transformer project to other widths, as Hiera's."""
    return any(re.match(r"blocks\.\d+\.proj\.", key) for key in state)


def is_dinov2(state: State) -> bool:
    """Whether a plain transformer has layer scales, and tokens or gates as DINOv2 calls them."""
    own = any(key.endswith(("mask_token", "register_tokens", "mlp.w12.weight")) for key in state)
    return own and begins("blocks.", "backbone.blocks.")(state) and has("ls1.gamma")(state)


def of_images(state: State) -> bool:
    """Whether it is MaskFeat's plain transformer, which pools nothing, that guesses."""
    return has("pred_head.", "pos_embed")(state) and not has("attn.pool_")(state)


FAMILIES = (
    Family("capi", has("residual1.fn.q_proj."), vit, describe_capi),
    Family("resnet", begins("layer1.0.conv1.", "sparse_encoder.sp_cnn.layer1."), spark_resnet, describe_spark_resnet),
    Family("convnext", begins("downsample_layers.", "sparse_encoder."), spark_convnext, describe_spark_convnext),
    Family("mixmim", has("layers.0.blocks.0.", "absolute_pos_embed"), mixmim, describe_mixmim),
    Family("swinv2", has("layers.0.blocks.0.attn.logit_scale"), swin, describe_swinv2),
    Family("swin", begins("layers.0.blocks.0."), swin, describe_swin),
    Family("beit3", begins("beit3."), vit, describe_vit, beit3, tell_heads),
    Family("dinov3", begins("storage_tokens", "backbone.storage_tokens"), eva, describe_eva, dinov3, assumed_of_eva),
    Family("dinov2", is_dinov2, vit, describe_vit, dinov2, tell_heads),
    Family("eva", is_eva, eva, describe_eva, unify_eva, assumed_of_eva),
    Family("perception", is_perception, eva, describe_perception, assumes=tell_heads),
    Family("slip", begins("visual.cls_token"), tower, describe_tower, unify, tell_heads),
    Family("open_clip", is_larger, tower, partial(describe_tower, quick=False), unify, exact),  # LAION's, DataComp's
    Family("clip", has_clip, tower, describe_tower, unify, quick),
    Family("dino", begins("backbone.", "head.mlp.", "head.last_layer."), tower, describe_tower, unify, tell_heads),
    Family("hiera", changes_width, hiera, describe_hiera),
    Family("rotary", is_rotary, eva, describe_eva, assumes=assumed_of_eva),  # timm's DINOv3 among them
    Family("beit", has("blocks.0.", "q_bias"), simmim_vit, describe_simmim_vit),
    Family("maskfeat", of_images, vit, describe_vit, maskfeat, tell_heads),
    Family("deit3", has("blocks.0.gamma_1"), vit, describe_vit, deit3, assumed_of_deit3),
    Family("vit", begins("blocks."), vit, describe_vit, assumes=tell_heads),
)
TOWERS = ("clip", "open_clip", "slip", "dino")  # which come with a projection
DIALECTS: tuple[Dialect, ...] = (
    Dialect("open_clip with a trunk of timm's", begins("visual.trunk."), partial(inside, prefix="visual.trunk.")),
    Dialect("transformers", hf.speaks, hf.official),
    Dialect("mmpretrain", mmpretrain.speaks, mmpretrain.official),
    TIMM,
)


def guesses_on_paint(state: State) -> bool:
    """Whether a decoder has no positions of its own, as FastMIM's, whose encoder saw every cell."""
    return "decoder_embed.weight" in state and "decoder_pos_embed" not in state


def guesses_features(state: State) -> bool:
    """Whether a decoder answers for each patch with something other than its pixels, as MILAN's."""
    stem = state.get("patch_embed.proj.weight")
    return stem is not None and "decoder_pred.weight" in state and len(state["decoder_pred.weight"]) != stem[0].numel()


def is_eva_l(state: State) -> bool:
    """Whether it is EVA's ViT-L, which guesses features as MILAN does, but by MAE's decoder, in patches of 14 px."""
    stem = state.get("patch_embed.proj.weight")
    return guesses_features(state) and stem.shape[2] == 14 and "decoder_blocks.0.attn.qkv.weight" in state


def is_satellite(state: State) -> bool:
    """Whether a DINOv3 of ViT-L's size has a norm for small crops: the one that learned from satellite images does."""
    return "local_cls_norm.weight" in state and state["local_cls_norm.weight"].shape == (1024,)


ORIGINS: tuple[tuple[str, Callable[[State], bool]], ...] = (  # else the family's own name
    ("dinov3_sat493m", is_satellite),
    ("spark", begins("sparse_encoder.")),
    ("convnextv2", begins("downsample_layers.")),
    ("hiera", has("multi_scale_fusion_heads.")),
    ("beitv2", has("cls_pt_layers.")),
    ("beit3", has("blocks.0.attn.norm.", "blocks.0.attn.qkv.")),
    ("perception", is_perception),
    ("siglip", has("attn_pool.latent")),
    ("beit", has("lm_head.", "relative_position_bias_table")),
    ("mixmim", has("layers.0.blocks.0.", "absolute_pos_embed")),
    ("fastmim", guesses_on_paint),
    ("simmim", begins("decoder.0.")),
    ("eva_l", is_eva_l),
    ("milan", guesses_features),
    ("mae", begins("decoder_")),
)
OWNERS = ("encoder.", "backbone.", "module.", "_orig_mod.", "model.")  # before all keys of a file of an encoder alone
IMAGENET = {"mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225]}
CLIP = {"mean": list(OPENAI_CLIP_MEAN), "std": list(OPENAI_CLIP_STD)}
HALF = {"mean": [0.5] * 3, "std": [0.5] * 3}
SATELLITE = {"mean": [0.430, 0.411, 0.296], "std": [0.213, 0.156, 0.143]}
NORMALIZATION = {  # of origins whose images were not ImageNet's way
    **dict.fromkeys(("clip", "open_clip", "eva", "eva_l"), CLIP),
    **dict.fromkeys(("beit", "beit3", "siglip", "perception"), HALF),
    "dinov3_sat493m": SATELLITE,
}
GUESSED = {  # what it may be wrong about, unless a key of ORIGINS told who wrote it
    "beit": "mean and std of 0.5, as BEiT has (beitv2:FILE and simmim:FILE take ImageNet's)",
    "vit": "ImageNet's mean and std",
    "rotary": "ImageNet's mean and std",
}
NAMES = tuple(dict.fromkeys([*(name for name, _ in ORIGINS), *(family.name for family in FAMILIES)]))


def normalization(origin: str, state: State) -> dict:
    """How the images of a checkpoint were normalised; BEiT by mmpretrain as ImageNet, by its authors not."""
    beit_of_mmpretrain = "head.cls_head.weight" in state
    return dict(IMAGENET if beit_of_mmpretrain else NORMALIZATION.get(origin, IMAGENET))


def recognise(state: State, name: str = "") -> tuple[str, Family, State]:
    """Who wrote a state, its family, and the state in the official spelling.

    name: of an origin or a family, where the user knows better than the keys tell

    ValueError if nothing here is spelled so.
    """
    for dialect in DIALECTS:
        if dialect.speaks(state):
            state = dialect.official(state)
    while owner := next((owner for owner in OWNERS if all(key.startswith(owner) for key in state)), None):
        state = {key.removeprefix(owner): value for key, value in state.items()}
    fitting = [family for family in FAMILIES if name == family.name or family.holds(state)]
    family = next((family for family in fitting if family.name == name), fitting[0] if fitting else None)
    if family is None:
        few = ", ".join(list(state)[:3])
        raise ValueError(f"it holds no encoder that is known here; its keys begin with {few}")
    origin = name or next((origin for origin, holds in ORIGINS if holds(state)), family.name)
    return origin, family, state


def guessed(origin: str, state: State) -> list[str]:
    """In words, what is assumed of the images of an origin that no key tells from others."""
    told = {name for name, holds in ORIGINS if holds(state)}
    return [GUESSED[origin]] if origin in GUESSED and origin not in told else []
