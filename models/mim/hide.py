"""How the hidden cells are kept from the encoder. Each class wraps one: images, mask -> features."""

from __future__ import annotations

from typing import Protocol, runtime_checkable

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

    def __call__(self, images: Float[Tensor, "B C H W"], mask: Mask) -> Features: ...


class Skip(nn.Module):
    """Leave hidden cells out of the computation; their features are zeros (MAE, FCMAE)."""

    def __init__(self, encoder: Encoder):
        super().__init__()
        if not encoder.skips:
            raise ValueError(
                f"Skip needs an encoder that can leave cells out (a plain ViT, ConvNeXt); {type(encoder).__name__} "
                "computes them all: hide with Replace (simmim) or Paint (fastmim) instead"
            )
        self.encoder = encoder

    def forward(self, images: Float[Tensor, "B C H W"], mask: Mask) -> Features:
        seen = images * ~mask.at(1)[:, None]
        return self.encoder.encode(self.encoder.embed(seen), mask)


class Replace(nn.Module):
    """Put a learned token in place of each hidden patch (SimMIM, BEiT, EVA, MaskFeat)."""

    def __init__(self, encoder: Encoder):
        super().__init__()
        if encoder.overlaps:
            raise ValueError(
                f"Replace needs patches that share no pixels; those of this {type(encoder).__name__} overlap, so "
                "visible tokens would see hidden pixels: hide with Paint (fastmim) instead"
            )
        self.encoder, self.fill = encoder, Fill(encoder.width)

    def forward(self, images: Float[Tensor, "B C H W"], mask: Mask) -> Features:
        return self.encoder.encode(self.fill(self.encoder.embed(images), mask.at(self.encoder.patch)))


class Paint(nn.Module):
    """Paint hidden pixels in one learned colour, which any encoder takes (FastMIM)."""

    def __init__(self, encoder: Encoder):
        super().__init__()
        self.encoder, self.fill = encoder, Fill(encoder.in_chans)

    def forward(self, images: Float[Tensor, "B C H W"], mask: Mask) -> Features:
        painted = self.fill(rearrange(images, "b c h w -> b h w c"), mask.at(1))
        return self.encoder(rearrange(painted, "b h w c -> b c h w"))


def cover(encoder: Encoder) -> Hide:
    """How to hide cells from an encoder that computes them all: Replace, or Paint where patches share pixels."""
    return Paint(encoder) if encoder.overlaps else Replace(encoder)
