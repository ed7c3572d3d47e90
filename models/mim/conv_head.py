"""What is guessed by convolutions: the decoders of FCMAE and SparK."""

from __future__ import annotations

from einops import rearrange
from jaxtyping import Float
from timm.layers import LayerNorm2d
from timm.models.convnext import ConvNeXtBlock
from torch import Tensor, nn

from models.encoders.encoder import Encoder
from models.encoders.grid import Features, Mask
from models.encoders.layers import Cells, Fill, norm_visible, truncated
from models.targets.limits import at_least
from models.targets.target import Pixels, Target


class ConvDecoder(nn.Module):
    """ConvNeXt V2 blocks over the last map, with a learned token in its hidden cells (FCMAE)."""

    def __init__(self, encoder: Encoder, target: Target, depth: int = 1, width: int = 512):
        super().__init__()
        at_least(1, depth=depth, width=width)
        self.stride = encoder.strides[-1]
        self.project, self.fill = nn.Linear(encoder.dims[-1], width), Fill(width)
        self.blocks = nn.Sequential(*(ConvNeXtBlock(width, use_grn=True, ls_init_value=None) for _ in range(depth)))
        self.cells = Cells(width, self.stride, target.unit, target.dim)
        truncated(self)

    def forward(self, features: Features, mask: Mask) -> Float[Tensor, "B h w D"]:
        x = self.fill(self.project(rearrange(features.maps[-1], "b c h w -> b h w c")), mask.at(self.stride))
        x = self.blocks(rearrange(x, "b h w c -> b c h w"))
        return self.cells(rearrange(x, "b c h w -> b h w c"))


class UNetDecoder(nn.Module):
    """A U-Net that doubles the last map's side down to single pixels and takes in each scale that it meets (SparK).

    Targets that are no pixels are guessed cell by cell. `width` are the channels at the last map, halved as the side
    doubles. ValueError if doubling does not lead to the target's cells.
    """

    def __init__(self, encoder: Encoder, target: Target, width: int = 768):
        super().__init__()
        top, finest = encoder.strides[-1], 1 if isinstance(target, Pixels) else target.unit
        times = (top // finest).bit_length() - 1
        if finest << times != top:
            raise ValueError(f"the encoder's cells of {top} px cannot be halved down to the target's of {finest} px")
        at_least(2**times, width=width)  # it is halved as often
        widths = {top >> i: width >> i for i in range(times + 1)}  # of each stride
        norm = nn.BatchNorm2d if any(isinstance(part, nn.BatchNorm2d) for part in encoder.modules()) else LayerNorm2d
        scales = {s: dim for s, dim in zip(encoder.strides, encoder.dims) if s in widths}
        self.strides, self.split = encoder.strides, target.unit // finest
        self.dense = nn.ModuleDict({str(s): Densify(d, s, widths[s], norm, s == top) for s, d in scales.items()})
        self.doublings = nn.ModuleDict({str(s): doubling(widths[2 * s], w) for s, w in widths.items() if s < top})
        self.predict = nn.Conv2d(widths[finest], target.dim // self.split**2, 1)
        truncated(self.doublings)
        truncated(self.predict)

    def forward(self, features: Features, mask: Mask) -> Float[Tensor, "B h w D"]:
        maps = {str(stride): x for stride, x in zip(self.strides, features.maps)}  # the last one of each scale
        x = self.dense[str(self.strides[-1])](features.maps[-1], mask)
        for stride, double in self.doublings.items():
            x = double(x)
            if stride in self.dense:
                x = x + self.dense[stride](maps[stride], mask)
        return rearrange(self.predict(x), "b c (h p) (w q) -> b h w (p q c)", p=self.split, q=self.split)


class Densify(nn.Module):
    """A scale for a U-Net: what is visible is normed, a learned token written into the rest, all of it projected."""

    def __init__(self, dim: int, stride: int, width: int, norm: type[nn.Module], last: bool):
        super().__init__()
        self.stride, self.norm, self.fill, kernel = stride, norm(dim), Fill(dim), 1 if last else 3
        self.project = nn.Conv2d(dim, width, kernel, padding="same") if dim != width or not last else nn.Identity()

    def forward(self, x: Float[Tensor, "B C h w"], mask: Mask) -> Float[Tensor, "B width h w"]:
        x = rearrange(norm_visible(self.norm, x, mask.visible(self.stride)), "b c h w -> b h w c")
        return self.project(rearrange(self.fill(x, mask.at(self.stride)), "b h w c -> b c h w"))


def doubling(wide: int, narrow: int) -> nn.Sequential:
    """A map of twice the side: (B, wide, h, w) -> (B, narrow, 2 h, 2 w)."""
    first, second = (nn.Conv2d(wide, width, 3, padding=1, bias=False) for width in (wide, narrow))
    norms = nn.BatchNorm2d(wide), nn.BatchNorm2d(narrow)
    return nn.Sequential(nn.ConvTranspose2d(wide, wide, 4, 2, 1), first, norms[0], nn.ReLU6(), second, norms[1])
