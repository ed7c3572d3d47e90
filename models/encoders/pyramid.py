"""Any hierarchical backbone of timm, its stem split off so that a method can act on the embedded patches."""

from __future__ import annotations

from collections import defaultdict

import timm
import torch
from einops import rearrange
from jaxtyping import Float
from timm.models import group_parameters, model_entrypoint
from torch import Tensor, nn

from models.encoders.encoder import Encoder, refuse_mask
from models.encoders.grid import Features, Mask
from models.encoders.layers import shorten

WINDOWED = ("timm.models.swin_transformer", "timm.models.swin_transformer_v2", "timm.models.swin_transformer_v2_cr")


class Pyramid(Encoder):
    """A timm backbone of a stem and stages (Swin, SwinV2, PVT v2, DaViT, FocalNet, MaxViT, CoAtNet, RegNet, ...).

    The stem is taken out and `nn.Identity()` left in its place: `embed` is the stem, `encode` is timm's own
    `forward_intermediates`. `timm_args` go to timm (depths, window_size, drop_path_rate, img_size, ...).
    `drop_last` blocks are left out at the end, whole stages among them, and then the final norm too.
    ValueError if the backbone has no such stem.
    """

    stems: tuple[str, ...] = ("patch_embed", "stem")  # what timm calls it

    def __init__(self, name: str, in_chans: int = 3, drop_last: int = 0, **timm_args):
        super().__init__()
        if model_entrypoint(name).__module__ in WINDOWED:
            timm_args = {"strict_img_size": False, **timm_args}  # windows are cut at any image size
        self.backbone = backbone = timm.create_model(name, num_classes=0, in_chans=in_chans, **timm_args)
        place = next((stem for stem in self.stems if hasattr(backbone, stem.partition(".")[0])), None)
        if place is None or not hasattr(backbone, "forward_intermediates"):
            raise ValueError(f"{name} cannot be cut into a stem and stages: choose a swin, pvt_v2, convnext or vit")
        self.stem = backbone.get_submodule(place)
        self.layer_of = self.group(place)
        backbone.set_submodule(place, nn.Identity())
        backbone.head = nn.Identity()  # some keep a norm in it, which would train unused
        gone = shorten(backbone, drop_last) if drop_last else 0
        self.in_chans, stages = in_chans, backbone.feature_info[: len(backbone.feature_info) - gone]
        self.strides, self.dims = ([stage[what] for stage in stages] for what in ("reduction", "num_chs"))
        self.normed = not isinstance(getattr(backbone, "norm", nn.Identity()), nn.Identity)
        self.overlaps = any(c.kernel_size[0] > c.stride[0] for c in self.stem.modules() if isinstance(c, nn.Conv2d))
        self.patch, self.width, self.channels_last = self.probe_stem()

    def probe_stem(self) -> tuple[int, int, bool]:
        """Pixels per token, channels of a token, and whether channels come last: read off one image."""
        weight = next(self.stem.parameters())
        with torch.no_grad():  # the image is three times as wide as high: no number of channels looks like its rows
            image = weight.new_zeros(1, self.in_chans, 64, 192)
            shape = self.stem.eval()(image).shape
        self.stem.train()
        if len(shape) != 4:
            raise ValueError("its stem gives no map of patches: choose a swin, pvt_v2, convnext or vit")
        channels_last = shape[2] == 3 * shape[1]
        return (64 // shape[1], shape[3], True) if channels_last else (64 // shape[2], shape[1], False)

    def group(self, stem: str) -> dict[str, int]:
        """The layer of each parameter of the stages, by timm's own grouping; a final norm has none."""
        groups = group_parameters(self.backbone, self.backbone.group_matcher(coarse=False), reverse=True)
        return {name: layer for name, layer in groups.items() if not name.startswith(("norm.", "head.", f"{stem}."))}

    @property
    def layers(self) -> list[list[nn.Parameter]]:
        layers = defaultdict(list, {0: list(self.stem.parameters())})
        for name, parameter in self.backbone.named_parameters():
            if name in self.layer_of:
                # a downsampling layer learns at the pace of the stage that it ends (SimMIM)
                layers[self.layer_of[name] - (".downsample." in name)].append(parameter)
        return [layers[layer] for layer in sorted(layers)]

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        super().set_grad_checkpointing(enable)
        self.backbone.set_grad_checkpointing(enable)

    def embed(self, images: Float[Tensor, "B C H W"]) -> Float[Tensor, "B h w D"]:
        x = self.stem(images)
        return x if self.channels_last else rearrange(x, "b c h w -> b h w c")

    def encode(self, tokens: Float[Tensor, "B h w D"], mask: Mask | None = None) -> Features:
        refuse_mask(mask)
        x = tokens if self.channels_last else rearrange(tokens, "b h w c -> b c h w")
        return Features(self.backbone.forward_intermediates(x, norm=True, intermediates_only=True))
