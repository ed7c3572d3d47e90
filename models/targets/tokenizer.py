"""What every tokenizer offers: images in, class ids out."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn


class Tokenizer(nn.Module):
    """Turns images into class ids, one for each cell: the words of an image.

    in_chans:   channels of an image
    stride:     pixels per id
    vocabulary: how many ids there are, 0 to vocabulary - 1
    mean, std:  of each channel, by which images in [0, 1] are normalised before they are read
    codes:      a vector for each id, (vocabulary, D); those of ids that mean alike are alike
    """

    codes: Tensor

    def __init__(self, in_chans: int, stride: int, vocabulary: int, mean: Sequence[float], std: Sequence[float]):
        super().__init__()
        self.in_chans, self.stride, self.vocabulary = in_chans, stride, vocabulary
        self.register_buffer("mean", torch.tensor(mean).view(-1, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(-1, 1, 1), persistent=False)

    def forward(self, images: Float[Tensor, "B C H W"]) -> Int[Tensor, "B h w"]:
        """Normalised images (B, in_chans, H, W) -> ids (B, H / stride, W / stride) int64."""
        raise NotImplementedError

    @torch.no_grad()
    def tokenize(self, images: Float[Tensor, "B C H W"], unit: int) -> Int[Tensor, "B h w"]:
        """Images in [0, 1], grey or of `in_chans` channels, resized so that an id is a cell of `unit` px.

        (B, C, H, W) -> (B, H / unit, W / unit) int64
        """
        if unit != self.stride:
            size = [side // unit * self.stride for side in images.shape[-2:]]
            images = F.interpolate(images, size, mode="bicubic", antialias=True)
        images = images.clamp(0, 1).expand(-1, self.in_chans, -1, -1)
        return self((images - self.mean) / self.std)
