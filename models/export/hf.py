"""Encoders for transformers: a folder that AutoModel.from_pretrained loads."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from models.encoders import released
from models.encoders.encoder import Encoder
from models.encoders.grid import Features
from models.encoders.released.common import State
from models.encoders.released.hf import spell

if TYPE_CHECKING:
    from models.export.formats import Facts

BICUBIC = 3  # as Pillow counts
AFRESH = "What transformers may have behind the encoder (a pooler, a norm after the mean over places) starts afresh."
USE = """\
import torch
from transformers import AutoModel

model = AutoModel.from_pretrained(".").eval()
mean, std = (torch.tensor(values).view(-1, 1, 1) for values in ({mean}, {std}))
images = torch.rand(1, {channels}, {height}, {width})  # in [0, 1]
features = model((images - mean) / std).last_hidden_state
"""


def write(encoder: Encoder, facts: Facts, folder: Path) -> None:
    """An encoder's weights, config.json and preprocessor_config.json, as transformers writes them.

    What transformers' model has behind the encoder, such as a pooler, is not there.
    ValueError in one line if transformers has no such model, saying which it has.
    """
    with quiet() as transformers:
        name, args = describe(encoder, facts)
        config = getattr(transformers, f"{name}Config")(**args)
        options = {} if name.startswith("ConvNext") else {"add_pooling_layer": False}
        model = getattr(transformers, f"{name}Model")(config, **options)
        _, family, _ = released.recognise(model.state_dict())
        fill(model, encoder.state_dict(), family.rename)
        save(model, facts, folder)
    facts.notes.append(AFRESH)


def read(folder: Path, encoder: Encoder) -> Callable[[Tensor], Features]:
    """The model in a folder, through transformers: normalised images (B, C, H, W) -> its last map and prefix tokens."""
    with quiet() as transformers:
        model = transformers.AutoModel.from_pretrained(folder).eval()

    @torch.no_grad()
    def run(images: Tensor) -> Features:
        h, w = (side // encoder.strides[-1] for side in images.shape[-2:])
        output = model(images, output_hidden_states=True)
        if model.config.model_type == "hiera":  # its last hidden state is not in raster order
            return Features([output.reshaped_hidden_states[-1].movedim(-1, 1)])
        x = output.last_hidden_state
        if x.ndim == 4:
            return Features([x])
        p = x.shape[1] - h * w
        return Features([x[:, p:].transpose(1, 2).unflatten(2, (h, w))], x[:, :p] if p else None)

    return run


@contextlib.contextmanager
def quiet() -> Iterator[Any]:
    """transformers, without its bars and its remarks on poolers. ValueError if it is not installed."""
    try:
        import transformers
    except ImportError as error:
        raise ValueError("transformers is not installed: pip install transformers") from error
    log = transformers.logging
    before, bars = log.get_verbosity(), log.is_progress_bar_enabled()
    log.set_verbosity_error()
    log.disable_progress_bar()
    try:
        yield transformers
    finally:
        log.set_verbosity(before)
        if bars:
            log.enable_progress_bar()


def save(model: nn.Module, facts: Facts, folder: Path) -> None:
    """Write a model, and how its images are made: resized, by bicubic interpolation, and normalised."""
    import transformers

    size = dict(zip(("height", "width"), facts.size))
    look = {"image_mean": list(facts.mean), "image_std": list(facts.std), "size": size, "resample": BICUBIC}
    model.save_pretrained(folder)
    transformers.ViTImageProcessor(**look).save_pretrained(folder)


def fill(
    model: nn.Module,
    ours: State,
    rename: Callable[[str], str | None],
    arrange: Callable[[str, Tensor], Tensor] = lambda key, value: value,
) -> None:
    """Write tensors of our keys into a model of transformers, by what is known of the way back.

    rename:  our key for an official one, None if it is not ours
    arrange: a tensor of our key in the official order

    ValueError if a tensor has no place in the model, or the model asks for one that is not there.
    """
    name, theirs = type(model).__name__, model.state_dict()
    places = {rename(new): keys for new, keys in spell(theirs).items() if rename(new) is not None}
    for what, keys in (("has a", places.keys() - ours.keys()), ("has no place for", ours.keys() - places.keys())):
        if keys:
            raise ValueError(f"transformers has no such model: its {name} {what} {sorted(keys)[0]}")
    for new, keys in places.items():
        parts = arrange(new, ours[new]).chunk(len(keys))
        for key, part in zip(keys, parts):
            if part.numel() != theirs[key].numel():
                here, there = ("x".join(map(str, value.shape)) for value in (ours[new], theirs[key]))
                raise ValueError(f"transformers has no such model: {new} is {here} here, {there} in {name}")
            theirs[key].copy_(part.reshape(theirs[key].shape))  # the model's own memory


def describe(encoder: Encoder, facts: Facts) -> tuple[str, dict]:
    """The architecture that holds an encoder, by its name in transformers, and the arguments of its config."""
    model = getattr(encoder, "vit", None) or getattr(encoder, "backbone", None)
    kind = type(model).__name__  # timm's
    if kind not in KINDS:
        raise ValueError(f"transformers has no {encoder.plan['name']}; it has {', '.join(KINDS)} as timm calls them")
    name, args = KINDS[kind](encoder, model)
    (h, w), learned = facts.size, encoder.grid and tuple(side * encoder.patch for side in encoder.grid)
    if learned not in (None, (h, w)):
        raise ValueError(f"transformers takes images of one size: the encoder's positions are for {learned[0]} x "
                         f"{learned[1]} px, not {h} x {w}: load it with img_size ({h}, {w})")  # fmt: skip
    size = h if h == w and name != "Hiera" else [h, w]
    return name, args | {"image_size": size, "num_channels": encoder.in_chans}


def vit(encoder: Encoder, model: nn.Module) -> tuple[str, dict]:
    """ViT, not ViTMAE: that one hides and shuffles patches whenever it is called."""
    block = model.blocks[0]
    return "ViT", {
        "hidden_size": encoder.width,
        "num_hidden_layers": len(model.blocks),
        "num_attention_heads": block.attn.num_heads,
        "intermediate_size": block.mlp.fc1.out_features,
        "layer_norm_eps": block.norm1.eps,
        "patch_size": encoder.patch,
        "qkv_bias": block.attn.qkv.bias is not None,
    }


def beit(encoder: Encoder, model: nn.Module) -> tuple[str, dict]:
    _, args = vit(encoder, model)
    del args["qkv_bias"]
    each = len(encoder.tables) == len(model.blocks)
    return "Beit", args | {
        "use_absolute_position_embeddings": model.pos_embed is not None,
        "use_relative_position_bias": each,
        "use_shared_relative_position_bias": len(encoder.tables) == 1 and not each,
        "layer_scale_init_value": 0.1 if model.blocks[0].gamma_1 is not None else 0.0,
        "use_mean_pooling": not encoder.normed,  # then nothing norms the last map
    }


def swin(encoder: Encoder, model: nn.Module) -> tuple[str, dict]:
    blocks = [stage.blocks for stage in model.layers]
    mlp = blocks[0][0].mlp.fc1
    return "Swin", {
        "patch_size": encoder.patch,
        "embed_dim": encoder.width,
        "depths": [len(stage) for stage in blocks],
        "num_heads": [stage[0].attn.num_heads for stage in blocks],
        "window_size": max(max(block.window_size) for stage in blocks for block in stage),
        "mlp_ratio": mlp.out_features / mlp.in_features,
        "layer_norm_eps": blocks[0][0].norm1.eps,
        "encoder_stride": encoder.strides[-1],
    }


def swinv2(encoder: Encoder, model: nn.Module) -> tuple[str, dict]:
    before = [stage.blocks[0].attn.pretrained_window_size[0] for stage in model.layers]
    return "Swinv2", swin(encoder, model)[1] | {"pretrained_window_sizes": before}


def convnext(encoder: Encoder, model: nn.Module) -> tuple[str, dict]:
    block = model.stages[0].blocks[0]
    args = {
        "patch_size": encoder.patch,
        "num_stages": len(model.stages),
        "hidden_sizes": list(encoder.dims),
        "depths": [len(stage.blocks) for stage in model.stages],
    }
    if hasattr(block.mlp, "grn"):
        return "ConvNextV2", args
    return "ConvNext", args | {"layer_scale_init_value": 0.0 if block.gamma is None else 1e-6}


def hiera(encoder: Encoder, model: nn.Module) -> tuple[str, dict]:
    ends = [-1, *model.stage_ends]
    mlp = model.blocks[0].mlp.fc1
    return "Hiera", {
        "embed_dim": encoder.width,
        "depths": [end - start for start, end in zip(ends, ends[1:])],
        "num_heads": [model.blocks[end].attn.heads for end in model.stage_ends],
        "num_query_pool": int(math.log2(encoder.strides[-1] // encoder.patch)),
        "masked_unit_size": list(model.mask_unit_size),
        "masked_unit_attention": list(encoder.plan["args"].get("mask_unit_attn", (True, True, False, False))),
        "mlp_ratio": mlp.out_features / mlp.in_features,
        "layer_norm_eps": model.blocks[0].norm1.eps,
    }


KINDS: dict[str, Callable[[Encoder, nn.Module], tuple[str, dict]]] = {  # by the class in timm
    "VisionTransformer": vit,
    "Beit": beit,
    "SwinTransformer": swin,
    "SwinTransformerV2": swinv2,
    "ConvNeXt": convnext,
    "Hiera": hiera,
}
