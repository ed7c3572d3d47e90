"""To timm: a folder that `timm.create_model("local-dir:FOLDER", pretrained=True)` takes.

`timm.create_model(architecture, checkpoint_path="FOLDER/model.safetensors", **model_args)` does as well, with what its
config.json says.
"""

from __future__ import annotations

import inspect
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import timm
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from models.encoders.encoder import Encoder
from models.encoders.grid import Features
from models.encoders.released.timm import CONFIG, after_encoder, our_key, outline, place
from models.export.renamed import module_of

if TYPE_CHECKING:
    from models.export.formats import Facts

FILE = "model.safetensors"
USE = """\
import timm
import torch

model = timm.create_model("local-dir:.", pretrained=True).eval()
mean, std = (torch.tensor(values).view(-1, 1, 1) for values in ({mean}, {std}))
images = torch.rand(1, {channels}, {height}, {width})  # in [0, 1]
features = model.forward_features((images - mean) / std)
"""
OURS = ("taps", "position", "init", "final_norm", "drop_last", "layer_groups", "grn")  # arguments that timm has not
ANY_SIZE = {  # what makes timm's models take other sizes than their own
    **dict.fromkeys(("swin_transformer", "swin_transformer_v2"), {"strict_img_size": False}),
    **dict.fromkeys(("vision_transformer", "deit", "eva"), {"dynamic_img_size": True}),
}
NORMS = (  # what decides where timm norms last
    {},
    {"global_pool": "token"},
    {"global_pool": "avg"},
    {"global_pool": "avg", "use_fc_norm": True},
    {"global_pool": ""},
)


def write(encoder: Encoder, facts: Facts, folder: Path) -> None:
    """Write a folder of model.safetensors and timm's config.json. ValueError if timm has no such model.

    What timm keeps behind the encoder, a norm after the mean over places, starts afresh.
    """
    name, args = architecture(encoder)
    state = to_timm(encoder, name, args)
    default = timm.get_pretrained_cfg(name)
    config = {
        "architecture": name,
        "num_classes": 0,
        "num_features": encoder.dims[-1],
        "model_args": args,
        "pretrained_cfg": {
            "input_size": [encoder.in_chans, *facts.size],
            "mean": list(facts.mean),
            "std": list(facts.std),
            "num_classes": 0,
            "crop_pct": 1.0,
            "interpolation": "bicubic",
            "first_conv": default.first_conv,
            "classifier": default.classifier,
            "license": facts.licence,
        },
    }
    save_file(state, folder / FILE, {"format": "pt"})
    (folder / CONFIG).write_text(json.dumps(config, indent=2) + "\n")


def read(folder: Path, encoder: Encoder) -> Callable[[Tensor], Features]:
    """The folder as timm loads it: images (B, C, H, W), normalised, to the last map and the prefix tokens."""
    config = json.loads((folder / CONFIG).read_text())
    file = folder / FILE
    model = timm.create_model(config["architecture"], checkpoint_path=file, **config["model_args"]).eval()
    return run(model, encoder)


def run(model: nn.Module, encoder: Encoder) -> Callable[[Tensor], Features]:
    """A model of timm as an encoder: its last map, where ours ends, and its prefix tokens."""
    told = {"norm": encoder.normed, "intermediates_only": True}
    if "return_prefix_tokens" in inspect.signature(model.forward_intermediates).parameters:  # a plain transformer
        told |= {"return_prefix_tokens": True, "indices": [encoder.taps[-1]]}

    @torch.no_grad()
    def features(images: Tensor) -> Features:
        last = model.forward_intermediates(images, **told)[-1]
        return Features([last[0]], last[1]) if isinstance(last, tuple) else Features([last])

    return features


def architecture(encoder: Encoder) -> tuple[str, dict]:
    """timm's name for an encoder, and the arguments with which `timm.create_model` makes it, as JSON has them."""
    name, own = encoder.plan["name"], encoder.plan["args"]
    if not timm.is_model(name):
        raise ValueError(f"timm has no {name}; safetensors and onnx take it")
    args = {key: value for key, value in own.items() if key not in OURS and value is not None}
    args |= ANY_SIZE.get(module_of(name), {})
    if own.get("drop_last"):
        args |= shortened(encoder)
    if encoder.in_chans != 3:
        args["in_chans"] = encoder.in_chans
    try:
        args = json.loads(json.dumps(args))
    except TypeError as error:
        raise ValueError(f"the arguments of {name} are no plain values, as timm's config.json wants: {args}") from error
    wanted = set(encoder.state_dict())
    for norms in NORMS:
        told = {"num_classes": 0} | args | norms
        try:
            like = outline(name, **told)
        except (TypeError, AssertionError, IndexError):  # this family has no such choice, or wants all stages
            continue
        stem = place(name, like)
        if {our_key(key, stem) for key in like if not after_encoder(key)} == wanted:
            return name, told
    why = " without its last stages (drop_last)" if own.get("drop_last") else ""
    raise ValueError(f"timm has no {name}{why} with the tensors of this encoder; safetensors and onnx take it")


def shortened(encoder: Encoder) -> dict:
    """The arguments for what drop_last left of an encoder."""
    found = {
        re.match(r"(?:vit|backbone\.(?:stages|layers)\.(\d+))\.blocks\.(\d+)\.", key) for key in encoder.state_dict()
    }
    blocks = {(one[1], one[2]) for one in found if one}
    stages = sorted({stage for stage, _ in blocks if stage is not None}, key=int)
    if not stages:
        return {"depth": len(blocks)}
    return {"depths": [sum(one == stage for one, _ in blocks) for stage in stages]}


def to_timm(encoder: Encoder, name: str, args: dict) -> dict[str, Tensor]:
    """The tensors of an encoder by timm's keys, and as timm makes them what it has beyond."""
    own = encoder.state_dict()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        state = timm.create_model(name, **args).state_dict()
    stem = place(name, state)
    taken = {key: state[key] if after_encoder(key) else own[our_key(key, stem)] for key in state}
    return {key: value.detach().cpu().contiguous().clone() for key, value in taken.items()}
