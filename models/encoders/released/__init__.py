"""Checkpoints of others: what wrote them, what their keys are called here, and how to build the encoder they hold.

A file is recognised by its keys. `FAMILIES` are ways to spell an encoder, `ORIGINS` the repositories that used them,
`DIALECTS` libraries with spellings of their own. In each table the special comes before the general.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import partial

from timm.data.constants import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD

from models.encoders.released.beit import describe_simmim_vit, simmim_vit
from models.encoders.released.common import State
from models.encoders.released.hiera import describe_hiera, hiera
from models.encoders.released.layout import Dialect, Family, begins, has
from models.encoders.released.mixmim import describe_mixmim, mixmim
from models.encoders.released.spark import (
    describe_spark_convnext,
    describe_spark_resnet,
    spark_convnext,
    spark_resnet,
)
from models.encoders.released.swin import describe_swin, swin
from models.encoders.released.tower import describe_tower, tower, unify
from models.encoders.released.vit import describe_vit, vit


def changes_width(state: State) -> bool:
    """Whether blocks of a transformer project to other widths, as Hiera's."""
    return any(re.match(r"blocks\.\d+\.proj\.", key) for key in state)


CLIP_LIKE = begins("visual.", "vision_model.", "norm_pre.", "class_embedding")
FAMILIES = (
    Family("resnet", begins("layer1.0.conv1.", "sparse_encoder.sp_cnn.layer1."), spark_resnet, describe_spark_resnet),
    Family("convnext", begins("downsample_layers.", "sparse_encoder."), spark_convnext, describe_spark_convnext),
    Family("mixmim", has("layers.0.blocks.0.", "absolute_pos_embed"), mixmim, describe_mixmim),
    Family("swin", begins("layers.0.blocks.0."), swin, describe_swin),
    Family("slip", begins("visual.cls_token"), tower, describe_tower, unify),
    Family("clip", CLIP_LIKE, tower, describe_tower, unify),
    Family("open_clip", CLIP_LIKE, tower, partial(describe_tower, quick=False), unify),  # LAION's, DataComp's
    Family("dino", begins("backbone.", "head.mlp.", "head.last_layer."), tower, describe_tower, unify),
    Family("hiera", changes_width, hiera, describe_hiera),
    Family("beit", has("blocks.0.", "q_bias"), simmim_vit, describe_simmim_vit),
    Family("vit", begins("blocks."), vit, describe_vit),
)
TOWERS = ("clip", "open_clip", "slip", "dino")  # which come with a projection
DIALECTS: tuple[Dialect, ...] = ()


def guesses_on_paint(state: State) -> bool:
    """Whether a decoder has no positions of its own, as FastMIM's, whose encoder saw every cell."""
    return "decoder_embed.weight" in state and "decoder_pos_embed" not in state


def guesses_features(state: State) -> bool:
    """Whether a decoder answers for each patch with something other than its pixels, as MILAN's."""
    stem = state.get("patch_embed.proj.weight")
    return stem is not None and "decoder_pred.weight" in state and len(state["decoder_pred.weight"]) != stem[0].numel()


ORIGINS: tuple[tuple[str, Callable[[State], bool]], ...] = (  # else the family's own name
    ("spark", begins("sparse_encoder.")),
    ("convnextv2", begins("downsample_layers.")),
    ("hiera", has("multi_scale_fusion_heads.")),
    ("beitv2", has("cls_pt_layers.")),
    ("beit", has("lm_head.")),
    ("mixmim", has("layers.0.blocks.0.", "absolute_pos_embed")),
    ("fastmim", guesses_on_paint),
    ("simmim", begins("decoder.0.")),
    ("milan", guesses_features),
    ("mae", begins("decoder_")),
)
OWNERS = ("encoder.", "backbone.", "module.", "_orig_mod.", "model.")  # before all keys of a file of an encoder alone
IMAGENET = {"mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225]}
CLIP = {"mean": list(OPENAI_CLIP_MEAN), "std": list(OPENAI_CLIP_STD)}
HALF = {"mean": [0.5] * 3, "std": [0.5] * 3}
NORMALIZATION = {"clip": CLIP, "open_clip": CLIP, "beit": HALF}  # of origins whose images were not ImageNet's way
NAMES = tuple(dict.fromkeys([*(name for name, _ in ORIGINS), *(family.name for family in FAMILIES)]))


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
