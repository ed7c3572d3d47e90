"""CAPI's encoder, which is none of those that are built here."""

from __future__ import annotations

from models.encoders.released.common import State


def describe_capi(state: State) -> tuple[str, dict]:
    """ValueError that says what is missing."""
    raise ValueError(
        "it is CAPI's: its norms are root mean squares, the last without a scale, and its registers have places at the "
        "image's edge, on which queries and keys are rotated; no encoder here has that, nor timm's"
    )
