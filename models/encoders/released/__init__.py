"""Checkpoints of official repositories: what their keys are called here, and how to build the encoder they hold."""

from __future__ import annotations

from collections.abc import Callable

from models.encoders.released.beit import describe_simmim_vit, simmim_vit
from models.encoders.released.common import State
from models.encoders.released.convnext import convnext, describe_convnext
from models.encoders.released.swin import describe_swin, swin
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
}


def source(kind: str, state: State) -> tuple[Rename, Describe]:
    """The renaming and the description for a checkpoint of a kind."""
    return SOURCES[kind](state)


def holds_stages(state: State) -> bool:
    """Whether a state is that of a Swin."""
    return any(key.removeprefix("encoder.").startswith("layers.0.") for key in state)
