"""Plain vision transformers of timm; with a mask, hidden tokens are dropped."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import timm
import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float
from timm.models import model_entrypoint
from timm.models.beit import Beit, gen_relative_position_index
from torch import Tensor, nn

from models.encoders.encoder import Encoder
from models.encoders.grid import Features, Mask
from models.encoders.layers import resample, shorten, sincos, xavier


class ViT(Encoder):
    """Any of timm's plain transformers (ViT, DeiT, CLIP, DINO, BEiT, EVA) at any image size that its patches divide.

    name:       timm's name of the architecture; `timm_args` go to timm (depth, drop_path_rate, img_size, ...)
    taps:       blocks whose outputs become maps, counted from 0 or, if negative, from the end
    position:   "learned", or "sincos": MAE's fixed table, exact at every grid
    init:       "timm", or "xavier" as MAE's code does
    drop_last:  blocks left out at the end; the rest is as in the whole encoder
    final_norm: without it the maps come straight from the blocks (mean pooling in fine-tuning norms after the mean)
    norm_eps:   of all layer norms, where it is not the architecture's
    """

    skips = True

    def __init__(self, name: str, in_chans: int = 3, taps: Sequence[int] = (-1,), position: str = "learned",
                 init: str = "timm", final_norm: bool = True, norm_eps: float | None = None, drop_last: int = 0,
                 **timm_args):  # fmt: skip
        super().__init__()
        if position not in ("learned", "sincos") or init not in ("timm", "xavier"):
            raise ValueError(f'position "{position}" is not learned or sincos, or init "{init}" not timm or xavier')
        if not model_entrypoint(name).__module__.endswith(".beit"):
            timm_args = {"dynamic_img_size": True, **timm_args}  # rotary angles are then made for any grid
        norms = {} if norm_eps is None else {"norm_layer": partial(nn.LayerNorm, eps=norm_eps)}
        pool = "token" if "_distilled_" in name else ""  # without pooling, timm leaves nothing after the final norm
        timm_args = {"num_classes": 0, "global_pool": pool} | norms | timm_args
        self.vit = vit = timm.create_model(name, in_chans=in_chans, **timm_args)
        shorten(vit, drop_last)
        self.in_chans, self.width, self.normed = in_chans, vit.embed_dim, final_norm
        self.patch, across = vit.patch_embed.patch_size
        if self.patch != across:
            raise ValueError(f"{name} has patches of {self.patch} x {across} px: only square ones can be masked")
        depth = len(vit.blocks)
        if not all(-depth <= tap < depth for tap in taps):
            raise ValueError(f"taps are {tuple(taps)}, but there are blocks 0 to {depth - 1}")
        self.taps = sorted(tap % depth for tap in taps)
        self.strides, self.dims = [self.patch] * len(taps), [self.width] * len(taps)
        self.grid = tuple(vit.patch_embed.grid_size)
        vit.norm_pre = getattr(vit, "norm_pre", nn.Identity())  # BEiT has none
        vit.norm = vit.norm if final_norm else nn.Identity()
        self.tables, self.fixed = take_bias_tables(vit), position == "sincos"
        if init == "xavier":
            xavier(vit)
            for token in prefix_tokens(vit):
                nn.init.normal_(token, std=0.02)
        if self.fixed:
            table = sincos(*self.grid, self.width).flatten(0, 1)
            vit.pos_embed.requires_grad_(False).zero_()[:, -len(table) :].copy_(table)

    @property
    def layers(self) -> list[list[nn.Parameter]]:
        blocks = [list(block.parameters()) for block in self.vit.blocks]
        if len(self.tables) == len(blocks):
            blocks = [[*block, table] for block, table in zip(blocks, self.tables)]
        tail = {id(p) for p in self.vit.norm.parameters()} | {id(p) for p in self.tables}  # a shared table has scale 1
        inner = tail | {id(p) for block in blocks for p in block}
        return [[p for p in self.vit.parameters() if id(p) not in inner], *blocks]

    def embed(self, images: Float[Tensor, "B C H W"]) -> Float[Tensor, "B h w D"]:
        check_sides(images, self.patch)
        stem = self.vit.patch_embed
        return stem.norm(rearrange(stem.proj(images), "b c h w -> b h w c"))

    def encode(self, tokens: Float[Tensor, "B h w D"], mask: Mask | None = None) -> Features:
        vit, (b, h, w, _) = self.vit, tokens.shape
        seen = None if mask is None else mask.visible(self.patch)  # (B, n)
        x, p, hints = self.enter(tokens, seen)
        taps = []
        for i, (block, told) in enumerate(zip(vit.blocks, hints)):
            x = self.run(block, x, **told)
            if i in self.taps:
                taps.append(vit.norm(x))
        maps = [tap[:, p:] for tap in taps]
        if seen is not None:  # back to their places, zeros where hidden
            places = seen[..., None].expand(-1, -1, self.width)
            maps = [m.new_zeros(b, h * w, self.width).scatter(1, places, m) for m in maps]
        maps = [rearrange(m, "b (h w) c -> b c h w", h=h) for m in maps]
        return Features(maps, taps[-1][:, :p] if p else None)

    def enter(self, tokens: Float[Tensor, "B h w D"], seen: Tensor | None = None) -> tuple[Tensor, int, list[dict]]:
        """What the blocks read, of all places or those `seen` (B, n): (B, P + n, C), P, and the hints for each."""
        vit, (b, h, w, _) = self.vit, tokens.shape
        prefix, position = self.prefix_and_position(h, w)
        x, p = tokens.flatten(1, 2) + position, prefix.shape[1]
        if seen is not None:
            x = x.gather(1, seen[..., None].expand(-1, -1, self.width))
        x = vit.norm_pre(vit.pos_drop(torch.cat([prefix.expand(b, -1, -1), x], 1)))
        return x, p, self.hints(h, w, p, seen)

    def prefix_and_position(self, h: int, w: int) -> tuple[Tensor, Tensor]:
        """The prefix tokens with their positions (1, P, C), and the positions of an h x w grid (1, h * w, C)."""
        vit = self.vit
        tokens = prefix_tokens(vit)
        prefix = torch.cat(tokens, 1) if tokens else vit.patch_embed.proj.weight.new_zeros(1, 0, self.width)
        if vit.pos_embed is None:
            return prefix, prefix.new_zeros(1, 1, self.width)
        n = 0 if getattr(vit, "no_embed_class", False) else prefix.shape[1]
        table, positions = vit.pos_embed[:, :n], vit.pos_embed[:, n:]
        if (h, w) != self.grid:
            other = sincos(h, w, self.width, positions.device) if self.fixed else resample(positions, self.grid, h, w)
            positions = other.flatten(0, 1)[None].to(positions.dtype)
        return (prefix + table if n else prefix), positions

    def hints(self, h: int, w: int, p: int, seen: Tensor | None) -> list[dict]:
        """What each block is told about places: rotary angles (EVA-02, DINOv3) or attention biases (BEiT, SimMIM)."""
        depth = len(self.vit.blocks)
        if len(self.tables):
            index = gen_relative_position_index((h, w), device=self.tables[0].device)  # (1 + hw, 1 + hw)
            rows = None if seen is None else F.pad(seen + 1, (p, 0))  # the class token is row 0
            biases = [self.bias(table, index, h, w, rows) for table in self.tables]
            return [{"shared_rel_pos_bias": biases[i % len(biases)]} for i in range(depth)]
        if getattr(self.vit, "rope", None) is None:
            return [{}] * depth
        angles = self.vit.rope.get_embed((h, w))  # (hw, d), or (depth, heads, hw, d) where each head learns its own
        if seen is not None:
            angles = angles[..., seen, :]  # (B, n, d) or (depth, heads, B, n, d)
            angles = angles[:, None] if angles.ndim == 3 else angles.transpose(1, 2)
        each = angles.ndim > 3 and len(angles) == depth and getattr(self.vit, "rope_mixed", False)
        return [{"rope": angles[i] if each else angles} for i in range(depth)]

    def bias(self, table: Tensor, index: Tensor, h: int, w: int, rows: Tensor | None) -> Tensor:
        """Attention biases between places (1, heads, 1 + hw, 1 + hw), or visible ones (B, heads, 1 + n, 1 + n)."""
        if (h, w) != self.grid:
            places, rest = table[:-3], table[-3:]
            square = rearrange(places, "(p q) m -> 1 m p q", p=2 * self.grid[0] - 1)
            square = F.interpolate(square.float(), (2 * h - 1, 2 * w - 1), mode="bicubic").to(table.dtype)
            table = torch.cat([rearrange(square, "1 m p q -> (p q) m"), rest])
        if rows is not None:
            index = index[rows[:, :, None], rows[:, None, :]]  # (B, 1 + n, 1 + n)
        bias = table[index].movedim(-1, -3)
        return bias if rows is not None else bias[None]


def check_sides(images: Tensor, patch: int, what: str = "patches") -> None:
    """ValueError, naming the nearest sizes, if patches do not divide the image's sides."""
    for side in images.shape[-2:]:
        if side % patch:
            low = max(side // patch, 1) * patch
            near = f"{low} or {low + patch} px"
            raise ValueError(f"an image side of {side} px does not divide into {what} of {patch} px: use {near}")


def prefix_tokens(vit: nn.Module) -> list[nn.Parameter]:
    """Class, distillation and register tokens, in the order in which timm puts them."""
    tokens = (getattr(vit, key, None) for key in ("cls_token", "dist_token", "reg_token"))
    return [token for token in tokens if token is not None]


def take_bias_tables(vit: nn.Module) -> nn.ParameterList:
    """Take the relative position tables out of a BEiT: none, one for all blocks, or one for each.

    timm's blocks then only see the biases they are handed, which this module computes for any grid and any mask.
    """
    if not isinstance(vit, Beit):
        return nn.ParameterList()
    tables = []
    for part in [vit.rel_pos_bias, *(block.attn for block in vit.blocks)]:
        if part is not None and part.relative_position_bias_table is not None:
            tables.append(part.relative_position_bias_table)
            part.relative_position_bias_table = None
    vit.rel_pos_bias = None
    return nn.ParameterList(tables)
