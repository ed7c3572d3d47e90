"""An encoder by its name: timm's, or one of those that timm lacks."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Sequence

import timm
import torch
from timm.models import model_entrypoint

from models.encoders.convnext import ConvNeXt
from models.encoders.cswin import CSWin
from models.encoders.encoder import Encoder
from models.encoders.hiera import Hiera
from models.encoders.mixswin import MixSwin
from models.encoders.mvit import MViT
from models.encoders.pyramid import Pyramid
from models.encoders.resnet import ResNet
from models.encoders.vit import ViT

PLAIN = ("vision_transformer", "deit", "beit", "eva")
SPECIAL = {"convnext": ConvNeXt, "resnet": ResNet, "hiera": Hiera, "mvitv2": MViT}  # the rest are Pyramids
OWN: dict[str, tuple[type[Encoder], dict]] = {  # what timm lacks: the class, and the sizes that a name stands for
    "mixmim_base": (MixSwin, {"embed_dim": 128, "num_heads": (4, 8, 16, 32)}),
    "mixmim_large": (MixSwin, {"embed_dim": 192, "num_heads": (6, 12, 24, 48)}),
    "mixmim_huge": (MixSwin, {"embed_dim": 352, "num_heads": (11, 22, 44, 88)}),
    "cswin_tiny": (CSWin, {"embed_dim": 64, "depths": (1, 2, 21, 1), "num_heads": (2, 4, 8, 16)}),
    "cswin_small": (CSWin, {"embed_dim": 64, "depths": (2, 4, 32, 2), "num_heads": (2, 4, 8, 16)}),
    "cswin_base": (CSWin, {"embed_dim": 96, "depths": (2, 4, 32, 2), "num_heads": (4, 8, 16, 32)}),
    "cswin_large": (CSWin, {"embed_dim": 144, "depths": (2, 4, 32, 2), "num_heads": (6, 12, 24, 24)}),
}


def build_encoder(name: str, in_chans: int = 3, img_size: int | Sequence[int] | None = None, **args) -> Encoder:
    """Any plain or hierarchical backbone of timm, or one of OWN, as an Encoder without pretrained weights.

    img_size: side of an image in pixels, or (height, width), where tables or windows depend on it; in use, any will do
    args:     those of the class that serves the name, or timm's. ValueError, naming the nearest, for an unknown
              one or an unknown name, and for arguments that do not fit
    """
    if name not in OWN and not timm.is_model(name):
        near = difflib.get_close_matches(name, [*OWN, *timm.list_models()], n=3, cutoff=0.5)
        raise ValueError(f'no encoder is called "{name}"; the nearest are {", ".join(near) or "in timm.list_models()"}')
    family, sizes = OWN.get(name) or (encoder_class(name), {"name": name})
    sized = {} if img_size is None else {"img_size": img_size}
    try:
        encoder = family(in_chans=in_chans, **sizes | sized | args)
    except (TypeError, LookupError, AttributeError, AssertionError, RuntimeError, ArithmeticError) as error:
        unknown = str(error).rpartition("unexpected keyword argument ")[2].strip("'\"")
        if unknown == "img_size" and sized:  # this family asks for no size
            return build_encoder(name, in_chans, **args)
        if unknown in args:
            raise ValueError(unknown_argument(name, unknown)) from error
        if not str(error):  # a bare assertion: where it stands says more
            raise
        raise ValueError(f"{name} cannot be built with {sized | args}: {error}") from error
    encoder.plan = {"name": name, "in_chans": in_chans, "args": sized | args}
    return encoder


def encoder_class(name: str) -> type[Encoder]:
    """The Encoder that serves a timm name: ViT for plain transformers, Pyramid or one of its like for the rest."""
    module = model_entrypoint(name).__module__.rpartition(".")[2]
    return ViT if module in PLAIN else SPECIAL.get(module, Pyramid)


def families(name: str) -> list[type]:
    """The classes that take an encoder's arguments: ours, and the one of timm in it, if any."""
    with torch.device("meta"):
        encoder = build_encoder(name)
    return [type(encoder), *[type(m) for m in encoder.modules() if type(m).__module__.startswith("timm.models.")][:1]]


def unknown_argument(name: str, unknown: str) -> str:
    """One line that names the nearest valid argument, among ours and those of timm's class."""
    if unknown == "drop_last":
        return f"drop_last: {name} keeps all its blocks: leave it out, or take a ViT, Swin or ConvNeXt"
    valid = {argument for family in families(name) for argument in inspect.signature(family).parameters}
    near = difflib.get_close_matches(unknown, valid - {"name", "timm_args"}, n=1, cutoff=0.0)
    return f'{name} has no argument "{unknown}"; the nearest is "{near[0]}"'
