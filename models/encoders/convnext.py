"""ConvNeXt V1 and V2; with a mask, hidden cells stay zero through every layer that mixes places (FCMAE, SparK)."""

from __future__ import annotations

from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn

from models.encoders.grid import Features, Mask
from models.encoders.pyramid import Pyramid


class ConvNeXt(Pyramid):
    """A ConvNeXt of timm that honours a mask: the dense stand-in for sparse convolution, no extra package needed.

    layer_groups: "single" counts each block as a layer for layer-wise learning rates, "group" three blocks of the
                  third stage at a time (both from the ConvNeXt V2 repository)
    grn:          with a mask, the norms of V2's GRN are those of each "image", as they are without a mask, or of the
                  whole "batch" on a device, as in the released FCMAE
    """

    skips = True

    def __init__(self, name: str, in_chans: int = 3, layer_groups: str = "single", grn: str = "image", **timm_args):
        super().__init__(name, in_chans, **timm_args)
        self.strides = [stride * self.patch // self.strides[0] for stride in self.strides]  # timm's are for 4 px
        if layer_groups not in ("single", "group") or grn not in ("image", "batch"):
            raise ValueError(f'layer_groups "{layer_groups}" is not single or group, or grn "{grn}" not image or batch')
        self.layer_groups, self.grn = layer_groups, grn

    @property
    def layers(self) -> list[list[nn.Parameter]]:
        stages = self.backbone.stages
        if self.layer_groups == "single":  # the stem and each downsampling layer learn with the block that follows
            blocks = [[list(block.parameters()) for block in stage.blocks] for stage in stages]
            for stage, first in zip(stages, blocks):
                first[0] += stage.downsample.parameters()
            blocks[0][0] += self.stem.parameters()
            return [block for stage in blocks for block in stage]
        groups = [list(self.stem.parameters())] + [[] for _ in range(12)]
        for i, stage in enumerate(stages):
            groups[12 if i == 3 else i + 1] += stage.downsample.parameters()
            for j, block in enumerate(stage.blocks):
                groups[12 if i == 3 else 3 + j // 3 if i == 2 else i + 1] += block.parameters()
        return groups

    def encode(self, tokens: Float[Tensor, "B h w D"], mask: Mask | None = None) -> Features:
        if mask is None:
            return super().encode(tokens)
        x, maps = rearrange(tokens, "b h w c -> b c h w"), []
        for stage, stride in zip(self.backbone.stages, self.strides):
            seen = ~mask.at(stride)[:, None]  # (B, 1, h, w)
            x = stage.downsample(x) * seen  # no kernel of a downsampling layer crosses the border of a cell
            for block in stage.blocks:
                x = self.run(sparse_block, block, x, seen, self.grn == "batch")
            maps.append(x)
        return Features(maps)


def sparse_block(block: nn.Module, x: Tensor, seen: Tensor, whole_batch: bool = False) -> Tensor:
    """timm's ConvNeXt block as if hidden cells did not exist: (B, C, h, w), (B, 1, h, w) bool -> (B, C, h, w).

    The depthwise convolution reads zeros from hidden cells, zeros again before GRN takes its norm over places.
    """
    layout = "b c h w" if block.use_conv_mlp else "b h w c"
    mlp, y = block.mlp, block.norm(rearrange(block.conv_dw(x), f"b c h w -> {layout}"))
    y = mlp.act(mlp.fc1(y)) * rearrange(seen, f"b c h w -> {layout}")
    if hasattr(mlp, "grn"):
        one = layout.replace("b", "1").replace("h", "(b h)") if whole_batch else layout  # one tall image
        y = rearrange(mlp.grn(rearrange(y, f"{layout} -> {one}")), f"{one} -> {layout}", b=len(x))
    y = rearrange(mlp.fc2(y), f"{layout} -> b c h w")
    if block.gamma is not None:
        y = y * block.gamma.reshape(1, -1, 1, 1)
    return (block.shortcut(x) + block.drop_path(y)) * seen
