"""CSWin Transformer: attention in the upright and level stripes of a cross (Dong et al., 2022)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float
from timm.layers import DropPath, LayerNorm2d, Mlp, calculate_drop_path_rates
from timm.models.vision_transformer import init_weights_vit_timm
from torch import Tensor, nn

from models.encoders.encoder import Encoder, refuse_mask
from models.encoders.grid import Features, Mask
from models.encoders.layers import shorten


class CSWin(Encoder):
    """A CSWin Transformer, at any image size.

    embed_dim: channels of the stem; each stage doubles them
    depths, num_heads: blocks of each stage, attention heads of each block
    stripes:   width of a stripe in cells, in each stage but the last, where everything attends to everything. A width
               that does not divide the grid gives way to the widest narrower one that does: 7 cells stay 7 of 14 (a
               224 px image), but become 4 of 8 (128 px), 5 of 10 (160 px), 6 of 12 (192 px)
    drop_last: blocks left out at the end
    """

    overlaps = True

    def __init__(self, in_chans: int = 3, embed_dim: int = 64, depths: Sequence[int] = (1, 2, 21, 1),
                 num_heads: Sequence[int] = (2, 4, 8, 16), stripes: Sequence[int] = (1, 2, 7),
                 drop_path_rate: float = 0.0, drop_last: int = 0):  # fmt: skip
        super().__init__()
        if not len(depths) == len(num_heads) == len(stripes) + 1:
            raise ValueError("depths and num_heads have an entry for each stage, stripes for each but the last")
        widths = [embed_dim * 2**i for i in range(len(depths))]
        if any(heads % 2 or width % heads for width, heads in zip(widths, num_heads)):
            raise ValueError(f"num_heads {tuple(num_heads)} must be even and divide the widths {tuple(widths)}")
        self.in_chans, self.patch, self.width = in_chans, 4, embed_dim
        self.stem, self.stages = shrink(in_chans, embed_dim, 7, 4, 2), nn.ModuleList()
        rates = calculate_drop_path_rates(drop_path_rate, depths, stagewise=True)
        sizes = zip([0, *widths[:-1]], widths, num_heads, [*stripes, None], rates)
        for before, width, heads, stripe, rate in sizes:
            stage = nn.Module()
            stage.downsample = shrink(before, width, 3, 2, 1) if before else nn.Identity()
            stage.blocks = nn.ModuleList(Block(width, heads, stripe, r) for r in rate)
            self.stages.append(stage)
        self.norm = LayerNorm2d(widths[-1], eps=1e-5)
        self.normed = shorten(self, drop_last) == 0
        self.dims, self.strides = widths[: len(self.stages)], [4 * 2**i for i in range(len(self.stages))]
        self.apply(init_weights_vit_timm)

    @property
    def layers(self) -> list[list[nn.Parameter]]:
        layers = [list(self.stem.parameters())]
        for stage in self.stages:
            layers[-1] += stage.downsample.parameters()  # it learns at the pace of the stage that it ends
            layers += [list(block.parameters()) for block in stage.blocks]
        return layers

    def embed(self, images: Float[Tensor, "B C H W"]) -> Float[Tensor, "B h w D"]:
        return rearrange(self.stem(images), "b c h w -> b h w c")

    def encode(self, tokens: Float[Tensor, "B h w D"], mask: Mask | None = None) -> Features:
        refuse_mask(mask)
        maps = [rearrange(tokens, "b h w c -> b c h w")]
        for stage in self.stages:
            x = rearrange(stage.downsample(maps[-1]), "b c h w -> b h w c")
            for block in stage.blocks:
                x = self.run(block, x)
            maps.append(rearrange(x, "b h w c -> b c h w"))
        return Features([*maps[1:-1], self.norm(maps[-1])])


def shrink(width: int, to: int, kernel: int, stride: int, padding: int) -> nn.Module:
    return nn.Sequential(nn.Conv2d(width, to, kernel, stride, padding), LayerNorm2d(to, eps=1e-5))


class Block(nn.Module):
    """Attention, half of the heads in upright and half in level stripes, then an MLP."""

    def __init__(self, width: int, heads: int, stripe: int | None, drop_path: float):
        super().__init__()
        half = width // 2
        self.heads, self.stripe, self.drop_path = heads // 2, stripe, DropPath(drop_path)
        self.norm1, self.norm2, self.mlp = nn.LayerNorm(width), nn.LayerNorm(width), Mlp(width, 4 * width)
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.upright, self.level = (nn.Conv2d(half, half, 3, padding=1, groups=half) for _ in range(2))

    def forward(self, x: Float[Tensor, "B h w C"]) -> Float[Tensor, "B h w C"]:
        h, w = x.shape[1:3]
        upright, level = rearrange(self.qkv(self.norm1(x)), "b h w (t s c) -> s t b h w c", t=3, s=2)
        upright = self.attend(upright, self.upright, h, fitting(self.stripe, w))
        level = self.attend(level, self.level, fitting(self.stripe, h), w)
        x = x + self.drop_path(self.proj(torch.cat([upright, level], -1)))
        return x + self.drop_path(self.mlp(self.norm2(x)))

    def attend(self, qkv: Tensor, place: nn.Module, rows: int, columns: int) -> Tensor:
        """Attention within stripes of rows x columns cells; a convolution of the values tells the place (LePE)."""
        b, h, size = qkv.shape[1], qkv.shape[2], {"p": rows, "q": columns}
        q, k, v = rearrange(qkv, "t b (i p) (j q) (m d) -> t (b i j) m (p q) d", m=self.heads, **size)
        x = rearrange(F.scaled_dot_product_attention(q, k, v), "n m (p q) d -> n (m d) p q", **size)
        x = x + place(rearrange(v, "n m (p q) d -> n (m d) p q", **size))
        return rearrange(x, "(b i j) c p q -> b (i p) (j q) c", b=b, i=h // rows)


def fitting(stripe: int | None, side: int) -> int:
    """The widest stripe up to a width that divides a side of the grid; the whole side where no width is given."""
    return side if stripe is None else max(n for n in range(1, stripe + 1) if side % n == 0)
