"""To detectron2: the keys of its plain ViT (ViTDet), Swin and ResNet, in a file that its checkpointer reads.

detectron2 itself is not needed: what is written is read back by the inverse renaming.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from models.encoders.encoder import Encoder
from models.encoders.grid import Features
from models.export.renamed import Names, module_of, rename, renamed

if TYPE_CHECKING:
    from models.export.formats import Facts

FILE = "model.pth"
USE = f"""\
import torch

features = torch.load("{FILE}", weights_only=True)["model"]  # tensors by detectron2's keys; its models have the code
# yaml configs take the file as MODEL.WEIGHTS, lazy ones (ViTDet) as train.init_checkpoint
"""
NOTE = "detectron2 was not asked: the tensors were compared with the encoder's by renaming them back."
VIT: Names = ((r"^vit\.", "backbone.net."),)
SWIN: Names = (
    (r"^backbone\.norm\.", "backbone.norm3."),  # of the last of its four maps
    (r"^backbone\.", "backbone.bottom_up."),
    (r"^stem\.", "backbone.bottom_up.patch_embed."),
    (r"\.layers\.(\d+)\.downsample\.", lambda found: f".layers.{int(found[1]) - 1}.downsample."),
)
RESNET: Names = (
    (r"^backbone\.bn1\.", "backbone.stem.conv1.norm."),
    (r"^backbone\.layer(\d)\.", lambda found: f"backbone.res{int(found[1]) + 1}."),
    (r"^backbone\.", "backbone.bottom_up."),
    (r"^stem\.", "backbone.bottom_up.stem.conv1."),
    (r"\.bn(\d)\.", r".conv\1.norm."),
    (r"\.downsample\.0\.", ".shortcut."),
    (r"\.downsample\.1\.", ".shortcut.norm."),
)
BLOCK = r"blocks\.\d+\.(norm\d|attn\.qkv|attn\.proj|mlp\.fc\d)\.\w+"
KINDS: dict[str, tuple[Names, str, str]] = {  # by timm's module: names; what detectron2 has, and what it does without
    "vision_transformer": (VIT, rf"vit\.(pos_embed|patch_embed\.proj\.\w+|{BLOCK})", r"vit\.(cls_token|norm\.\w+)"),
    "swin_transformer": (
        SWIN,
        rf"stem\..*|backbone\.(norm\.\w+|layers\.\d\.(downsample\..*|{BLOCK}|blocks\.\d+\.attn\.\w+_table))",
        "",
    ),
    "resnet": (
        RESNET,
        r"stem\.weight|backbone\.(layer\d\.\d+\.)?(conv\d|bn\d|downsample\.[01])\.(weight|bias|running_\w+)",
        r".*\.num_batches_tracked",
    ),
}


def write(encoder: Encoder, facts: Facts, folder: Path) -> None:
    """Write model.pth: {"model": tensors by detectron2's keys}. ValueError if it has no such backbone."""
    state, without = spell(encoder)
    facts.notes += [NOTE, *([f"Without {', '.join(without)}, which detectron2's backbone has not."] if without else [])]
    torch.save({"model": state, "__author__": facts.origin}, folder / FILE)


def read(folder: Path, encoder: Encoder) -> Callable[[Tensor], Features]:
    """An encoder with the file's tensors: images (B, C, H, W), normalised, to its last map and prefix tokens."""
    file = torch.load(folder / FILE, weights_only=True)["model"]
    names, has, _ = KINDS[module_of(encoder.plan["name"])]
    back = {rename(key, names): key for key in encoder.state_dict() if re.fullmatch(has, key)}
    if back.keys() != file.keys():
        raise ValueError(f"{sorted(back.keys() ^ file.keys())[:3]} missing or unknown")
    again = copy.deepcopy(encoder).eval()
    again.load_state_dict({back[key]: value for key, value in file.items()}, strict=False)
    return torch.no_grad()(again)


def spell(encoder: Encoder) -> tuple[dict[str, Tensor], list[str]]:
    """An encoder's tensors by detectron2's keys, and those of ours that it does without."""
    name, state = encoder.plan["name"], encoder.state_dict()
    if module_of(name) not in KINDS:
        raise ValueError(f"detectron2 has no {name}; it has plain vit, swin and resnet")
    names, has, without = KINDS[module_of(name)]
    unknown = [key for key in state if not re.fullmatch(has, key) and not re.fullmatch(without, key)]
    if unknown:
        raise ValueError(f"detectron2 has no {name}: its nearest backbone does not know {unknown[0]}")
    taken = {key: value for key, value in state.items() if re.fullmatch(has, key)}
    if len({len(value) for key, value in taken.items() if key.endswith("_bias_table")}) > 1:
        raise ValueError(f"detectron2's swin has one window size, and this {name} has several")
    left = [key for key in state if key not in taken and not key.endswith(".num_batches_tracked")]
    return renamed(taken, names), left
