"""Image towers: CLIP as OpenAI, open_clip, MILAN and timm name its parts, SLIP and DINO."""

from __future__ import annotations

import re

from models.encoders.released.common import OTHERS, State, tell_heads
from models.encoders.released.vit import describe_vit

CLIP = (  # of OpenAI, open_clip and MILAN; timm's
    (r"^class_embedding$", "cls_token"),
    (r"^positional_embedding$", "pos_embed"),
    (r"^conv1\.", "patch_embed.proj."),
    (r"^ln_pre\.", "norm_pre."),
    (r"^ln_post\.", "norm."),
    (r"^transformer\.resblocks\.", "blocks."),
    (r"\.ln_(\d)\.", r".norm\1."),
    (r"\.in_proj_", ".qkv."),
    (r"\.out_proj\.", ".proj."),
    (r"\.c_fc\.", ".fc1."),
    (r"\.c_proj\.", ".fc2."),
)
PREFIXES = ("visual.", "backbone.")  # of the tower, where a file holds more
NOT_THE_TOWERS = ("head.mlp.", "head.last_layer.")  # the head that DINO learned with
PROJECTIONS = {"proj": True, "image_projection": True, "visual_projection.weight": False}  # whether (in, out)
OPENAI = (768, 1024)  # widths of the towers that OpenAI released


def unify(state: State) -> State:
    """A tower's tensors by timm's names, `head.` its projection, whoever wrote the file; what else it holds as "text."

    KeyError names what is missing.
    """
    prefix = next((p for p in PREFIXES if any(key.startswith(p) for key in state)), "")
    names = CLIP if f"{prefix}class_embedding" in state else ()
    ours = {}
    for key, value in state.items():
        bare = key.removeprefix(prefix)
        if bare in PROJECTIONS:
            ours["head.weight"] = value.T if PROJECTIONS[bare] else value
        elif key.startswith(prefix) and not bare.startswith(NOT_THE_TOWERS):
            for old, new in names:
                bare = re.sub(old, new, bare)
            ours[bare] = value
        else:
            ours[f"{'dino_head' if prefix in ('', 'backbone.') else 'text'}.{key}"] = value
    if names:
        ours |= {"pos_embed": ours["pos_embed"][None], "cls_token": ours["cls_token"][None, None]}
    return ours


def tower(key: str) -> str | None:
    """A tower of unified names, without its projection."""
    return None if key.startswith(OTHERS) else f"vit.{key}"


def describe_tower(state: State, quick: bool = True) -> tuple[str, dict]:
    """As `describe_vit`, for unified names. `quick`: CLIP's approximation of GELU, which no tensor tells."""
    name, args = describe_vit(state)
    if is_clip(state):
        name = "vit_base_patch16_clip_quickgelu_224" if quick else "vit_base_patch16_clip_224"
    elif args["embed_dim"] == 384 and "head.weight" in state and "head.bias" not in state:
        args["num_heads"] = 12  # SLIP's ViT-S, which is MoCo v3's
    return name, args


def is_clip(state: State) -> bool:
    """Whether a tower of unified names is CLIP's, which norms before its blocks; SLIP's and DINO's do not."""
    return "norm_pre.weight" in state


def quick(state: State, args: dict) -> list[str]:
    """What is assumed of a CLIP: OpenAI's approximation of GELU."""
    return tell_heads(state, args) + ["quick GELU, as OpenAI has (open_clip:FILE takes the exact one)"]


def exact(state: State, args: dict) -> list[str]:
    """What is assumed of an open_clip tower: exact GELU."""
    return tell_heads(state, args) + ["exact GELU, as LAION has (clip:FILE takes the quick one)"]


def has_clip(state: State) -> bool:
    """Whether a file holds a tower of CLIP's kind, whoever wrote it."""
    return any(key.startswith(("visual.", "vision_model.", "norm_pre.", "class_embedding")) for key in state)


def is_larger(state: State) -> bool:
    """Whether a tower is of a width that OpenAI did not release, as LAION's ViT-H, g and bigG: it has exact GELU."""
    names = ("class_embedding", "visual.class_embedding", "vision_model.embeddings.class_embedding", "cls_token")
    return has_clip(state) and any(name in state and state[name].shape[-1] > max(OPENAI) for name in names)
