"""What transformers writes beside its weights: config.json and preprocessor_config.json."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ACTIVATIONS = {"gelu": "gelu", "quick_gelu": "quick_gelu", "gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh"}


@dataclass
class Told:
    """What no tensor tells.

    args:          with which `build_encoder` makes the encoder
    normalization: {"mean", "std"} of its images, None if nobody says
    method:        {"name", "args"} of the method by which it was pretrained, if its decoder is there
    """

    args: dict = field(default_factory=dict)
    normalization: dict | None = None
    method: dict | None = None


def read(folder: Path) -> Told:
    """What the files in a folder tell of the weights there; ValueError if they want what no encoder here has."""
    config, images = (read_json(folder / name) for name in ("config.json", "preprocessor_config.json"))
    config = config.get("vision_config") or config  # of CLIP with its text tower
    kind = config.get("model_type", "")
    must, args = KINDS.get(kind, ({}, lambda config: {}))
    for key, value in must.items():
        if config.get(key, value) != value:
            raise ValueError(f"config.json says {key} {config[key]}: with {kind}, only {value} is known here")
    norm = {"mean": images.get("image_mean"), "std": images.get("image_std")}
    if images.get("do_normalize") is False:
        norm = {"mean": [0.0] * config.get("num_channels", 3), "std": [1.0] * config.get("num_channels", 3)}
    method = METHODS.get((config.get("architectures") or [""])[0])
    return Told(given(args(config)), norm if norm["mean"] else None, method and method(config))


def read_json(path: Path) -> dict:
    try:
        content = json.loads(path.read_text()) if path.is_file() else {}
    except ValueError as error:
        raise ValueError(f"{path.name} beside it is no JSON: {error}") from error
    return content if isinstance(content, dict) else {}


def given(args: dict) -> dict:
    return {key: tuple(value) if isinstance(value, list) else value for key, value in args.items() if value is not None}


def plain(config: dict, act: str | None = "gelu", eps: float = 1e-6) -> dict:
    """Of a plain transformer; `act` and `eps` are what it has in timm, if one can be sure."""
    acts, own = ACTIVATIONS.get(config.get("hidden_act", "gelu")), config.get("layer_norm_eps", 1e-12)
    if acts is None:
        raise ValueError(f"config.json says hidden_act {config['hidden_act']}: there are {', '.join(ACTIVATIONS)}")
    return {
        "num_heads": config.get("num_attention_heads"),
        "img_size": config.get("image_size"),
        "norm_eps": None if own == eps else own,
        "act_layer": None if acts == act else acts,
    }


def vit(config: dict) -> dict:
    return plain(config) | {"no_embed_class": False}  # the class token has a position, however many places there are


def swin(config: dict) -> dict:
    return {"img_size": config.get("image_size"), "window_size": config.get("window_size")}


def swinv2(config: dict) -> dict:
    return swin(config) | {"pretrained_window_sizes": config.get("pretrained_window_sizes")}


def hiera(config: dict) -> dict:
    heads = config.get("num_heads") or [None]
    if heads[0] and heads != [heads[0] * 2**i for i in range(len(heads))]:
        raise ValueError(f"config.json says num_heads {heads}: they must double from stage to stage")
    return {
        "num_heads": heads[0],
        "img_size": config.get("image_size"),
        "q_pool": config.get("num_query_pool"),
        "mask_unit_size": config.get("masked_unit_size"),
        "mask_unit_attn": config.get("masked_unit_attention"),
    }


def mae(config: dict) -> dict:
    """The method of MAE's or Hiera's decoder."""
    size = "decoder_num_hidden_layers", "decoder_hidden_size", "decoder_num_attention_heads"
    name, normalized = "mae", config.get("norm_pix_loss", False)
    if config["model_type"] == "hiera":
        size = "decoder_depth", "decoder_hidden_size", "decoder_num_heads"
        name, normalized = "hiera", config.get("normalize_pixel_loss", True)
    args = dict(zip(("depth", "width", "heads"), map(config.get, size))) | {"ratio": config.get("mask_ratio")}
    return {"name": name, "args": given(args) | {"target": "normalized" if normalized else "pixels"}}


SWIN = {"hidden_act": "gelu", "layer_norm_eps": 1e-5, "use_absolute_embeddings": False}
HIERA = {"hidden_act": "gelu", "layer_norm_eps": 1e-6, "embed_dim_multiplier": 2.0, "patch_size": [7, 7]}
HIERA |= {"patch_stride": [4, 4], "patch_padding": [3, 3], "query_stride": [2, 2]}
KINDS: dict[str, tuple[dict[str, Any], Callable[[dict], dict]]] = {  # by model_type: what it must be, what it tells
    "vit": ({}, vit),
    "vit_mae": ({}, vit),
    "beit": ({}, plain),
    "dinov2": ({}, plain),
    "dinov2_with_registers": ({}, plain),
    "clip_vision_model": ({}, lambda config: plain(config, None, 1e-5)),
    "swin": (SWIN, swin),
    "swinv2": (SWIN, swinv2),
    "convnext": ({"hidden_act": "gelu"}, lambda config: {}),
    "convnextv2": ({"hidden_act": "gelu"}, lambda config: {}),
    "hiera": (HIERA, hiera),
}
METHODS = {"ViTMAEForPreTraining": mae, "HieraForPreTraining": mae}
