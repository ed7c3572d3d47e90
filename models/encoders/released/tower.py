"""Image towers: CLIP as OpenAI, open_clip, MILAN and timm name its parts, SLIP and DINO."""

from __future__ import annotations

import re

from models.encoders.released.common import State
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
OTHERS = ("head.mlp.", "head.last_layer.")  # the head that DINO learned with
PROJECTIONS = {"proj": True, "image_projection": True, "visual_projection.weight": False}  # whether (in, out)
HEADS = {1280: 16, 1408: 16, 1664: 16}  # CLIP's widths whose heads are not of 64 channels


def unify(state: State) -> State:
    """A tower's tensors by timm's names, `head.` its projection, whoever wrote the file; nothing else of it.

    KeyError names what is missing.
    """
    prefix = next((p for p in PREFIXES if any(key.startswith(p) for key in state)), "")
    names = CLIP if f"{prefix}class_embedding" in state else ()
    ours = {}
    for key, value in state.items():
        bare = key.removeprefix(prefix)
        if bare in PROJECTIONS:
            ours["head.weight"] = value.T if PROJECTIONS[bare] else value
        elif key.startswith(prefix) and not bare.startswith(OTHERS):
            for old, new in names:
                bare = re.sub(old, new, bare)
            ours[bare] = value
    if names:
        ours |= {"pos_embed": ours["pos_embed"][None], "cls_token": ours["cls_token"][None, None]}
    return ours


def tower(key: str) -> str | None:
    """A tower of unified names, without its projection."""
    return None if key.startswith("head.") else f"vit.{key}"


def describe_tower(state: State, quick: bool = True) -> tuple[str, dict]:
    """As `describe_vit`, for unified names. `quick`: CLIP's approximation of GELU, which no tensor tells."""
    name, args = describe_vit(state)
    width = args["embed_dim"]
    if is_clip(state):
        name = "vit_base_patch16_clip_quickgelu_224" if quick else "vit_base_patch16_clip_224"
        args["num_heads"] = HEADS.get(width, args["num_heads"])
    elif width == 384 and "head.weight" in state and "head.bias" not in state:
        args["num_heads"] = 12  # SLIP's ViT-S, which is MoCo v3's
    return name, args


def is_clip(state: State) -> bool:
    """Whether a tower of unified names is CLIP's, which norms before its blocks; SLIP's and DINO's do not."""
    return "norm_pre.weight" in state
