"""What timm writes beside a file of weights, in config.json: the architecture and how its images were normalised."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path

import timm

from models.encoders.build import encoder_class
from models.encoders.released.common import State, is_sincos
from models.encoders.vit import ViT

HEAD = ("num_classes", "global_pool", "in_chans", "pretrained", "features_only")  # arguments that are not the encoder's


@dataclass
class Told:
    """What a config.json says.

    name, args:    with which `build_encoder` makes the encoder
    normalization: {"mean", "std"} of its images, if it says so
    """

    name: str
    args: dict = field(default_factory=dict)
    normalization: dict | None = None

    @property
    def plain(self) -> bool:
        """Whether it is a plain transformer; then the file's keys are timm's, whoever has the same."""
        return encoder_class(self.name) is ViT

    def describe(self, state: State) -> tuple[str, dict]:
        """As a family does, for a state in timm's spelling."""
        if not self.plain:
            return self.name, self.args
        fixed = "pos_embed" in state and is_sincos(state["pos_embed"])
        more = {"final_norm": "norm.weight" in state, "position": "sincos" if fixed else "learned"}
        return self.name, self.args | more


def read_config(path: Path) -> Told | None:
    """What timm's config.json beside a file says of it; None if there is none. ValueError if it cannot be used."""
    place = path.with_name("config.json")
    if not place.is_file():
        return None
    try:
        config = json.loads(place.read_text())
    except ValueError as error:
        raise ValueError(f"{place.name} beside it is no JSON: {error}") from error
    if not isinstance(config, dict) or "architecture" not in config:
        return None  # somebody else's, such as transformers'
    name, trained = config["architecture"], config.get("pretrained_cfg") or {}
    if not timm.is_model(name):
        raise ValueError(f'{place.name} beside it says "{name}", which this timm does not have')
    args = {key: value for key, value in (config.get("model_args") or {}).items() if key not in HEAD}
    if "input_size" in trained:
        args = {"img_size": tuple(trained["input_size"][1:])} | args
    told = all(key in trained for key in ("mean", "std"))
    return Told(name, args, {key: list(trained[key]) for key in ("mean", "std")} if told else None)
