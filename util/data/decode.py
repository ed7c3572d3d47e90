from dataclasses import dataclass
from typing import BinaryIO

import numpy as np
from PIL import Image, ImageOps

Image.MAX_IMAGE_PIXELS = None  # large scans are data here, not an attack

NPY, PNG, TIFF = b"\x93NUMPY", b"\x89PNG\r\n\x1a\n", (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
DEEP = {"I", "F", "I;16", "I;16B", "I;16L", "I;16N"}  # Pillow's modes of more than 8 bits
GRAY = {"1", "L", "LA", "La"}
PALETTE, SEPARATED, YCBCR, CIELAB, WHITE_IS_ZERO = 3, 5, 6, 8, 0  # photometric interpretations of TIFF
ALPHA = {1, 2}  # extra samples of TIFF that are transparency
ORIENTATION = 274


@dataclass(frozen=True)
class Header:
    """What the first bytes of a file say of its image; alpha: whether transparency comes beside the channels."""

    kind: str
    width: int
    height: int
    channels: int
    bits: int
    alpha: bool = False


def decode(file: BinaryIO, keep_alpha: bool = False) -> np.ndarray:
    """Read an image into (H, W, C): uint8 when it has 8 bits or fewer, else float32.

    16-bit integers (any integers) are divided by their largest value, floats are left as they are. Transparency is laid
    on white, unless `keep_alpha` asks for it as one more channel. Raises whatever the format's reader raises.
    """
    start = _start(file)
    if start.startswith(NPY):
        return _unit(_bands_last(np.load(file, allow_pickle=False)))
    if start.startswith(TIFF):
        return _decode_tiff(file, keep_alpha)
    if start.startswith(PNG) and start[24] == 16:
        return _decode_deep_png(file, keep_alpha)
    return _decode_picture(Image.open(file), keep_alpha)


def peek(file: BinaryIO) -> Header:
    """Read only as much of a file as tells what `decode` will give."""
    start = _start(file)
    if start.startswith(NPY):
        read = np.lib.format.read_array_header_1_0 if np.lib.format.read_magic(file)[0] == 1 else None
        shape, _, dtype = (read or np.lib.format.read_array_header_2_0)(file)
        shape = _bands_last(np.broadcast_to(np.zeros((), dtype), shape)).shape
        return Header(f"npy {dtype}", shape[1], shape[0], shape[2], 8 * dtype.itemsize)
    if start.startswith(TIFF):
        return _peek_tiff(file)
    if start.startswith(PNG) and start[24] == 16:
        width, height = int.from_bytes(start[16:20], "big"), int.from_bytes(start[20:24], "big")
        return Header("png 16-bit", width, height, 3 if start[25] & 2 else 1, 16, bool(start[25] & 4))
    return _peek_picture(Image.open(file))


def _start(file: BinaryIO) -> bytes:
    start = file.read(32)
    file.seek(0)
    return start


def _decode_picture(image: Image.Image, keep_alpha: bool) -> np.ndarray:
    if image.getexif().get(ORIENTATION, 1) != 1:
        image = ImageOps.exif_transpose(image)
    if image.mode in DEEP:
        pixels = np.array(image)[..., None]
        wide = image.mode == "F" or (image.mode == "I" and image.format == "TIFF")  # elsewhere "I" holds 16 bits
        return _unit(pixels if wide else pixels.astype(np.uint16))
    gray = image.mode in GRAY
    if not image.has_transparency_data:
        pixels = np.array(image.convert("L" if gray else "RGB"))
        return pixels[..., None] if gray else pixels
    pixels = np.array(image.convert("RGBA"))
    return _over_white(pixels[..., [0, 3]] if gray else pixels, keep_alpha)


def _peek_picture(image: Image.Image) -> Header:
    bits = 8 if image.mode not in DEEP else 32 if image.mode == "F" else 16
    channels = 1 if image.mode in GRAY | DEEP else 3
    return Header(
        f"{(image.format or '?').lower()} {image.mode}", *image.size, channels, bits, image.has_transparency_data
    )


def _decode_deep_png(file: BinaryIO, keep_alpha: bool) -> np.ndarray:
    import torch
    from torchvision.io import decode_png  # Pillow would squeeze 16-bit colour into 8 bits

    data = torch.frombuffer(bytearray(file.read()), dtype=torch.uint8)
    pixels = _unit(decode_png(data).numpy().transpose(1, 2, 0))
    return _over_white(pixels, keep_alpha) if pixels.shape[2] in (2, 4) else pixels


def _decode_tiff(file: BinaryIO, keep_alpha: bool) -> np.ndarray:
    import tifffile

    with tifffile.TiffFile(file) as tiff:
        page, series = tiff.pages[0], tiff.series[0]
        if _is_picture(page, series):
            file.seek(0)
            return _decode_picture(Image.open(file), keep_alpha)
        try:
            pixels = _grid(series.asarray(), series.axes)
        except ValueError as error:
            if page.samplesperpixel > 1 or "imagecodecs" not in str(error):
                raise
            file.seek(0)  # Pillow knows compressions that tifffile leaves to imagecodecs, but squeezes deep colour
            return _decode_picture(Image.open(file), keep_alpha)
        alpha = pixels.shape[2] in (2, 4) and len(page.extrasamples) == 1 and page.extrasamples[0] in ALPHA
        tag = page.tags.get(ORIENTATION)
        inverted = page.photometric == WHITE_IS_ZERO and pixels.dtype.kind in "ui"
    pixels = _unit(_orient(pixels, tag.value if tag else 1))
    pixels = 1 - pixels if inverted else pixels
    return _over_white(pixels, keep_alpha) if alpha else pixels


def _peek_tiff(file: BinaryIO) -> Header:
    import tifffile

    with tifffile.TiffFile(file) as tiff:
        page, series = tiff.pages[0], tiff.series[0]
        if _is_picture(page, series):
            file.seek(0)
            return _peek_picture(Image.open(file))
        height, width, channels = _grid(np.broadcast_to(np.zeros((), series.dtype), series.shape), series.axes).shape
        alpha = channels in (2, 4) and len(page.extrasamples) == 1 and page.extrasamples[0] in ALPHA
        return Header(f"tiff {series.dtype}", width, height, channels - alpha, 8 * series.dtype.itemsize, alpha)


def _is_picture(page, series) -> bool:
    """Whether a TIFF is what Pillow reads rightly: at most 8 bits, and every sample with a known meaning."""
    if not isinstance(page.bitspersample, int) or page.bitspersample > 8 or "Q" in series.axes or "C" in series.axes:
        return False
    if page.photometric in (PALETTE, SEPARATED, YCBCR, CIELAB):
        return True
    extra = page.extrasamples
    return page.samplesperpixel in (1, 3) or (len(extra) == 1 and extra[0] in ALPHA and page.samplesperpixel in (2, 4))


def _grid(pixels: np.ndarray, axes: str) -> np.ndarray:
    """The first image of a TIFF series as (H, W, C); samples, channels or an unnamed axis are its bands."""
    bands = next((axis for axis in "SCQ" if axis in axes), None)
    first = tuple(slice(None) if axis in ("Y", "X", bands) else 0 for axis in axes)
    pixels, axes = pixels[first], "".join(axis for axis in axes if axis in ("Y", "X", bands))
    if bands in (None, "Q"):  # an array saved without a word on its axes, as in .npy
        return _bands_last(pixels)
    return pixels.transpose([axes.index(axis) for axis in ("Y", "X", bands)])


def _bands_last(pixels: np.ndarray) -> np.ndarray:
    """(H, W), (H, W, C) or (C, H, W) to (H, W, C): the bands are the shorter end."""
    if pixels.ndim == 2:
        return pixels[..., None]
    if pixels.ndim != 3:
        raise ValueError(f"an array of shape {pixels.shape} is not an image: (H, W) or (H, W, C) is")
    return pixels.transpose(1, 2, 0) if pixels.shape[0] < pixels.shape[2] else pixels


def _unit(pixels: np.ndarray) -> np.ndarray:
    """uint8 as it is, other integers divided by their largest value, floats as they are, all in float32."""
    if pixels.dtype == bool:
        return pixels.astype(np.uint8) * 255
    if pixels.dtype == np.uint8:
        return pixels
    if pixels.dtype.kind in "ui":
        return (pixels / np.float64(np.iinfo(pixels.dtype).max)).astype(np.float32)
    if not np.isfinite(pixels).all():
        raise ValueError("holds NaN or infinite values")
    return pixels.astype(np.float32)


def _over_white(pixels: np.ndarray, keep: bool) -> np.ndarray:
    """Lay (H, W, C + 1), whose last channel is opacity, on white."""
    if keep:
        return pixels
    colour, alpha = pixels[..., :-1], pixels[..., -1:]
    if pixels.dtype != np.uint8:
        return colour * alpha + (1 - alpha)
    if alpha.min() == 255:
        return colour
    alpha = alpha.astype(np.uint32)
    return ((colour * alpha + 255 * (255 - alpha) + 127) // 255).astype(np.uint8)


def _orient(pixels: np.ndarray, orientation: int) -> np.ndarray:
    """Turn (H, W, C) upright, given the orientation tag (1 to 8) of TIFF and EXIF."""
    if orientation in (5, 6, 7, 8):
        pixels = pixels.swapaxes(0, 1)
    if orientation in (3, 4, 7, 8):
        pixels = pixels[::-1]
    if orientation in (2, 3, 6, 7):
        pixels = pixels[:, ::-1]
    return pixels
