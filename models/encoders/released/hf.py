"""transformers' models: their keys in the official repositories' spelling, as version 4 writes them and as 5 does."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Iterable

import torch

from models.encoders.released.common import State

Names = tuple[tuple[str, str], ...]  # a pattern of transformers' keys, the official spelling

BASE = r"^(?:vit|beit|swin|swinv2|convnext|convnextv2|hiera|dinov2|dinov2_with_registers|vision_model)\."
HEADS: Names = (  # BEiT's norm after the mean; what a classifier or a segmenter learned
    (r"^pooler\.layernorm\.", "fc_norm."),
    (r"^(?=pooler\.|classifier\.|decode_head\.|auxiliary_head\.)", "head."),
)
BLOCK: Names = (
    (r"^blocks\.(\d+)\.relative_position_bias\.", r"blocks.\1.attn."),  # BEiT's, in version 5
    (r"\.layernorm_before\.", ".norm1."),
    (r"\.layernorm_after\.", ".norm2."),
    (r"\.attention\.output\.dense\.", ".attn.proj."),
    (r"\.attention\.(?:attention\.|self\.)?", ".attn."),
    (r"\.attn\.relative_position_bias\.", ".attn."),
    (r"\.attn\.o_proj\.", ".attn.proj."),
    (r"\.attn\.(?:query|key|value|q_proj|k_proj|v_proj)\.", ".attn.qkv."),
    (r"\.continuous_position_bias_mlp\.", ".cpb_mlp."),
    (r"\.intermediate\.dense\.", ".mlp.fc1."),
    (r"\.output\.dense\.", ".mlp.fc2."),
    (r"\.mlp\.(?:weights_in|gate_proj|up_proj)\.", ".mlp.w12."),
    (r"\.mlp\.(?:weights_out|down_proj)\.", ".mlp.w3."),
    (r"\.lambda_(\d)$", r".gamma_\1"),
    (r"\.layer_scale(\d)\.lambda1$", r".ls\1.gamma"),
)
PLAIN: Names = (  # ViT, MAE, BEiT, DINOv2
    (r"^embeddings\.patch_embeddings\.projection\.", "patch_embed.proj."),
    (r"^embeddings\.position_embeddings$", "pos_embed"),
    (r"^embeddings\.", ""),
    (r"^(?:encoder\.layer|layers)\.", "blocks."),
    (r"^(?:encoder\.relative_position_bias|shared_position_bias)\.", "rel_pos_bias."),
    (r"^decoder\.(?:decoder_layers|decoder_encoder\.layer)\.", "decoder_blocks."),  # the latter is a slip of 5.24
    (r"^decoder\.(?=decoder_|mask_token)", ""),
    *BLOCK,
    *HEADS,
    (r"^layernorm\.", "norm."),
)
SWIN: Names = (
    (r"^embeddings\.patch_embeddings\.projection\.", "patch_embed.proj."),
    (r"^embeddings\.norm\.", "patch_embed.norm."),
    (r"^embeddings\.", ""),
    (r"^encoder\.layers\.", "layers."),
    *BLOCK,
    *HEADS,
    (r"^layernorm\.", "norm."),
)
CONVNEXT: Names = (
    (r"^embeddings\.patch_embeddings\.", "downsample_layers.0.0."),
    (r"^embeddings\.layernorm\.", "downsample_layers.0.1."),
    (r"^encoder\.stages\.(\d+)\.downsampling_layer\.", r"downsample_layers.\1."),
    (r"^encoder\.stages\.(\d+)\.layers\.", r"stages.\1."),
    (r"\.layer_scale_parameter$", ".gamma"),
    (r"\.grn\.weight$", ".grn.gamma"),
    (r"\.grn\.bias$", ".grn.beta"),
    *HEADS,
    (r"\blayernorm\.", "norm."),
)
HIERA: Names = (
    (r"^embeddings\.patch_embeddings\.projection\.", "patch_embed.proj."),
    (r"^embeddings\.position_embeddings$", "pos_embed"),
    (r"^pooler\.layernorm\.", "norm."),
    (r"^multiscale_fusion\.", ""),
    (r"^decoder\.decoder_embeddings\.", "decoder_embed."),
    (r"^decoder\.decoder_position_embeddings$", "decoder_pos_embed"),
    (r"^decoder\.decoder_block\.layers\.", "decoder_blocks."),
    (r"^decoder\.", ""),
    *BLOCK,
    *HEADS,
)
CLIP: Names = (
    (r"^embeddings\.class_embedding$", "visual.class_embedding"),
    (r"^embeddings\.position_embedding\.weight$", "visual.positional_embedding"),
    (r"^embeddings\.patch_embedding\.", "visual.conv1."),
    (r"^pre_layrnorm\.", "visual.ln_pre."),
    (r"^post_layernorm\.", "visual.ln_post."),
    (r"^encoder\.layers\.", "visual.transformer.resblocks."),
    (r"\.layer_norm(\d)\.", r".ln_\1."),
    (r"\.self_attn\.[qkv]_proj\.", ".attn.in_proj_"),
    (r"\.self_attn\.out_proj\.", ".attn.out_proj."),
    (r"\.mlp\.fc1\.", ".mlp.c_fc."),
    (r"\.mlp\.fc2\.", ".mlp.c_proj."),
)
NAMES = (  # what keys of a model contain, and its names
    ("embeddings.patch_embedding.", CLIP),
    ("downsampling_layer.", CONVNEXT),
    ("encoder.stages.", HIERA),
    ("encoder.layers.0.blocks.", SWIN),
    ("embeddings.patch_embeddings.", PLAIN),
)
PARTS = ("query", "q_proj", "key", "k_proj", "value", "v_proj", "gate_proj", "up_proj")  # of one tensor, in its order


def speaks(state: Iterable[str]) -> bool:
    """Whether keys are transformers'."""
    return any("embeddings.patch_embedding" in key for key in state)


