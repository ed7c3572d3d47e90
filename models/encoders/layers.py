"""Small parts that encoders and heads share."""

from __future__ import annotations

import torch
from einops import rearrange
from jaxtyping import Bool, Float, Int
from timm.layers import resample_abs_pos_embed
from torch import Tensor, nn


class Fill(nn.Module):
    """Write one learned vector into the hidden cells: (B, h, w, C), (B, h, w) bool -> (B, h, w, C).

    It is SimMIM's and MAE's mask token and FastMIM's colour.
    """

    def __init__(self, dim: int, std: float = 0.02):
        super().__init__()
        self.token = nn.Parameter(torch.zeros(1, dim))
        nn.init.normal_(self.token, std=std)

    def forward(self, x: Float[Tensor, "B h w C"], hidden: Bool[Tensor, "B h w"]) -> Float[Tensor, "B h w C"]:
        return torch.where(hidden[..., None], self.token.to(x.dtype), x)


class Cells(nn.Module):
    """Predict `dim` numbers for every `unit` px cell from a map whose cells have `stride` px.

    (B, H / stride, W / stride, width) -> (B, H / unit, W / unit, dim)
    """

    def __init__(self, width: int, stride: int, unit: int, dim: int):
        super().__init__()
        self.split = stride // unit
        self.linear = nn.Linear(width, self.split**2 * dim)

    def forward(self, x: Float[Tensor, "B h w C"]) -> Float[Tensor, "B rows columns D"]:
        return rearrange(self.linear(x), "b h w (p q d) -> b (h p) (w q) d", p=self.split, q=self.split)


def norm_visible(norm: nn.Module, x: Float[Tensor, "B C h w"], seen: Int[Tensor, "B n"]) -> Float[Tensor, "B C h w"]:
    """Norm as if hidden places did not exist: statistics from the visible ones alone, zeros elsewhere (SparK).

    seen: flat indices of the visible places, from `Mask.visible`
    """
    places = seen[:, None].expand(-1, x.shape[1], -1)  # (B, C, n)
    y = norm(x.flatten(2).gather(2, places)[..., None])[..., 0]
    return y.new_zeros(x.shape).flatten(2).scatter(2, places, y).view(x.shape)


def sincos(h: int, w: int, dim: int, device: torch.device | None = None) -> Float[Tensor, "h w C"]:
    """Fixed 2D sine-cosine positions: (h, w, dim); the first half of the channels tells the column (MAE)."""
    if dim % 4:
        near = f"{dim // 4 * 4} or {dim // 4 * 4 + 4}"
        raise ValueError(f"sine-cosine positions need a width that 4 divides, not {dim}: use {near}")
    omega = 10000 ** -(torch.arange(dim // 4, device=device, dtype=torch.float64) / (dim / 4))
    row, column = torch.meshgrid(torch.arange(h, device=device), torch.arange(w, device=device), indexing="ij")
    angles = [column[..., None] * omega, row[..., None] * omega]
    return torch.cat([wave for angle in angles for wave in (angle.sin(), angle.cos())], -1).float()


def resample(table: Float[Tensor, "1 n C"], grid: tuple[int, int], h: int, w: int) -> Float[Tensor, "h w C"]:
    """The learned positions of a grid for another one, by bicubic interpolation: (1, n, C) -> (h, w, C)."""
    if (h, w) != grid:
        table = resample_abs_pos_embed(table, (h, w), grid, num_prefix_tokens=0, antialias=False)
    return table[0].unflatten(0, (h, w))


def shorten(model: nn.Module, blocks: int) -> int:
    """Leave out so many blocks at the end; gives how many stages go whole, and with them the norm after the last.

    ValueError if the model has no blocks, or none would be left.
    """
    place = "stages" if hasattr(model, "stages") else "layers"
    stages = kept = getattr(model, place, [model])
    if not all(hasattr(stage, "blocks") for stage in stages):
        raise ValueError("drop_last: not made of stages of blocks: leave it out, or take a ViT, Swin or ConvNeXt")
    count = sum(len(stage.blocks) for stage in stages)
    if not 0 <= blocks < count:
        raise ValueError(f"drop_last is {blocks} of {count} blocks: it must be from 0 to {count - 1}, so one stays")
    while blocks >= len(kept[-1].blocks):
        blocks -= len(kept[-1].blocks)
        kept = kept[:-1]
    kept[-1].blocks = kept[-1].blocks[: len(kept[-1].blocks) - blocks]
    if len(kept) < len(stages):
        setattr(model, place, kept)
        model.norm = nn.Identity()
    return len(stages) - len(kept)


def xavier(module: nn.Module) -> None:
    """Initialise linear layers and patch projections as MAE does: Xavier uniform on the flattened kernel, biases 0."""
    for part in module.modules():
        if isinstance(part, (nn.Linear, nn.Conv2d)):
            nn.init.xavier_uniform_(part.weight.data.flatten(1))
            if part.bias is not None:
                nn.init.zeros_(part.bias)


def truncated(module: nn.Module) -> None:
    """Initialise as ConvNeXt does: narrow normal weights, biases 0; SparK's transposed convolutions keep variances."""
    for part in module.modules():
        if isinstance(part, nn.ConvTranspose2d):
            nn.init.kaiming_normal_(part.weight, mode="fan_out", nonlinearity="relu")
        elif isinstance(part, (nn.Linear, nn.Conv2d)):
            nn.init.trunc_normal_(part.weight, std=0.02)
        if getattr(part, "bias", None) is not None:
            nn.init.zeros_(part.bias)
