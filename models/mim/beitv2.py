"""BEiT v2's head, which makes the class token carry what the whole image is."""

from __future__ import annotations

import copy

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn

from models.encoders.encoder import Encoder
from models.encoders.grid import Features, Mask
from models.encoders.layers import Cells
from models.mim.head import norm_eps
from models.targets.limits import at_least
from models.targets.target import Target


class PatchAggregation(nn.Module):
    """Two guesses: of the last map, and of an early one and the last class token through `depth` blocks (BEiT v2).

    The blocks begin as those that follow the early map in the encoder, and are told the same of places; the guesses
    share the norm and the linear layer. ValueError unless the encoder gives these two maps, without a norm.
    """

    def __init__(self, encoder: Encoder, target: Target, depth: int = 2):
        super().__init__()
        at_least(1, depth=depth)
        blocks, taps = getattr(getattr(encoder, "vit", None), "blocks", ()), getattr(encoder, "taps", ())
        latest = len(blocks) - 1 - depth  # the last block that `depth` others follow
        if latest < 0 or not encoder.vit.num_prefix_tokens:
            raise ValueError("BEiT v2 needs a plain transformer with a class token and at least "
                             f"{depth + 1} blocks, as its second guess copies {depth} (depth)")  # fmt: skip
        if encoder.normed or len(taps) != 2 or taps[0] > latest or taps[1] != len(blocks) - 1:
            near = max(min(len(blocks) - 4, latest), 0)  # as published: 8 of 12 blocks, 20 of 24
            raise ValueError(f"BEiT v2 needs the maps of the last block and one of 0 to {latest}, which {depth} "
                             f"(depth) follow, unnormed: give it taps: [{near}, -1], final_norm: false")  # fmt: skip
        self.after = slice(taps[0] + 1, taps[0] + 1 + depth)
        self.blocks = copy.deepcopy(blocks[self.after])
        self.hints = encoder.hints
        self.norm = nn.LayerNorm(encoder.width, norm_eps(encoder))
        self.cells = Cells(encoder.width, encoder.strides[-1], target.unit, target.dim)

    def forward(self, features: Features, mask: Mask) -> Float[Tensor, "B h w 2 D"]:
        early, last = (rearrange(m, "b c h w -> b h w c") for m in features.maps)
        (_, h, w, _), p = early.shape, features.prefix.shape[1]
        x = torch.cat([features.prefix, early.flatten(1, 2)], 1)
        for block, hints in zip(self.blocks, self.hints(h, w, p, None)[self.after]):
            x = block(x, **hints)
        again = x[:, p:].unflatten(1, (h, w))
        return torch.stack([self.cells(self.norm(m)) for m in (last, again)], 3)
