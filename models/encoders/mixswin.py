"""MixMIM's Swin: windows stay in place; with a mask, the two sides of it do not see each other."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn

from models.encoders.grid import Features, Mask
from models.encoders.layers import resample, sincos, xavier
from models.encoders.pyramid import Pyramid


class MixSwin(Pyramid):
    """timm's Swin with fixed sine-cosine positions and without shifted windows (MixMIM, also called MixMAE).

    window_size: side of each stage's windows in its cells, cut to the grid of img_size
    pos_size:    side, in pixels, of the images whose positions are stretched over those of other sizes, as MixMIM's
                 fine-tuning does; by default each size has its own
    timm_args:   embed_dim, depths, num_heads, img_size, ... go to timm

    Images of any size go in: where windows do not fill a grid, nothing attends to the padding.
    """

    mixes = True

    def __init__(self, in_chans: int = 3, window_size: int | Sequence[int] = (14, 14, 14, 7),
                 drop_path_rate: float = 0.0, pos_size: int | None = None, **timm_args):  # fmt: skip
        windows = window_size if isinstance(window_size, int) else [(side, side) for side in window_size]
        timm_args |= {"window_size": windows, "drop_path_rate": drop_path_rate}
        super().__init__("swin_base_patch4_window7_224", in_chans, **timm_args)
        xavier(self.backbone)
        self.pos_side = pos_size and pos_size // self.patch

    @property
    def layers(self) -> list[list[nn.Parameter]]:
        layers = [list(self.stem.parameters())]
        for stage in self.backbone.layers:  # a merging layer learns with the block that follows
            first, *rest = ([*block.parameters()] for block in stage.blocks)
            layers += [[*stage.downsample.parameters(), *first], *rest]
        return layers

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        self.checkpointing = enable

    def encode(self, tokens: Float[Tensor, "B h w D"], mask: Mask | None = None) -> Features:
        """As any encoder's; with a mask, hidden cells are computed too, from hidden ones alone."""
        x, maps = tokens + self.positions(*tokens.shape[1:], tokens.device), []
        for stage, stride in zip(self.backbone.layers, self.strides):
            x = stage.downsample(x)  # merges places of one cell
            walls = build_walls(x, stage.blocks[0].window_size, None if mask is None else mask.at(stride))
            for block in stage.blocks:
                x = self.run(walled_block, block, x, walls)
            maps.append(x)
        maps[-1] = self.backbone.norm(x)
        return Features([rearrange(m, "b h w c -> b c h w") for m in maps])

    def positions(self, h: int, w: int, dim: int, device: torch.device) -> Float[Tensor, "h w C"]:
        if self.pos_side is None:
            return sincos(h, w, dim, device)
        table = sincos(self.pos_side, self.pos_side, dim, device).flatten(0, 1)[None]
        return resample(table, (self.pos_side, self.pos_side), h, w)


def build_walls(x: Tensor, window: tuple[int, int], hidden: Tensor | None) -> Tensor | None:
    """What is added to attention within windows: -inf between places that must not see each other, 0 between others.

    x:      (B, h, w, C), cut into windows; padding that fills the last of them is seen by none
    hidden: (B, h, w) bool, the places to be kept apart from all others
    gives:  (B * windows, n, n) for the n places of each window; (windows, n, n) or None, if all images have the same
    """
    (_, h, w, _), (p, q) = x.shape, window
    padding = (0, -w % q, 0, -h % p)
    if hidden is None and not any(padding):
        return None
    sides = torch.zeros_like(x[:1, ..., 0]) if hidden is None else hidden
    sides = F.pad(sides.byte(), padding, value=2)
    sides = rearrange(sides, "b (i p) (j q) -> (b i j) (p q)", p=p, q=q)
    apart = sides[:, :, None] != sides[:, None]
    return torch.zeros_like(apart, dtype=x.dtype).masked_fill(apart, -math.inf)


def walled_block(block: nn.Module, x: Tensor, walls: Tensor | None) -> Tensor:
    """timm's Swin block with such walls in its windows: (B, h, w, C) -> (B, h, w, C)."""
    (_, h, w, _), (p, q) = x.shape, block.window_size
    y = F.pad(block.norm1(x), (0, 0, 0, -w % q, 0, -h % p))
    windows = rearrange(y, "b (i p) (j q) c -> (b i j) (p q) c", p=p, q=q)
    sizes = {"i": y.shape[1] // p, "j": y.shape[2] // q, "p": p, "q": q}
    y = rearrange(block.attn(windows, walls), "(b i j) (p q) c -> b (i p) (j q) c", **sizes)
    x = x + block.drop_path1(y[:, :h, :w])
    return x + block.drop_path2(block.mlp(block.norm2(x)))
