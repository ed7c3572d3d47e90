"""To open_clip: an image tower, CLIP's own if the encoder is made like it, otherwise one around a model of timm."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from models.encoders.encoder import Encoder
from models.encoders.grid import Features
from models.encoders.released.common import State
from models.encoders.released.timm import outline
from models.export.renamed import Names, fill, renamed
from models.export.timm import architecture, run, to_timm

if TYPE_CHECKING:
    from models.export.formats import Facts

FILE, CONFIG = "open_clip_model.safetensors", "open_clip_config.json"
PREFIX = "visual."
USE = f"""\
import json

import torch
from open_clip.model import CLIPVisionCfg, _build_vision_tower
from safetensors.torch import load_file

told = json.load(open("{CONFIG}"))["model_cfg"]  # without a text tower
tower = _build_vision_tower(told["embed_dim"], CLIPVisionCfg(**told["vision_cfg"]), told["quick_gelu"]).eval()
tower.load_state_dict({{{{key[{len(PREFIX)}:]: value for key, value in load_file("{FILE}").items()}}}})
mean, std = (torch.tensor(values).view(-1, 1, 1) for values in ({{mean}}, {{std}}))
images = torch.rand(1, {{channels}}, {{height}}, {{width}})  # in [0, 1]
features = tower((images - mean) / std)
"""
NAMES: Names = (
    (r"^vit\.cls_token$", "class_embedding"),
    (r"^vit\.pos_embed$", "positional_embedding"),
    (r"^vit\.patch_embed\.proj\.", "conv1."),
    (r"^vit\.norm_pre\.", "ln_pre."),
    (r"^vit\.norm\.", "ln_post."),
    (r"^vit\.blocks\.", "transformer.resblocks."),
    (r"\.norm(\d)\.", r".ln_\1."),
    (r"\.attn\.qkv\.", ".attn.in_proj_"),
    (r"\.attn\.proj\.", ".attn.out_proj."),
    (r"\.fc1\.", ".c_fc."),
    (r"\.fc2\.", ".c_proj."),
    (r"\.ls(\d)\.", r".ls_\1."),
)
POOLS = ("token", "avg", "")


def write(encoder: Encoder, facts: Facts, folder: Path) -> None:
    """Write the tower's tensors and open_clip's config. ValueError if open_clip cannot build such a tower.

    The projection is the identity: embeddings are what the encoder pools.
    """
    clip = "vit.norm_pre.weight" in encoder.state_dict()
    vision, quick = (clip_config if clip else timm_config)(encoder, facts)
    told = {"embed_dim": encoder.dims[-1], "vision_cfg": vision, "quick_gelu": quick}
    state = clip_state(encoder, build(told)) if clip else timm_state(encoder, vision)
    save_file({PREFIX + key: value.contiguous() for key, value in state.items()}, folder / FILE, {"format": "pt"})
    preprocess = {"mean": list(facts.mean), "std": list(facts.std), "size": list(facts.size)}
    (folder / CONFIG).write_text(json.dumps({"model_cfg": told, "preprocess_cfg": preprocess}, indent=2) + "\n")


def read(folder: Path, encoder: Encoder) -> Callable[[Tensor], Features]:
    """The tower as open_clip builds it: images (B, C, H, W), normalised, to the last map and the prefix tokens."""
    tower = build(json.loads((folder / CONFIG).read_text())["model_cfg"]).eval()
    tower.load_state_dict({key.removeprefix(PREFIX): value for key, value in load_file(folder / FILE).items()})
    if hasattr(tower, "trunk"):
        return run(tower.trunk, encoder)

    @torch.no_grad()
    def features(images: Tensor) -> Features:
        told = {"normalize_intermediates": True, "intermediates_only": True, "output_extra_tokens": True}
        output = tower.forward_intermediates(images, **told)
        return Features([output["image_intermediates"][-1]], output["image_intermediates_prefix"][-1])

    return features


def build(told: dict) -> nn.Module:
    """A tower of open_clip."""
    from open_clip.model import CLIPVisionCfg, _build_vision_tower

    return _build_vision_tower(told["embed_dim"], CLIPVisionCfg(**told["vision_cfg"]), told["quick_gelu"])


def clip_config(encoder: Encoder, facts: Facts) -> tuple[dict, bool]:
    """open_clip's vision_cfg of a plain transformer that norms before its blocks, and whether its GELU is CLIP's."""
    block = encoder.vit.blocks[0]
    vision = {
        "image_size": [side * encoder.patch for side in encoder.grid],
        "layers": len(encoder.vit.blocks),
        "width": encoder.width,
        "head_width": encoder.width // block.attn.num_heads,
        "patch_size": encoder.patch,
        "mlp_ratio": block.mlp.fc1.out_features / encoder.width,
    }
    if hasattr(block.ls1, "gamma"):
        vision["ls_init_value"] = 1.0
    return vision, type(block.mlp.act).__name__ == "QuickGELU"


def clip_state(encoder: Encoder, tower: nn.Module) -> State:
    """The encoder's tensors by the tower's keys."""
    state = renamed(encoder.state_dict(), NAMES) | {"proj": torch.eye(encoder.width)}
    return fill(tower, state, (), "open_clip", encoder.plan["name"])


def timm_config(encoder: Encoder, facts: Facts) -> tuple[dict, bool]:
    """open_clip's vision_cfg around a model of timm, which it builds by name alone: then sizes must be the name's."""
    name, args = architecture(encoder)
    own = {key: tuple(value.shape) for key, value in to_timm(encoder, name, args).items()}
    for pool in POOLS:
        try:
            like = outline(name, num_classes=0, global_pool=pool)
        except (AssertionError, ValueError):  # this model does not pool so
            continue
        if own == {key: tuple(value.shape) for key, value in like.items()}:
            return {
                "timm_model_name": name,
                "timm_pool": pool,
                "timm_proj": "none",
                "image_size": list(facts.size),
            }, False
    raise ValueError(f"open_clip builds timm's {name} only in timm's own size, and this encoder has another")


def timm_state(encoder: Encoder, vision: dict) -> State:
    """The encoder's tensors by the keys of a tower around a model of timm."""
    args = {"num_classes": 0, "global_pool": vision["timm_pool"]}
    state = to_timm(encoder, vision["timm_model_name"], args)
    return {f"trunk.{key}": value for key, value in state.items()}
