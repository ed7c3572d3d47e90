"""Images of one number of channels as images of another, where that can be done without guessing."""

import numpy as np

LUMINANCE = np.array([0.299, 0.587, 0.114], np.float32)


def fits(given: int, channels: int) -> bool:
    """Whether an image can be made one of so many channels: grey is repeated, colour becomes luminance."""
    return given in (1, channels) or (given, channels) == (3, 1)


def match(pixels: np.ndarray, channels: int) -> np.ndarray:
    """(H, W, *) as (H, W, channels). ValueError if it does not fit."""
    given = pixels.shape[2]
    if not fits(given, channels):
        raise ValueError(f"has {given} channels where the others have {channels}")
    if given == channels:
        return np.ascontiguousarray(pixels)
    if given == 1:
        return np.repeat(pixels, channels, axis=2)
    gray = pixels @ LUMINANCE
    return (gray.round() if pixels.dtype == np.uint8 else gray).astype(pixels.dtype)[..., None]
