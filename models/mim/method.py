"""Masked image modeling, the whole of it. Start here."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from models.encoders.encoder import Encoder
from models.mim.head import Head
from models.mim.hide import Hide
from models.mim.loss import Average, Distance, over_hidden
from models.mim.masker import Masker
from models.targets.target import Target


class MIM(nn.Module):
    """Hide some cells of an image, encode the rest, guess what was hidden.

    masker:   which cells are hidden
    hide:     how they are kept from the encoder
    head:     what is guessed
    target:   what is true
    distance: how wrong a guess is, in each cell
    average:  which cells count

    ValueError if the cells of the parts do not align.
    """

    def __init__(self, masker: Masker, hide: Hide, head: Head, target: Target, distance: Distance,
                 average: Average = over_hidden):  # fmt: skip
        super().__init__()
        self.masker, self.hide, self.head, self.target = masker, hide, head, target
        self.distance, self.average = distance, average
        self.pairs = getattr(hide, "pairs", False)  # two images share a mask, and each cell is hidden in one of them
        check_units(masker.unit, target.unit, hide)

    @property
    def encoder(self) -> Encoder:
        return self.hide.encoder

    def set_normalization(self, mean: Sequence[float], std: Sequence[float]) -> None:
        """Tell all who ask with which mean and std of each channel the images are normalised."""
        for part in self.modules():
            if isinstance(part, Target):
                part.set_normalization(mean, std)

    def forward(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """{"image": (B, C, H, W)} -> {"loss": scalar}"""
        images = batch["image"]  # (B, C, H, W)
        mask = self.masker(images)  # which cells are hidden
        features = self.hide(images, mask)  # what the encoder makes of the rest
        guess = self.head(features, mask)  # (B, h, w, D), for every cell
        truth = self.target(images)  # (B, h, w, D)
        error = self.distance(guess, truth)  # (B, h, w)
        return {"loss": self.average(error, mask.at(self.target.unit))}


def check_units(masked: int, guessed: int, hide: Hide) -> None:
    """The one rule that aligns all parts: the target's unit divides the mask's unit and the encoder's last stride."""
    stride, unit = hide.encoder.strides[-1], hide.unit
    if masked % unit:
        low = max(masked // unit, 1) * unit
        raise ValueError(f"the mask's cells have {masked} px, {type(hide).__name__} hides whole units of {unit} px of "
                         f"this encoder: {low} or {low + unit} px would do")  # fmt: skip
    for what, size in (("the mask's cells have", masked), ("the encoder's last map has cells of", stride)):
        if size % guessed:
            near = max(n for n in range(1, guessed + 1) if masked % n == stride % n == 0)
            raise ValueError(f"{what} {size} px, the target's {guessed} px: the target's must divide the others; "
                             f"{near} px would")  # fmt: skip
