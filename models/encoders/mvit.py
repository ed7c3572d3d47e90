"""MViTv2, at any image size."""

from __future__ import annotations

from collections.abc import Sequence

from einops import rearrange
from timm.models.mvitv2 import MultiScaleAttention, cal_rel_pos_type, reshape_post_pool, reshape_pre_pool
from torch import Tensor

from models.encoders.pyramid import Pyramid
from models.encoders.resize import stretch


class MViT(Pyramid):
    """An MViTv2 of timm (Li et al., 2022), whose tables of relative positions are stretched to any grid.

    img_size: what the tables are made for; of two sides, the longer
    """

    stems = ("patch_embed.proj",)  # what follows it in timm's stem flattens the grid

    def __init__(self, name: str, in_chans: int = 3, img_size: int | Sequence[int] = 224, **timm_args):
        side = img_size if isinstance(img_size, int) else max(img_size)
        super().__init__(name, in_chans, img_size=side, **timm_args)
        for stage in self.backbone.stages:
            for block in stage.blocks:
                block.attn.__class__ = StretchedAttention  # the same parameters and names, another forward pass


class StretchedAttention(MultiScaleAttention):
    """timm's pooling attention: tokens (B, P + h * w, C) of a grid (h, w) -> tokens of the pooled grid, and that."""

    def forward(self, x: Tensor, feat_size: Sequence[int]) -> tuple[Tensor, Sequence[int]]:
        q, k, v = rearrange(self.qkv(x), "b n (t m d) -> t b m n d", t=3, m=self.num_heads)
        q, queries = self.pooled("q", q, feat_size)
        k, keys = self.pooled("k", k, feat_size)
        v, _ = self.pooled("v", v, feat_size)
        tables = zip((self.rel_pos_h, self.rel_pos_w), queries, keys)  # down and across
        tables = [stretch(table, 2 * max(sides) - 1) for table, *sides in tables]
        scores = (q * self.scale) @ k.transpose(-2, -1)
        scores = cal_rel_pos_type(scores, q, self.has_cls_token, queries, keys, *tables)
        x = scores.softmax(-1) @ v + q
        return self.proj(rearrange(x, "b m n d -> b n (m d)")), queries

    def pooled(self, which: str, x: Tensor, grid: Sequence[int]) -> tuple[Tensor, Sequence[int]]:
        pool, norm = getattr(self, f"pool_{which}"), getattr(self, f"norm_{which}")
        if pool is not None:
            x, token = reshape_pre_pool(x, grid, self.has_cls_token)
            x, grid = reshape_post_pool(pool(x), self.num_heads, token)
        return x if norm is None else norm(x), grid
