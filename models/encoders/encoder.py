"""What every encoder offers: images in, feature maps out, cut in two where a method may step in."""

from __future__ import annotations

from collections.abc import Callable

from jaxtyping import Float
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from models.encoders.grid import Features, Mask


class Encoder(nn.Module):
    """An image encoder in two halves, `embed` and `encode`; everything others need to know of it is an attribute.

    in_chans: channels of an image
    patch:    pixels per token of `embed`
    width:    channels of a token of `embed`
    strides:  pixels per cell of each map, fine to coarse
    dims:     channels of each map
    grid:     tokens of `embed`, down and across, that learned positions are for; None where there are none
    overlaps: neighbouring patches share pixels: what is hidden must be gone before `embed`, not only after it
    skips:    with a mask, `encode` leaves hidden cells out: zeros there
    mixes:    with a mask, `encode` computes hidden cells too, from hidden ones alone
    normed:   the last map wants no further norm before a classifier
    plan:     how to build it again: {"name", "in_chans", "args"}
    """

    in_chans: int
    patch: int
    width: int
    strides: list[int]
    dims: list[int]
    grid: tuple[int, int] | None = None
    overlaps: bool = False
    skips: bool = False
    mixes: bool = False
    normed: bool = True
    plan: dict
    checkpointing: bool = False

    @property
    def mask_unit(self) -> int:
        """Pixels of which the cells of a mask given to `encode` have a whole number."""
        return self.strides[-1]

    @property
    def layers(self) -> list[list[nn.Parameter]]:
        """The parameters of each layer, input to output, for layer-wise learning rates.

        Parameters in no layer (a final norm) belong with the head and keep the full learning rate.
        """
        raise NotImplementedError

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute activations in the backward pass: about a third more time, a fraction of the memory."""
        self.checkpointing = enable

    def run(self, block: Callable, *args, **kwargs) -> Tensor:
        """Call a block, recomputed in the backward pass where that is enabled."""
        if self.checkpointing:
            return checkpoint(block, *args, use_reentrant=False, **kwargs)
        return block(*args, **kwargs)

    def embed(self, images: Float[Tensor, "B C H W"]) -> Float[Tensor, "B h w D"]:
        """(B, in_chans, H, W) -> (B, H / patch, W / patch, width), before positions."""
        raise NotImplementedError

    def encode(self, tokens: Float[Tensor, "B h w D"], mask: Mask | None = None) -> Features:
        """(B, h, w, width) -> Features. With a mask, no visible cell is computed from a hidden token."""
        raise NotImplementedError

    def forward(self, images: Float[Tensor, "B C H W"]) -> Features:
        return self.encode(self.embed(images))


def refuse_mask(mask: Mask | None) -> None:
    """ValueError where there is a mask, from an encoder that can leave nothing out."""
    if mask is not None:
        raise ValueError("this encoder computes every cell: hide with Replace or Paint instead of Skip")
