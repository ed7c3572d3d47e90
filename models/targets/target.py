"""What is true: the vector that a method must guess for every cell."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from einops import rearrange, reduce
from jaxtyping import Float
from torch import Tensor, nn

FLAT = 1e-4  # a gradient below it is rounding: a hundredth of one step of an 8-bit image


class Target(nn.Module):
    """Turns images into one vector per cell.

    unit: side of a cell, in pixels
    dim:  numbers that a head guesses for each cell
    """

    unit: int
    dim: int

    def forward(self, images: Float[Tensor, "B C H W"]) -> Float[Tensor, "B h w D"] | Int[Tensor, "B h w"]:
        """(B, C, H, W) -> (B, H / unit, W / unit, dim), in full precision and without gradient; or class ids."""
        raise NotImplementedError

    def set_normalization(self, mean: Sequence[float], std: Sequence[float]) -> None:
        """Tell with which mean and std of each channel the images are normalised, to those who ask."""


class Pixels(Target):
    """The pixels of each cell, as they are (SimMIM) or normalised within the cell (MAE).

    The variance is the unbiased one over all pixels and channels of a cell, with 1e-6 added, as in MAE's code.
    """

    def __init__(self, unit: int, in_chans: int, normalize: bool):
        super().__init__()
        self.unit, self.dim, self.normalize = unit, unit**2 * in_chans, normalize

    @torch.no_grad()
    def forward(self, images: Float[Tensor, "B C H W"]) -> Float[Tensor, "B h w D"]:
        cells = rearrange(images.float(), "b c (h p) (w q) -> b h w (p q c)", p=self.unit, q=self.unit)
        if self.normalize:
            mean, spread = mean_and_spread(cells)
            cells = (cells - mean) / spread
        return cells


class LocalPixels(Pixels):
    """Each pixel normalised, in its channel, by the `window` x `window` pixels around it (SwinV2's SimMIM).

    The variance is the unbiased one over those of the pixels that lie in the image.
    """

    def __init__(self, unit: int, in_chans: int, window: int = 47):
        super().__init__(unit, in_chans, normalize=False)
        if window % 2 == 0:
            raise ValueError(f"a window of {window} px has no centre: use {window - 1} or {window + 1} px")
        self.window = window

    @torch.no_grad()
    def forward(self, images: Float[Tensor, "B C H W"]) -> Float[Tensor, "B h w D"]:
        mean, spread = self.surroundings(images)
        return super().forward((images.float() - mean) / spread)

    def surroundings(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation around each pixel, both (B, C, H, W)."""
        x = images.float()
        mean, square = self.around(x), self.around(x.square())
        # how many pixels of each window lie in the image
        count = self.around(torch.ones_like(x[:1, :1]), count_include_pad=True) * self.window**2
        variance = ((square - mean.square()) * count / (count - 1)).clamp_min(0)
        return mean, (variance + 1e-6).sqrt()

    def around(self, x: Tensor, count_include_pad: bool = False) -> Tensor:
        """The mean over the window around each pixel: down, then across, a fraction of the work of both at once."""
        n, half = self.window, self.window // 2
        x = F.avg_pool2d(x, (n, 1), 1, (half, 0), count_include_pad=count_include_pad)
        return F.avg_pool2d(x, (1, n), 1, (0, half), count_include_pad=count_include_pad)


class HOG(Target):
    """Histograms of oriented gradients, one per channel, each of unit length (MaskFeat, FastMIM).

    A pixel votes with its gradient's magnitude for one of `bins` orientations between 0 and 180 degrees; no blur, no
    sharing between bins or cells, no block normalisation. Numbers of a cell are ordered (channel, bin).

    window: side in pixels of the squares in whose middle votes count most, by a Gaussian of half that side
            (mmpretrain's MaskFeat has 16); 0 for none
    """

    def __init__(self, unit: int, in_chans: int, bins: int = 9, normalize: bool = True, window: int = 0):
        super().__init__()
        self.unit, self.bins, self.dim, self.normalize = unit, bins, bins * in_chans, normalize
        sobel = torch.tensor([[1.0, 0.0, -1.0], [2.0, 0.0, -2.0], [1.0, 0.0, -1.0]])
        self.register_buffer("sobel", torch.stack([sobel, sobel.T])[:, None], persistent=False)
        bell = torch.exp(-((torch.arange(window) - (window - 1) / 2).square()) / (2 * max(window // 2, 1) ** 2))
        self.register_buffer("bell", torch.outer(bell, bell) / bell.sum() ** 2, persistent=False)

    @torch.no_grad()
    def forward(self, images: Float[Tensor, "B C H W"]) -> Float[Tensor, "B h w D"]:
        with torch.autocast(images.device.type, enabled=False):
            padded = F.pad(rearrange(images.float(), "b c h w -> (b c) 1 h w"), (1, 1, 1, 1), mode="reflect")
            across, down = rearrange(F.conv2d(padded, self.sobel), "(b c) g h w -> g b c h w", b=len(images))
            orientation = (torch.atan2(across, down) / math.pi * self.bins).floor() % self.bins
            magnitude = torch.hypot(across, down)
            magnitude = magnitude * (magnitude > FLAT)
            if len(self.bell):
                magnitude = magnitude * self.bell.tile([side // len(self.bell) for side in magnitude.shape[-2:]])
            # a pass for each bin: no atomic additions, so that the same image gives the same bits on a GPU too
            votes = [
                reduce(magnitude * (orientation == k), "b c (h p) (w q) -> b c h w", "sum", p=self.unit, q=self.unit)
                for k in range(self.bins)
            ]
            cells = torch.stack(votes, -1)
            if self.normalize:
                cells = F.normalize(cells, dim=-1)
        return rearrange(cells, "b c h w n -> b h w (c n)")


def mean_and_spread(cells: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of the pixels of each cell, (B, h, w, D) -> twice (B, h, w, 1)."""
    return cells.mean(-1, keepdim=True), (cells.var(-1, keepdim=True) + 1e-6).sqrt()
