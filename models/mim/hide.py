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
    """(B, C, H, W) images and a mask -> what the encoder makes of the visible cells.

    pairs: every cell is hidden once: two images share a mask, each is encoded by its visible and by its hidden cells
    """

    encoder: Encoder
    pairs: bool

    def __call__(self, images: Float[Tensor, "B C H W"], mask: Mask) -> Features: ...


class Skip(nn.Module):
    """Leave hidden cells out of the computation; their features are zeros (MAE, FCMAE)."""

    pairs = False

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

    pairs = False

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

    pairs = False

    def __init__(self, encoder: Encoder):
        super().__init__()
        self.encoder, self.fill = encoder, Fill(encoder.in_chans)

    def forward(self, images: Float[Tensor, "B C H W"], mask: Mask) -> Features:
        painted = self.fill(rearrange(images, "b c h w -> b h w c"), mask.at(1))
        return self.encoder(rearrange(painted, "b h w c -> b c h w"))


class Mix(nn.Module):
    """Put another image's patches in place of the hidden ones, the two kept apart; one mask for all (MixMIM).

    Image i is paired with image B - 1 - i. Since the two sides never see each other, a pairing changes nothing but
    where things lie: when evaluating, an odd batch's middle image is its own partner, and nothing leaks.
    """

    pairs = True

    def __init__(self, encoder: Encoder):
        super().__init__()
        if not encoder.mixes:
            raise ValueError(
                f"Mix needs an encoder that keeps the two sides of a mask apart (mixmim_base, ...); "
                f"{type(encoder).__name__} does not: hide with Skip (mae), Replace (simmim) or Paint (fastmim) instead"
            )
        self.encoder = encoder

    def forward(self, images: Float[Tensor, "B C H W"], mask: Mask) -> Features:
        if self.training and len(images) % 2:
            raise ValueError(
                f"mixing pairs the images of a batch: an even batch per device is needed, not {len(images)}"
            )
        tokens = self.encoder.embed(images)
        mixed = torch.where(mask.at(self.encoder.patch)[..., None], tokens.flip(0), tokens)
        return self.encoder.encode(mixed, mask)
