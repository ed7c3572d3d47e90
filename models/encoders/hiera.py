"""Hiera; with a mask, hidden mask units are dropped."""

from __future__ import annotations

import timm
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from models.encoders.encoder import Encoder
from models.encoders.grid import Features, Mask
from models.encoders.layers import resample, xavier
from models.encoders.vit import check_sides


class Hiera(Encoder):
    """timm's Hiera at any image size that its mask units of 32 px divide (Ryali et al., 2023).

    name:   timm's name of the architecture; `timm_args` go to timm (drop_path_rate, img_size, ...)
    q_pool: how many stages begin by pooling 2 x 2 places: 3 to classify (last stride 32), 2 to pretrain (16)
    init:   "timm", or "xavier" as its pretraining code does

    The early stages attend within mask units, the late ones everywhere. Pooling never crosses a unit either, so units
    can be dropped whole, and what is left runs through the same blocks.
    """

    skips, normed = True, False

    def __init__(self, name: str, in_chans: int = 3, q_pool: int = 3, init: str = "timm", **timm_args):
        super().__init__()
        self.backbone = backbone = timm.create_model(name, in_chans=in_chans, num_classes=0, q_pool=q_pool, **timm_args)
        self.stem, backbone.patch_embed = backbone.patch_embed, nn.Identity()
        backbone.head = nn.Identity()  # it norms after the mean over places
        stages, conv = range(len(backbone.stage_ends)), self.stem.proj
        self.side = 2 ** stages[-1]  # of a mask unit, in tokens: each later stage may pool
        if (*backbone.mask_unit_size, *backbone.q_stride) != (self.side, self.side, 2, 2):
            raise ValueError(
                f"a Hiera of {len(stages)} stages has mask units of {self.side} x {self.side} tokens and pools 2 x 2, "
                f"not units of {backbone.mask_unit_size} and {backbone.q_stride}"
            )
        self.in_chans, self.patch, self.width = in_chans, conv.stride[0], conv.out_channels
        self.overlaps = conv.kernel_size[0] > self.patch
        self.grid = tuple(backbone.tokens_spatial_shape)
        self.strides = [self.patch * 2 ** min(stage, q_pool) for stage in stages]
        self.dims = [info["num_chs"] for info in backbone.feature_info]
        self.checkpointing = False
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

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        self.checkpointing = enable

    def embed(self, images: Float[Tensor, "B C H W"]) -> Float[Tensor, "B h w D"]:
        check_sides(images, self.mask_unit, "mask units")
        return rearrange(self.stem.proj(images), "b c h w -> b h w c")

    def encode(self, tokens: Float[Tensor, "B h w D"], mask: Mask | None = None) -> Features:
        x, maps = tokens + self.positions(*tokens.shape[1:3]), []
        x = rearrange(x, "b (h p) (w q) c -> b h w p q c", p=self.side, q=self.side)
        b, h, w, *_ = x.shape  # mask units down and across
        x = x.flatten(1, 2)
        seen = None if mask is None else mask.visible(self.mask_unit)[:, :, None, None, None]  # (B, n, 1, 1, 1)
        if seen is not None:
            x = x.take_along_dim(seen, 1)
        n, x = x.shape[1], unroll(x)
        for i, block in enumerate(self.backbone.blocks):
            x = checkpoint(block, x, use_reentrant=False) if self.checkpointing else block(x)
            if i in self.backbone.stage_ends:
                units = roll(x, n)  # (B, n, p, q, C)
                if seen is not None:  # back to their places, zeros where hidden
                    empty = units.new_zeros(b, h * w, *units.shape[2:])
                    units = empty.scatter(1, seen.expand_as(units), units)
                maps.append(rearrange(units, "b (h w) p q c -> b c (h p) (w q)", h=h))
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
