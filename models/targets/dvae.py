"""DALL-E's discrete VAE, of which BEiT takes the encoder: a class for every 8 pixels."""

from __future__ import annotations

import re
from collections import OrderedDict

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from models.encoders.released.common import State, count
from models.targets.tokenizer import Tokenizer

GROUPS = 4  # of residual blocks, each of twice the channels and half the side of the one before; the first aside


class DVAE(Tokenizer):
    """The encoder of DALL-E's discrete VAE (Ramesh et al., 2021), its parts named as in the released file.

    width:  channels of the first group of residual blocks
    blocks: residual blocks of a group
    """

    def __init__(self, in_chans: int = 3, width: int = 256, blocks: int = 2, vocabulary: int = 8192):
        super().__init__(in_chans, 8, vocabulary, [-0.125] * in_chans, [1.25] * in_chans)  # pixels become 0.8 x + 0.1
        dims, parts = [width, *(width * 2**k for k in range(GROUPS))], {}
        parts["input"] = nn.Conv2d(in_chans, width, 7, padding=3)
        for k in range(1, GROUPS + 1):
            group = {f"block_{i}": Block(dims[k - (i == 1)], dims[k], GROUPS * blocks) for i in range(1, blocks + 1)}
            parts[f"group_{k}"] = nn.Sequential(OrderedDict(group))
        parts["output"] = nn.ModuleDict({"conv": nn.Conv2d(dims[-1], vocabulary, 1)})
        self.blocks = nn.ModuleDict(parts)

    @property
    def codes(self) -> Tensor:
        return self.blocks["output"]["conv"].weight.flatten(1)

    def logits(self, images: Float[Tensor, "B C H W"]) -> Float[Tensor, "B V h w"]:
        """A score for each id, in float32, as near ties are many."""
        x = self.blocks["input"](images)
        for k in range(1, GROUPS + 1):
            x = self.blocks[f"group_{k}"](x if k == 1 else F.max_pool2d(x, 2))
        with torch.autocast(x.device.type, enabled=False):
            return self.blocks["output"]["conv"](x.float().relu())

    def forward(self, images: Float[Tensor, "B C H W"]) -> Int[Tensor, "B h w"]:
        return self.logits(images).argmax(1)


class Block(nn.Module):
    """A bottleneck of four convolutions beside a straight path, its share small in a network of many `blocks`."""

    def __init__(self, inside: int, outside: int, blocks: int):
        super().__init__()
        self.gain, inner = 1 / blocks**2, outside // 4
        sizes = ((inside, inner, 3), (inner, inner, 3), (inner, inner, 3), (inner, outside, 1))
        convs = {f"conv_{i}": nn.Conv2d(a, b, side, padding=side // 2) for i, (a, b, side) in enumerate(sizes, 1)}
        self.res_path = nn.Sequential(OrderedDict(convs))
        self.id_path = nn.Identity() if inside == outside else nn.Conv2d(inside, outside, 1)

    def forward(self, x: Float[Tensor, "B C h w"]) -> Float[Tensor, "B D h w"]:
        y = x
        for conv in self.res_path:
            y = conv(y.relu())
        return self.id_path(x) + self.gain * y


def from_state(state: State) -> tuple[DVAE, State]:
    """The encoder that a released state is of, and the state in our keys. KeyError if it is of something else."""
    width, in_chans = state["blocks.input.w"].shape[:2]
    blocks, vocabulary = count(state, r"blocks\.group_1\.block_(\d+)"), len(state["blocks.output.conv.b"])
    kinds = {"w": "weight", "b": "bias"}
    ours = {re.sub(r"\b[wb]$", lambda found: kinds[found[0]], key): value for key, value in state.items()}
    return DVAE(in_chans, width, blocks, vocabulary), ours
