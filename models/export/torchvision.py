"""To torchvision: its VisionTransformer, SwinTransformer (V2, too), ConvNeXt and ResNet, without a classifier."""

from __future__ import annotations

import json
import pkgutil
import re
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from einops import rearrange
from torch import Tensor, nn

from models.encoders.encoder import Encoder
from models.encoders.grid import Features
from models.encoders.released.common import State
from models.export.renamed import MLP, Names, fill, module_of, renamed

if TYPE_CHECKING:
    from models.export.formats import Facts

FILE, ARGS = "model.pth", "arguments.json"
USE = f"""\
import json
import pkgutil

import torch

told = json.load(open("{ARGS}"))  # the class of torchvision, and its arguments
args = told["args"] | {{{{key: pkgutil.resolve_name(name) for key, name in told["classes"].items()}}}}
args |= {{{{key: [pkgutil.resolve_name(name)(*each) for each in args[key]] for key, name in told["lists"].items()}}}}
model = pkgutil.resolve_name(told["class"])(**args).eval()
model.load_state_dict(torch.load("{FILE}", weights_only=True), strict=False)  # all but the classifier
mean, std = (torch.tensor(values).view(-1, 1, 1) for values in ({{mean}}, {{std}}))
images = torch.rand(1, {{channels}}, {{height}}, {{width}})  # in [0, 1]
features = model((images - mean) / std)  # what a classifier, fresh as yet, makes of them
"""
HEADS = ("heads.", "head.", "classifier.", "fc.")


def stage(offset: int) -> Callable[[re.Match], str]:
    """In torchvision, stages and what merges places between them take turns."""
    return lambda found: f"features.{2 * int(found[1]) + offset}."


VIT: Names = (
    (r"^vit\.cls_token$", "class_token"),
    (r"^vit\.pos_embed$", "encoder.pos_embedding"),
    (r"^vit\.patch_embed\.proj\.", "conv_proj."),
    (r"^vit\.norm\.", "encoder.ln."),
    (r"^vit\.blocks\.(\d+)\.", r"encoder.layers.encoder_layer_\1."),
    (r"\.norm(\d)\.", r".ln_\1."),
    (r"\.attn\.qkv\.", ".self_attention.in_proj_"),
    (r"\.attn\.proj\.", ".self_attention.out_proj."),
    *MLP,
)
SWIN: Names = (
    (r"^stem\.proj\.", "features.0.0."),
    (r"^stem\.norm\.", "features.0.2."),
    (r"^backbone\.layers\.(\d+)\.downsample\.", stage(0)),
    (r"^backbone\.layers\.(\d+)\.blocks\.", stage(1)),
    (r"^backbone\.norm\.", "norm."),
    *MLP,
)
CONVNEXT: Names = (
    (r"^stem\.", "features.0."),
    (r"^backbone\.stages\.(\d+)\.downsample\.", stage(0)),
    (r"^backbone\.stages\.(\d+)\.blocks\.", stage(1)),
    (r"\.conv_dw\.", ".block.0."),
    (r"^(features\.\d+\.\d+)\.norm\.", r"\1.block.2."),
    (r"\.mlp\.fc1\.", ".block.3."),
    (r"\.mlp\.fc2\.", ".block.5."),
    (r"\.gamma$", ".layer_scale"),
)
RESNET: Names = ((r"^stem\.", "conv1."), (r"^backbone\.", ""))


def write(encoder: Encoder, facts: Facts, folder: Path) -> None:
    """Write model.pth, a state dict, and the arguments of the class that takes it. ValueError if there is none."""
    name = encoder.plan["name"]
    module = module_of(name)
    if module not in KINDS:
        raise ValueError(f"torchvision has no {name}; it has vit, swin, swinv2, convnext and resnet")
    names, describe = KINDS[module]
    told = {"classes": {}, "lists": {}} | describe(encoder)
    state = renamed(with_biases(encoder.state_dict()), names)
    state = fill(build(told), state, HEADS, "torchvision", name)
    torch.save(state, folder / FILE)
    (folder / ARGS).write_text(json.dumps(told, indent=2) + "\n")


def read(folder: Path, encoder: Encoder) -> Callable[[Tensor], Features]:
    """The same through torchvision: images (B, C, H, W), normalised, to the last map and the class token."""
    told = json.loads((folder / ARGS).read_text())
    model = build(told)
    missing, unknown = model.load_state_dict(torch.load(folder / FILE, weights_only=True), strict=False)
    if unknown or not all(key.startswith(HEADS) for key in missing):
        raise ValueError(f"{missing[:3]} missing, {unknown[:3]} unknown")
    return torch.no_grad()(lambda images: RUN[told["class"].rpartition(".")[2]](model.eval(), images))


