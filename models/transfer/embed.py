"""Features of any images by a frozen encoder."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from importlib.util import find_spec

import numpy as np
import torch
from torch import Tensor

from models.encoders.encoder import Encoder
from models.transfer.classify import pooled

WHAT, TO = ("mean", "class", "patches"), ("npy", "parquet")


class Embed:
    """Write the features of images, a row each, in the order of their paths; NaN where an image cannot be read.

    what: "mean", the last map's mean over places, or "class", the class token, (N, C); or "patches", the whole of the
          last map, (N, h, w, C)
    to:   "npy", features.npy to be memory-mapped, with paths.txt beside it; or "parquet", with a column of paths
    """

    def __init__(self, what: str = "mean", to: str = "npy"):
        for value, choices in ((what, WHAT), (to, TO)):
            if value not in choices:
                raise ValueError(f'there is no "{value}", only {", ".join(choices)}')
        if to == "parquet" and find_spec("pyarrow") is None:
            raise ValueError("parquet needs pyarrow: pip install pyarrow")
        self.what, self.to = what, to

    def shape(self, encoder: Encoder, size: tuple[int, int]) -> tuple[int, ...]:
        """Of a row, for images of `size` pixels. ValueError if there is no class token, or the size does not fit."""
        image = torch.zeros(1, encoder.in_chans, *size, device=next(encoder.parameters()).device)
        return tuple(self.features(encoder.eval(), image).shape[1:])

    def rows(self, encoder: Encoder, batches: Iterable[dict]) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """The places (B,) and features (B, ...) in float32 of the images of each batch."""
        encoder.eval()
        for batch in batches:
            rows = self.features(encoder, batch["image"])
            rows[~batch["own"]] = float("nan")
            yield batch["index"].cpu().numpy(), rows.cpu().numpy()

    @torch.no_grad()
    def features(self, encoder: Encoder, images: Tensor) -> Tensor:
        """(B, in_chans, H, W) -> (B, C) or (B, h, w, C), float32."""
        features = encoder(images)
        if self.what == "patches":
            return features.maps[-1].movedim(1, -1).float()
        if self.what == "class" and features.prefix is None:
            raise ValueError('this encoder has no class token for "class": use "mean" or "patches"')
        return pooled(features, "cls" if self.what == "class" else "mean").float()
