"""What is guessed: from features and mask to one vector for every cell of the target's grid.

A head is built from the encoder and the target it serves: widths, strides and units are read off, never configured.
"""

from __future__ import annotations

from functools import partial
from typing import Protocol, runtime_checkable

import torch
from einops import rearrange
from jaxtyping import Float
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from models.encoders.encoder import Encoder
from models.encoders.grid import Features, Mask
from models.encoders.layers import Cells, Fill, resample, sincos, xavier
from models.targets.limits import at_least, check_heads
from models.targets.target import Target


@runtime_checkable
class Head(Protocol):
    """Features of an image and its mask -> guesses (B, H / unit, W / unit, dim), for every cell."""

    def __call__(self, features: Features, mask: Mask) -> Float[Tensor, "B h w D"]: ...


class LinearHead(nn.Module):
    """One linear layer on the last map (SimMIM, MaskFeat, EVA)."""

    def __init__(self, encoder: Encoder, target: Target):
        super().__init__()
        self.cells = Cells(encoder.dims[-1], encoder.strides[-1], target.unit, target.dim)

    def forward(self, features: Features, mask: Mask) -> Float[Tensor, "B h w D"]:
        return self.cells(rearrange(features.maps[-1], "b c h w -> b h w c"))


class Decoder(nn.Module):
    """A small transformer over the last map (MAE, FastMIM).

    depth, width, heads, mlp_ratio: of its blocks
    fill:      write a learned token into the hidden cells, which an encoder that skips them left empty (MAE)
    positions: add sine-cosine positions (MAE; FastMIM's encoder saw every cell and does without both)
    """

    def __init__(self, encoder: Encoder, target: Target, depth: int = 8, width: int = 512, heads: int = 16,
                 mlp_ratio: float = 4.0, fill: bool = True, positions: bool = True):  # fmt: skip
        super().__init__()
        at_least(0, depth=depth)
        check_heads(width, heads)
        norm = partial(nn.LayerNorm, eps=norm_eps(encoder))
        self.stride, self.positions = encoder.strides[-1], positions
        if positions:
            sincos(1, 1, width)  # refuses a width by which it cannot tell places
        self.project = nn.Linear(encoder.dims[-1], width)
        block = partial(Block, width, heads, mlp_ratio, qkv_bias=True, norm_layer=norm)
        self.blocks = nn.Sequential(*(block() for _ in range(depth)))
        self.norm = norm(width)
        self.cells = Cells(width, self.stride, target.unit, target.dim)
        xavier(self)
        self.fill = Fill(width) if fill else None

    def forward(self, features: Features, mask: Mask) -> Float[Tensor, "B h w D"]:
        h, w = features.maps[-1].shape[-2:]
        return self.cells(self.tokens(features, mask)[:, -h * w :].unflatten(1, (h, w)))

    def tokens(self, features: Features, mask: Mask) -> Float[Tensor, "B n C"]:
        """What `cells` reads of the prefix and, after it, of every cell in raster order: (B, P + h w, width)."""
        x = self.project(self.read(features))
        _, h, w, _ = x.shape
        if self.fill is not None:
            x = self.fill(x, mask.at(self.stride))
        if self.positions:
            x = x + self.places(h, w)
        x = x.flatten(1, 2)
        if features.prefix is not None:
            x = torch.cat([self.project(features.prefix), x], 1)
        return self.norm(self.decode(x, mask))

    def decode(self, x: Float[Tensor, "B n C"], mask: Mask) -> Float[Tensor, "B n C"]:
        """The blocks, in which every token reads all others."""
        return self.blocks(x)

    def read(self, features: Features) -> Float[Tensor, "B h w C"]:
        return rearrange(features.maps[-1], "b c h w -> b h w c")

    def places(self, h: int, w: int) -> Float[Tensor, "h w C"]:
        return sincos(h, w, self.project.out_features, self.project.weight.device)


class FuseDecoder(Decoder):
    """A decoder over all maps, the finer brought to the last one's cells by convolutions without overlap (Hiera)."""

    def __init__(self, encoder: Encoder, target: Target, depth: int = 8, width: int = 512, heads: int = 16,
                 mlp_ratio: float = 4):  # fmt: skip
        super().__init__(encoder, target, depth, width, heads, positions=False, mlp_ratio=mlp_ratio)
        last, dim = self.stride, encoder.dims[-1]
        finer = [(d, last // stride) for d, stride in zip(encoder.dims, encoder.strides) if stride < last]
        self.fuse = nn.ModuleList(nn.Conv2d(d, dim, ratio, ratio) for d, ratio in finer)
        self.fused_norm = nn.LayerNorm(dim, eps=norm_eps(encoder))
        self.positions = True  # learned for the encoder's image size (224 px if it has none), else resampled
        self.grid = tuple(side * encoder.patch // last for side in encoder.grid or 2 * [224 // encoder.patch])
        self.table = nn.Parameter(0.02 * torch.randn(1, self.grid[0] * self.grid[1], width))

    def read(self, features: Features) -> Float[Tensor, "B h w C"]:
        x = features.maps[-1] + sum(conv(finer) for conv, finer in zip(self.fuse, features.maps))
        return self.fused_norm(rearrange(x, "b c h w -> b h w c"))

    def places(self, h: int, w: int) -> Float[Tensor, "h w C"]:
        return resample(self.table, self.grid, h, w)


class Unmix(nn.Module):
    """Let a head guess both images of each mixture, and give every image all its cells back (MixMIM)."""

    def __init__(self, head: Head, target: Target):
        super().__init__()
        self.head, self.unit = head, target.unit

    def forward(self, features: Features, mask: Mask) -> Float[Tensor, "B h w D"]:
        own = self.head(features, mask)  # the hidden cells of image i, from its visible ones
        partner = self.head(features, ~mask).flip(0)  # the reverse, from the mixture that holds its hidden ones
        return torch.where(mask.at(self.unit)[..., None], own, partner)


def norm_eps(encoder: Encoder) -> float:
    """The epsilon of an encoder's layer norms, which its published decoders share (1e-6 in ViTs, 1e-5 in Swins)."""
    return next((part.eps for part in encoder.modules() if isinstance(part, nn.LayerNorm)), 1e-6)