def official(state: State) -> State:
    """A state of transformers' keys, or of a library of like spelling, by the official repository's."""
    return {new: join([state[key] for key in keys]) for new, keys in spell(state).items()}


def join(parts: list[torch.Tensor]) -> torch.Tensor:
    return torch.cat(parts) if len(parts) > 1 else parts[0]


def spell(state: Iterable[str]) -> dict[str, list[str]]:
    """Official keys, each with those of transformers whose tensors, one after the other, are its own.

    ValueError if two tensors go by the same name, as in a model that has two final norms.
    """
    names = next(names for word, names in NAMES if any(word in key for key in state))
    starts = stage_starts(state) if names is HIERA else {}
    spelled = defaultdict(list)
    for key in sorted(state, key=part):
        spelled[official_key(key, names, starts)].append(key)
    for new, keys in list(spelled.items()):
        if new.endswith("qkv.bias") and len(keys) == 2:  # keys of BEiT and SwinV2 have no bias
            del spelled[new]
            spelled |= {new.replace("qkv.bias", f"{which}_bias"): [key] for which, key in zip("qv", keys)}
        elif len(keys) > 1 and len({part(key) for key in keys}) < len(keys):
            raise ValueError(f"{' and '.join(keys)} would both be {new}: no model here has both")
    return spelled


def official_key(key: str, names: Names, starts: dict[int, int]) -> str:
    key = re.sub(BASE, "", key)
    key = re.sub(r"^encoder\.stages\.(\d+)\.layers\.(\d+)\.", lambda m: flat(m, starts), key) if starts else key
    for old, new in names:
        key = re.sub(old, new, key)
    return key


def part(key: str) -> int:
    """Which part of a tensor that is one elsewhere a key is for."""
    return next((i for i, name in enumerate(PARTS) if f".{name}." in key), 0)


def stage_starts(state: Iterable[str]) -> dict[int, int]:
    """How many blocks come before each stage of a Hiera."""
    found = {m.groups() for key in state if (m := re.search(r"encoder\.stages\.(\d+)\.layers\.(\d+)\.", key))}
    depths = Counter(int(stage) for stage, _ in found)
    return {stage: sum(depths[i] for i in range(stage)) for stage in depths}


def flat(found: re.Match, starts: dict[int, int]) -> str:
    return f"blocks.{starts[int(found[1])] + int(found[2])}."
