"""ResNets; with a mask, hidden places stay zero through every layer that mixes places and count in no norm (SparK)."""

from __future__ import annotations

from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn

from models.encoders.grid import Features, Mask
from models.encoders.layers import norm_visible
from models.encoders.pyramid import Pyramid

NORMS = (nn.BatchNorm2d, nn.SyncBatchNorm, nn.GroupNorm)
Grids = dict[int, tuple[Tensor, Tensor]]  # by a map's rows: what is visible, (B, 1, h, w) bool and flat indices (B, n)


class ResNet(Pyramid):
    """A ResNet of timm (ResNeXt, SE-ResNet, ...) that honours a mask: the dense stand-in for sparse convolution.

    With a mask, norms take their statistics from visible places alone, those of one device. `embed` is the first
    convolution, whose patches overlap: hide pixels before it, as Skip does. `layers` are SparK's groups of blocks.
    """

    skips = True
    stems = ("conv1",)

    def __init__(self, name: str, in_chans: int = 3, **timm_args):
        super().__init__(name, in_chans, **timm_args)
        self.strides, self.dims = self.strides[1:], self.dims[1:]  # the stem's map is no stage's
        self.normed = True

    @property
    def layers(self) -> list[list[nn.Parameter]]:
        net = self.backbone
        stages = (net.layer1, net.layer2, net.layer3, net.layer4)
        sizes = (len(net.layer1), *((2, 3) if len(net.layer2) <= 4 else (4, 4)), len(net.layer4))
        groups = [stage[i : i + n] for stage, n in zip(stages, sizes) for i in range(0, len(stage), n)]
        return [list(nn.ModuleList(part).parameters()) for part in ([self.stem, net.bn1, net.maxpool], *groups)]

    def encode(self, tokens: Float[Tensor, "B h w D"], mask: Mask | None = None) -> Features:
        if mask is None:
            return Features(super().encode(tokens).maps[1:])
        net, height = self.backbone, tokens.shape[1] * self.patch
        grids = {height // s: (~mask.at(s)[:, None], mask.visible(s)) for s in (self.patch, *self.strides)}
        x, maps = rearrange(tokens, "b h w c -> b c h w"), []
        for layer in (net.bn1, net.act1, net.maxpool):
            x = sparse(layer, x, grids)
        for stage in (net.layer1, net.layer2, net.layer3, net.layer4):
            for block in stage:
                x = self.run(sparse_block, block, x, grids)
            maps.append(x)
        return Features(maps)


def sparse_block(block: nn.Module, x: Tensor, grids: Grids) -> Tensor:
    """timm's residual block as if hidden places did not exist; it holds its layers in the order in which they run."""
    *layers, last = (part for name, part in block.named_children() if name not in ("downsample", "drop_path"))
    y = x
    for layer in layers:
        y = sparse(layer, y, grids)
    if block.drop_path is not None:
        y = block.drop_path(y)
    return last(y + (x if block.downsample is None else sparse(block.downsample, x, grids)))


def sparse(layer: nn.Module, x: Tensor, grids: Grids) -> Tensor:
    """A layer as if hidden places did not exist: (B, C, h, w), zeros where hidden -> the same.

    Only a convolution's output is not zero there: a norm follows, and takes what is visible.
    """
    if isinstance(layer, nn.Sequential):
        for part in layer:
            x = sparse(part, x, grids)
        return x
    if isinstance(layer, NORMS):
        return norm_visible(layer, x, grids[x.shape[2]][1])
    x = layer(x)
    return x if isinstance(layer, (nn.Conv2d, nn.ReLU, nn.Identity)) else x * grids[x.shape[2]][0]
