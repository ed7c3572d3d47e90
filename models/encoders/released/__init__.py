"""Checkpoints of official repositories: what their keys are called here, and how to build the encoder they hold."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from models.encoders.released.beit import describe_simmim_vit, simmim_vit
from models.encoders.released.common import State
from models.encoders.released.convnext import convnext, describe_convnext
from models.encoders.released.hiera import describe_hiera, hiera
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

Rename = Callable[[str], str | None]  # our key for an official one; None if it is not the encoder's
Describe = Callable[[State], tuple[str, dict]]  # the name and arguments with which `build_encoder` makes it
VIT, SIMMIM_VIT, SWIN = (vit, describe_vit), (simmim_vit, describe_simmim_vit), (swin, describe_swin)

SOURCES: dict[str, Callable[[State], tuple[Rename, Describe]]] = {
    "mae": lambda state: SWIN if holds_stages(state) else VIT,
    "simmim": lambda state: SWIN if holds_stages(state) else SIMMIM_VIT,
    "fastmim": lambda state: SWIN if holds_stages(state) else VIT,
    "beit": lambda state: SIMMIM_VIT,
    "beitv2": lambda state: SIMMIM_VIT,
    "convnextv2": lambda state: (convnext, describe_convnext),
    "hiera": lambda state: (hiera, describe_hiera),
    "spark": lambda state: (
        (spark_resnet, describe_spark_resnet)
        if any(key.endswith("layer1.0.conv1.weight") for key in state)
        else (spark_convnext, describe_spark_convnext)
    ),
    "mixmim": lambda state: (mixmim, describe_mixmim),
    "milan": lambda state: VIT,
    "clip": lambda state: (tower, describe_tower),
    "open_clip": lambda state: (tower, partial(describe_tower, quick=False)),  # LAION's and DataComp's: exact GELU
    "slip": lambda state: (tower, describe_tower),
    "dino": lambda state: (tower, describe_tower),
}
TOWERS = ("clip", "open_clip", "slip", "dino")


def source(kind: str, state: State) -> tuple[Rename, Describe]:
    """The renaming and the description for a checkpoint of a kind."""
    return SOURCES[kind](state)


def prepare(kind: str, state: State) -> State:
    """The state in whose keys the renaming of a kind is written; KeyError names what is missing."""
    return unify(state) if kind in TOWERS else state


def holds_stages(state: State) -> bool:
    """Whether a state is that of a Swin."""
    return any(key.removeprefix("encoder.").startswith("layers.0.") for key in state)
