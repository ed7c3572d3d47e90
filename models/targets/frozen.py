"""What frozen networks say of each cell: a teacher's features, a tokenizer's class ids."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor

from models.encoders.encoder import Encoder
from models.targets.target import Target
from models.targets.tokenizer import Tokenizer
from models.targets.tower import Tokens, Tower


class Teacher(Target):
    """What a frozen tower sees in each cell of `unit` px (EVA, MILAN). ValueError if it cannot read such channels."""

    def __init__(self, tower: Tower, unit: int, encoder: Encoder):
        super().__init__()
        guessed = next(encoder.parameters()).is_meta  # a trial of the config, before the images are known
        if encoder.in_chans not in (1, tower.in_chans) and not guessed:
            raise ValueError(f"the teacher reads images of {tower.in_chans} channels, or grey ones, not of "
                             f"{encoder.in_chans}: choose another target or data.in_chans")  # fmt: skip
        self.tower, self.unit, self.dim = tower, unit, tower.dim

    def set_normalization(self, mean: Sequence[float], std: Sequence[float]) -> None:
        self.tower.set_normalization(mean, std)

    def forward(self, images: Float[Tensor, "B C H W"]) -> Float[Tensor, "B h w D"]:
        return self.look(images).cells

    def look(self, images: Float[Tensor, "B C H W"], attention: bool = False) -> Tokens:
        """All that the tower says; its attention only if asked for."""
        return self.tower(images, self.unit, attention)


class Codebook(Target):
    """The class id that a frozen tokenizer gives to each cell (BEiT), in its surroundings' precision.

    ValueError for images of other channels than the tokenizer's, unless they are grey; and outside of training, as
    before it begins, for ids beyond the vocabulary.
    """

    def __init__(self, tokenizer: Tokenizer, unit: int, in_chans: int = 3):
        super().__init__()
        if in_chans not in (1, tokenizer.in_chans):
            raise ValueError(f"the tokenizer reads images of {tokenizer.in_chans} channels or 1, these have {in_chans}")
        self.tokenizer, self.unit, self.dim = tokenizer.eval().requires_grad_(False), unit, tokenizer.vocabulary
        self.register_buffer("mean", torch.zeros(in_chans, 1, 1))
        self.register_buffer("std", torch.ones(in_chans, 1, 1))

    def set_normalization(self, mean: Sequence[float], std: Sequence[float]) -> None:
        for buffer, values in ((self.mean, mean), (self.std, std)):
            buffer.copy_(torch.tensor(values).view(-1, 1, 1))

    def train(self, mode: bool = True) -> Codebook:
        super().train(mode).tokenizer.eval()
        return self

    @torch.no_grad()
    def forward(self, images: Float[Tensor, "B C H W"]) -> Int[Tensor, "B h w"]:
        ids = self.tokenizer.tokenize(images.float() * self.std + self.mean, self.unit)
        if not self.training and ids.max() >= self.dim:
            raise ValueError(f"the tokenizer gave the id {ids.max()}, its vocabulary is {self.dim}")
        return ids
