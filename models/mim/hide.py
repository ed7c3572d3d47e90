"""How the hidden cells are kept from the encoder. Each class wraps one: images, mask -> features."""

from __future__ import annotations

from typing import Protocol, runtime_checkable

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn

from models.encoders.encoder import Encoder
from models.encoders.grid import Features, Mask
from models.encoders.layers import Fill


@runtime_checkable
class Hide(Protocol):
    """(B, C, H, W) images and a mask -> what the encoder makes of the visible cells."""

    encoder: Encoder
    unit: int  # pixels of which the mask's cells have a whole number

    def __call__(self, images: Float[Tensor, "B C H W"], mask: Mask) -> Features: ...


class Skip(nn.Module):
    """Leave hidden cells out of the computation, pixels first: patches may overlap (MAE, FCMAE, SparK, Hiera)."""

    def __init__(self, encoder: Encoder):
        super().__init__()
        if not encoder.skips:
            raise ValueError("Skip needs an encoder that can leave cells out (a plain ViT, ConvNeXt, ResNet, Hiera); "
                             f"this {type(encoder).__name__} computes them all: hide with Replace (simmim) or Paint "
                             "(fastmim) instead")  # fmt: skip
        self.encoder, self.unit = encoder, encoder.mask_unit

    def forward(self, images: Float[Tensor, "B C H W"], mask: Mask) -> Features:
        seen = images * ~mask.at(1)[:, None]  # where patches overlap, visible tokens would see beyond their own
        return self.encoder.encode(self.encoder.embed(seen), mask)


class Replace(nn.Module):
    """Put a learned token in place of each hidden patch (SimMIM, BEiT, EVA, MaskFeat)."""

    def __init__(self, encoder: Encoder):
        super().__init__()
        if encoder.overlaps:
            raise ValueError(f"Replace needs patches that share no pixels; those of this {type(encoder).__name__} "
                             "overlap, so visible tokens would see hidden pixels: hide with Paint (fastmim) instead, "
                             "or Skip (hiera) if it can")  # fmt: skip
        self.encoder, self.unit, self.fill = encoder, encoder.patch, Fill(encoder.width)

    def forward(self, images: Float[Tensor, "B C H W"], mask: Mask) -> Features:
        return self.encoder.encode(self.fill(self.encoder.embed(images), mask.at(self.encoder.patch)))


class Paint(nn.Module):
    """Paint hidden pixels in one learned colour, which any encoder takes (FastMIM)."""

    def __init__(self, encoder: Encoder):
        super().__init__()
        self.encoder, self.unit, self.fill = encoder, encoder.patch, Fill(encoder.in_chans)

    def forward(self, images: Float[Tensor, "B C H W"], mask: Mask) -> Features:
        painted = self.fill(rearrange(images, "b c h w -> b h w c"), mask.at(1))
        return self.encoder(rearrange(painted, "b h w c -> b c h w"))


class Mix(nn.Module):
    """Put another image's patches in place of the hidden ones, the two kept apart; one mask for all (MixMIM).

    Image i is paired with image B - 1 - i. The two sides never see each other, so nothing leaks where the middle image
    of an odd batch is its own partner, as happens when evaluating.
    """

    pairs = True

    def __init__(self, encoder: Encoder):
        super().__init__()
        if not encoder.mixes:
            kind = type(encoder).__name__
            raise ValueError(f"Mix needs an encoder that keeps two images apart, as mixmim_base does; {kind} does not")
        self.encoder, self.unit = encoder, encoder.mask_unit

    def forward(self, images: Float[Tensor, "B C H W"], mask: Mask) -> Features:
        if self.training and len(images) % 2:
            raise ValueError(f"Mix pairs the images of a batch: an even batch per device is needed, not {len(images)}")
        tokens = self.encoder.embed(images)
        mixed = torch.where(mask.at(self.encoder.patch)[..., None], tokens.flip(0), tokens)
        return self.encoder.encode(mixed, mask)


def cover(encoder: Encoder) -> Hide:
    """Replace, or Paint where patches overlap and visible tokens would see the pixels of replaced ones."""
    return Paint(encoder) if encoder.overlaps else Replace(encoder)