def build(told: dict) -> nn.Module:
    """A model of torchvision."""
    find = pkgutil.resolve_name
    args = told["args"] | {key: find(name) for key, name in told["classes"].items()}
    args |= {key: [find(name)(*each) for each in args[key]] for key, name in told["lists"].items()}
    return find(told["class"])(**args)


def with_biases(state: State) -> State:
    """A SwinV2's biases of queries and values in one tensor, zeros for the keys between."""
    whole = dict(state)
    for key in [key for key in state if key.endswith(".q_bias")]:
        q, v = whole.pop(key), whole.pop(key.replace(".q_bias", ".v_bias"))
        whole[key.replace(".q_bias", ".qkv.bias")] = torch.cat([q, torch.zeros_like(q), v])
    return whole


def describe_vit(encoder: Encoder) -> dict:
    block, grid = encoder.vit.blocks[0], encoder.grid
    if grid[0] != grid[1]:
        raise ValueError(f"torchvision's vit takes square images, and this one has {grid[0]} x {grid[1]} patches")
    args = {
        "image_size": grid[0] * encoder.patch,
        "patch_size": encoder.patch,
        "num_layers": len(encoder.vit.blocks),
        "num_heads": block.attn.num_heads,
        "hidden_dim": encoder.width,
        "mlp_dim": block.mlp.fc1.out_features,
    }
    return {"class": "torchvision.models.VisionTransformer", "args": args}


def describe_swin(encoder: Encoder) -> dict:
    stages = encoder.backbone.layers
    first = stages[0].blocks[0]
    args = {
        "patch_size": [encoder.patch] * 2,
        "embed_dim": encoder.width,
        "depths": [len(stage.blocks) for stage in stages],
        "num_heads": [stage.blocks[0].attn.num_heads for stage in stages],
        "window_size": list(first.window_size),
        "mlp_ratio": first.mlp.fc1.out_features / encoder.width,
    }
    return {"class": "torchvision.models.SwinTransformer", "args": args}


def describe_swinv2(encoder: Encoder) -> dict:
    place = "torchvision.models.swin_transformer"
    classes = {"block": f"{place}.SwinTransformerBlockV2", "downsample_layer": f"{place}.PatchMergingV2"}
    return describe_swin(encoder) | {"classes": classes}


def describe_convnext(encoder: Encoder) -> dict:
    blocks, widths = [len(stage.blocks) for stage in encoder.backbone.stages], [*encoder.dims, None]
    return {
        "class": "torchvision.models.ConvNeXt",
        "args": {"block_setting": [list(each) for each in zip(widths, widths[1:], blocks)]},
        "lists": {"block_setting": "torchvision.models.convnext.CNBlockConfig"},
    }


def describe_resnet(encoder: Encoder) -> dict:
    net = encoder.backbone
    groups, first = net.layer1[0].conv2.groups, net.layer1[0]
    args = {"layers": [len(stage) for stage in (net.layer1, net.layer2, net.layer3, net.layer4)]}
    if hasattr(first, "conv3"):
        args |= {"groups": groups, "width_per_group": first.conv2.out_channels // groups}
    block = "Bottleneck" if hasattr(first, "conv3") else "BasicBlock"
    classes = {"block": f"torchvision.models.resnet.{block}"}
    return {"class": "torchvision.models.ResNet", "args": args, "classes": classes}


def run_vit(model: nn.Module, images: Tensor) -> Features:
    x = model._process_input(images)
    x = model.encoder(torch.cat([model.class_token.expand(len(x), -1, -1), x], 1))
    grid = images.shape[2] // model.patch_size
    return Features([rearrange(x[:, 1:], "b (h w) c -> b c h w", h=grid)], x[:, :1])


def run_resnet(model: nn.Module, images: Tensor) -> Features:
    for layer in list(model.children())[:-2]:  # all but the mean and the classifier
        images = layer(images)
    return Features([images])


KINDS = {  # by timm's module
    "vision_transformer": (VIT, describe_vit),
    "deit": (VIT, describe_vit),
    "swin_transformer": (SWIN, describe_swin),
    "swin_transformer_v2": (SWIN, describe_swinv2),
    "convnext": (CONVNEXT, describe_convnext),
    "resnet": (RESNET, describe_resnet),
}
RUN: dict[str, Callable[[nn.Module, Tensor], Features]] = {
    "VisionTransformer": run_vit,
    "SwinTransformer": lambda model, images: Features([model.permute(model.norm(model.features(images)))]),
    "ConvNeXt": lambda model, images: Features([model.features(images)]),
    "ResNet": run_resnet,
}
