"""A frozen image tower (CLIP, SLIP, DINO, EVA-CLIP) that says what is to be seen in each cell of an image."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float
from timm.models.vision_transformer import Attention
from torch import Tensor, nn

from models.encoders.encoder import Encoder


@dataclass
class Tokens:
    """What a tower makes of images.

    cells:     (B, h, w, D) features of each patch
    prefix:    (B, P, D) of the class token, which comes first, and registers
    attention: (B, h, w) of the class token to each patch in the last block, averaged over heads; if asked for
    """

    cells: Float[Tensor, "B h w D"]
    prefix: Float[Tensor, "B P D"]
    attention: Float[Tensor, "B h w"] | None = None


class Tower(nn.Module):
    """A plain transformer and the projection that follows it, of all tokens: frozen, in evaluation mode for ever.

    encoder:   a ViT
    project:   a linear layer, or nn.Identity
    mean, std: of each channel on the scale of [0, 1], with which the tower learned
    dtype:     of its weight matrices and their products; norms and sums stay in float32

    PyTorch does not know its parts, which are in a tuple: they have no place among parameters, in state dicts or
    checkpoints, and train() or DDP do not reach them. They follow to(device).
    """

    def __init__(
        self,
        encoder: Encoder,
        project: nn.Module,
        mean: Sequence[float],
        std: Sequence[float],
        dtype: torch.dtype = torch.bfloat16,
    ):
        super().__init__()
        self.parts = (encoder.eval().requires_grad_(False), project.eval().requires_grad_(False))
        self.in_chans, self.patch = encoder.in_chans, encoder.patch
        self.dim = getattr(project, "out_features", encoder.width)
        self.mean, self.std, self.dtype = mean, std, dtype
        self.attends = bool(encoder.vit.cls_token is not None and isinstance(encoder.vit.blocks[-1].attn, Attention))
        for part in (*encoder.modules(), *project.modules()):
            if isinstance(part, (nn.Linear, nn.Conv2d)):
                part.to(dtype)
        self.set_normalization(mean, std)

    def set_normalization(self, mean: Sequence[float], std: Sequence[float]) -> None:
        """Tell how the images that it is given are normalised; as the tower's own, unless told.

        mean, std: of each channel, or one for all, on the scale of [0, 1]
        """
        device = next(self.parts[0].parameters()).device
        own_mean, own_std, mean, std = (
            torch.tensor(x, device=device).view(1, -1, 1, 1) for x in (self.mean, self.std, mean, std)
        )
        self.scale, self.shift = std / own_std, (mean - own_mean) / own_std

    @torch.no_grad()
    def forward(self, images: Float[Tensor, "B C H W"], unit: int, attention: bool = False) -> Tokens:
        """(B, in_chans or 1, H, W) -> Tokens of (H / unit, W / unit) cells, in float32.

        Images are resized so that one patch is one cell of `unit` px.
        """
        (encoder, project), images = self.parts, images.float()
        grid = [side // unit for side in images.shape[-2:]]
        if unit != self.patch:
            size = [cells * self.patch for cells in grid]
            images = F.interpolate(images, size, mode="bicubic", antialias=True)
        images = images.expand(-1, self.in_chans, -1, -1) * self.scale + self.shift
        with torch.autocast(images.device.type, self.dtype, enabled=self.dtype != torch.float32):
            x, p, hints = encoder.enter(encoder.embed(images))  # (B, P + h w, C)
            for block, told in zip(encoder.vit.blocks, hints):
                before, x = x, block(x, **told)
            x = project(encoder.vit.norm(x)).float()
            looks = class_attention(encoder.vit.blocks[-1], before)[:, p:].unflatten(1, grid) if attention else None
        return Tokens(x[:, p:].unflatten(1, grid), x[:, :p], looks)

    def _apply(self, fn, recurse=True):
        """Take the parts along to where the tower goes."""
        for part in self.parts:
            part._apply(fn)
        self.scale, self.shift = fn(self.scale), fn(self.shift)
        return super()._apply(fn)


def class_attention(block: nn.Module, x: Float[Tensor, "B n C"]) -> Float[Tensor, "B n"]:
    """How a block's class token attends to each token that the block reads: softmax, averaged over heads."""
    attn = block.attn
    q, k, _ = rearrange(attn.qkv(block.norm1(x)), "b n (t m d) -> t b m n d", t=3, m=attn.num_heads)
    q, k = attn.q_norm(q[:, :, :1]).float(), attn.k_norm(k).float()
    return ((q * k).sum(-1) * attn.scale).softmax(-1).mean(1)
