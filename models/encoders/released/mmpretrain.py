"""How mmpretrain and mmselfsup spell what official repositories wrote first: backbone., neck. and head."""

from __future__ import annotations

import re

from einops import rearrange
from torch import Tensor

from models.encoders.released.common import State
from models.encoders.released.convnext import substitute

BLOCK = (
    (r"\.ln(\d)\.", r".norm\1."),
    (r"\.ffn\.layers\.0\.0\.", ".mlp.fc1."),
    (r"\.ffn\.layers\.1\.", ".mlp.fc2."),
    (r"\.attn\.gamma1\.weight$", ".ls1.gamma"),
    (r"\.ffn\.gamma2\.weight$", ".ls2.gamma"),
)
BACKBONE = (
    (r"^patch_embed\.projection\.", "patch_embed.proj."),
    (
        r"^layers\.(\d+)\.(?!blocks\.|downsample\.)",
        r"blocks.\1.",
    ),  # but not MixMIM's
    (r"^pre_norm\.", "norm_pre."),
    (r"^ln1\.", "norm."),
    (r"^ln2\.", "fc_norm."),
    (r"^norm\d\.", "norm."),  # after the last stage
    (r"^stages\.(\d+)\.(blocks|downsample)\.", r"layers.\1.\2."),  # Swin
    (r"\.attn\.w_msa\.", ".attn."),
    (r"\.depthwise_conv\.", ".dwconv."),  # ConvNeXt
    (r"\.pointwise_conv(\d)\.", r".pwconv\1."),
    *BLOCK,
)
NECK = (
    (r"^ln1\.", "decoder_norm."),
    (r"^patch_aggregation\.", "cls_pt_layers."),  # BEiT v2
    *BLOCK,
)
GUESSES = ("decoder", "mask_token", "cls_pt_layers.", "norm.")  # what a neck has that official checkpoints have, too


def speaks(state: State) -> bool:
    """Whether a state is mmpretrain's; a ResNet's shows only in its prefix."""
    words = ("patch_embed.projection.", ".depthwise_conv.", ".ffn.layers.", "backbone.layer1.0.conv1.")
    return any(word in key for key in state for word in words)


def official(state: State) -> State:
    """mmpretrain's tensors by the keys of official repositories, the decoder's among them."""
    v2 = any(key.endswith(".attn.w_msa.logit_scale") for key in state)
    return {official_key(key, v2): official_order(key, value, v2) for key, value in state.items()}


def official_key(key: str, v2: bool) -> str:
    """`v2`: of a SwinV2, whose stages begin with the downsampling layer that official ones end with."""
    part, _, rest = key.partition(".")
    if part == "neck":
        new = substitute(NECK, rest)
        return new if new.startswith(GUESSES) else f"head.{key}"
    if part == "head":
        return key.replace("head.cls_head.", "lm_head.", 1)
    if part in ("data_preprocessor", "target_generator"):
        return f"head.{key}"
    new = substitute(BACKBONE, key.removeprefix("backbone."))
    if v2:
        new = re.sub(r"^layers\.(\d+)\.downsample", lambda found: f"layers.{int(found[1]) - 1}.downsample", new)
    return new


def official_order(key: str, value: Tensor, v2: bool) -> Tensor:
    """A merging layer's inputs by place, column by column, then by channel; nn.Unfold has the channel first."""
    if key.endswith(".downsample.reduction.weight"):
        return rearrange(value, "o (c y x) -> o (x y c)", y=2, x=2)
    if not v2 and re.search(r"\.downsample\.norm\.(weight|bias)$", key):
        return rearrange(value, "(c y x) -> (x y c)", y=2, x=2)
    return value
