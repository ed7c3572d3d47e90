"""A small instance of every method, for the tests that every method has to pass."""

import tempfile
from inspect import signature
from pathlib import Path

import torch

from models.encoders.build import build_encoder
from models.mim.recipes import METHODS, TARGETS
from tests.tokenizers import tiny_tokenizer
from tests.towers import clip_file

PLAIN = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2}
STAGES = {"depths": (1, 2, 1, 1), "dims": (8, 8, 16, 16)}
RESIDUAL = {"layers": (1, 2, 1, 1), "channels": (8, 8, 8, 8)}
WINDOWS = {"img_size": 64, "embed_dim": 8, "depths": (2, 2, 1, 1), "num_heads": (1, 1, 2, 2), "window_size": 2}
UNITS = {"img_size": 64, "embed_dim": 8, "stages": (1, 2, 1, 1)}
TRANSFORMER = {"depth": 1, "width": 32, "heads": 2}

VIT = ("vit_base_patch16_224", PLAIN | {"position": "sincos", "init": "xavier"})
BUILT = {  # an encoder for each method, and arguments that make the method small
    "mae": (*VIT, {"unit": 16}),
    "simmim": ("swin_tiny_patch4_window7_224", WINDOWS | {"embed_dim": 32}, {}),
    "maskfeat": (*VIT, {"unit": 16, "least": 2}),
    "fastmim": (*VIT, {"unit": 16}),
    "mixmim": ("mixmim_base", WINDOWS | {"embed_dim": 32}, {}),
    "hiera": ("hiera_tiny_224", UNITS | {"stages": (1, 1, 1, 1), "q_pool": 2, "init": "xavier"}, {}),
    "fcmae": ("convnextv2_atto", STAGES, {}),
    "spark": ("resnet50", RESIDUAL, {"width": 64}),
    "eva": ("eva02_tiny_patch14_224", PLAIN, {"unit": 16, "least": 2}),
    "milan": (*VIT, {"unit": 16}),
    "beit": ("beit_base_patch16_224", PLAIN, {"unit": 16}),
    "beitv2": ("beit_base_patch16_224", PLAIN | {"taps": (0, -1), "final_norm": False}, {"unit": 16}),
    "vqkd": ("vit_base_patch16_224", PLAIN, {"target": "pixels", "vocabulary": 48, "dim": 8}),
}


def small(name, encoder, **args):
    """A method of METHODS around an encoder; teachers and tokenizers are tiny and random."""
    wanted = signature(METHODS[name]).parameters
    args = {key: value for key, value in (TRANSFORMER | args).items() if key in wanted}
    if name in ("eva", "milan"):
        known, source = encoder.in_chans <= 3, f"clip:{clip_file()}"  # a teacher knows no other images
        if name == "milan":  # whose mask is a teacher's, too
            args |= {"mask": "random"} if not known else {"mask": source} if "target" in args else {}
        args = {"target": source if known else "normalized"} | args
    if "tokenizer" not in wanted:
        return METHODS[name](encoder, **args)
    with tempfile.TemporaryDirectory() as folder:
        source = tiny_tokenizer(Path(folder), in_chans=max(encoder.in_chans, 3))
        return METHODS[name](encoder, source, **args)


def built(name, in_chans=3, **args):
    """A method around the encoder of its own, the same at every call."""
    torch.manual_seed(0)
    encoder, sizes, options = BUILT[name]
    return small(name, build_encoder(encoder, in_chans, **sizes), **options | args)


def targets(name):
    """Each target that a method may be asked for, but "local", which is as pixels are, but slower."""
    free = "target" in signature(METHODS[name]).parameters
    return [{"target": target} for target in TARGETS if target != "local"] if free else [{}]


def rough_images(count=16, in_chans=3):
    """Images with something to see at every scale: (count, in_chans, 64, 64)."""
    torch.manual_seed(0)
    images = torch.nn.functional.interpolate(torch.randn(count, in_chans, 4, 4), scale_factor=16, mode="bicubic")
    return images + 0.05 * torch.randn_like(images)
