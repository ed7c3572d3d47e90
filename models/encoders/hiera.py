"""Hiera: attention within mask units, then everywhere, pooling always within: hidden units are dropped whole."""

from __future__ import annotations

import timm
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn

from models.encoders.encoder import Encoder
from models.encoders.grid import Features, Mask
from models.encoders.layers import resample, xavier
from models.encoders.vit import check_sides


class Hiera(Encoder):
    """timm's Hiera at any image size that its mask units of 32 px divide (Ryali et al., 2023).

    name:   timm's name of the architecture; `timm_args` go to timm (drop_path_rate, img_size, ...)
    q_pool: how many stages begin by pooling 2 x 2 places: 3 to classify (last stride 32), 2 to pretrain (16)
    init:   "timm", or "xavier" as its pretraining code does
    """

    skips, normed = True, False  # timm's norm comes after the mean over places

    def __init__(self, name: str, in_chans: int = 3, q_pool: int = 3, init: str = "timm", **timm_args):
        super().__init__()
        self.backbone = backbone = timm.create_model(name, in_chans=in_chans, num_classes=0, q_pool=q_pool, **timm_args)
        self.stem, backbone.patch_embed, backbone.head = backbone.patch_embed, nn.Identity(), nn.Identity()
        stages, conv = range(len(backbone.stage_ends)), self.stem.proj
        self.side = 2 ** stages[-1]  # of a mask unit, in tokens: each later stage may pool
        if max(backbone.mask_unit_size) > self.side or set(backbone.q_stride) != {2}:
            raise ValueError(f"with {len(stages)} stages, q_stride is (2, 2) and mask_unit_size at most {self.side}")
        self.in_chans, self.patch, self.width = in_chans, conv.stride[0], conv.out_channels
        self.grid, self.overlaps = tuple(backbone.tokens_spatial_shape), conv.kernel_size[0] > self.patch
        self.strides = [self.patch * 2 ** min(stage, q_pool) for stage in stages]
        self.dims = [info["num_chs"] for info in backbone.feature_info]
        if init not in ("timm", "xavier"):
            raise ValueError(f'init "{init}" is not timm or xavier')
        if init == "xavier":
            xavier(self)

    @property
    def mask_unit(self) -> int:
        return self.patch * self.side

    @property
    def layers(self) -> list[list[nn.Parameter]]:
        blocks = [list(block.parameters()) for block in self.backbone.blocks]
        inner = {id(p) for block in blocks for p in block}
        return [[p for p in self.parameters() if id(p) not in inner], *blocks]

    def embed(self, images: Float[Tensor, "B C H W"]) -> Float[Tensor, "B h w D"]:
        check_sides(images, self.mask_unit, "mask units")
        return rearrange(self.stem.proj(images), "b c h w -> b h w c")

    def encode(self, tokens: Float[Tensor, "B h w D"], mask: Mask | None = None) -> Features:
        x, maps = tokens + self.positions(*tokens.shape[1:3]), []
        x = rearrange(x, "b (h p) (w q) c -> b h w p q c", p=self.side, q=self.side)
        (b, h, w), x = x.shape[:3], x.flatten(1, 2)  # (B, mask units, p, q, C)
        if mask is not None:
            seen = mask.visible(self.mask_unit)[:, :, None, None, None]  # (B, n, 1, 1, 1)
            x = x.take_along_dim(seen, 1)
        n, x = x.shape[1], unroll(x)
        for i, block in enumerate(self.backbone.blocks):
            x = self.run(block, x)
            if i in self.backbone.stage_ends:
                m = roll(x, n)
                if mask is not None:  # back to their places, zeros where hidden
                    m = m.new_zeros(b, h * w, *m.shape[2:]).scatter(1, seen.expand_as(m), m)
                maps.append(rearrange(m, "b (h w) p q c -> b c (h p) (w q)", h=h))
        return Features(maps)

    def positions(self, h: int, w: int) -> Float[Tensor, "h w D"]:
        """A table for the whole image; or one for the whole image and one for a unit, repeated (abswin)."""
        table, unit = self.backbone.pos_embed, self.backbone.pos_embed_win
        if unit is None:
            return resample(table, self.grid, h, w)
        table = F.interpolate(table, (h, w), mode="bicubic", antialias=True)
        return rearrange(table + unit.tile(h // self.side, w // self.side), "1 c h w -> h w c")


def unroll(x: Float[Tensor, "B n p p C"]) -> Float[Tensor, "B N C"]:
    """Tokens of units in the order of timm's blocks: next to each other lie those of the same place in all units."""
    while x.shape[2] > 1:
        x = rearrange(x, "b n (y p) (x q) c -> b (y x n) p q c", y=2, x=2)
    return x[:, :, 0, 0]


def roll(x: Float[Tensor, "B N C"], n: int) -> Float[Tensor, "B n p p C"]:
    """The way back, into `n` units, from whatever pooling has left of them."""
    x = x[:, :, None, None]
    while x.shape[1] > n:
        x = rearrange(x, "b (y x n) p q c -> b n (y p) (x q) c", y=2, x=2)
    return x
