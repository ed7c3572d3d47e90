import numpy as np
import torch
from torch import Tensor
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as F

from util.data.dice import Dice
from util.errors import UserError
from util.times import Size

TRIES = 10  # at a crop that fits, as in torchvision
BATCHED = 64 * 64  # up to this many pixels, cropping a whole batch by matrix products beats a loop over torchvision


def check_interpolation(name: str) -> None:
    if name not in ("bilinear", "bicubic"):
        raise UserError(f"interpolation is {name}: it must be bilinear or bicubic")


def draw_boxes(dice: Dice, height: int, width: int, scale, ratio) -> np.ndarray:
    """Parts of an image, (B, 4) as top, left, height, width, with area in `scale` and width by height in `ratio`.

    The first of ten draws that fits; if none does, the largest central part of an allowed shape (as in torchvision).
    """
    draws = dice.uniform(2 * TRIES + 2)
    areas = height * width * (scale[0] + draws[:, :TRIES] * (scale[1] - scale[0]))
    low, high = np.log(ratio)
    shapes = np.exp(low + draws[:, TRIES:-2] * (high - low))
    widths, heights = np.sqrt(areas * shapes).round().astype(int), np.sqrt(areas / shapes).round().astype(int)
    fits = (widths > 0) & (widths <= width) & (heights > 0) & (heights <= height)
    each, first = np.arange(len(draws)), fits.argmax(1)
    shape = min(max(width / height, ratio[0]), ratio[1])
    found = fits.any(1)
    h = np.where(found, heights[each, first], min(height, round(width / shape)))
    w = np.where(found, widths[each, first], min(width, round(height * shape)))
    top = np.where(found, np.floor(draws[:, -2] * (height - h + 1)), (height - h) // 2)
    left = np.where(found, np.floor(draws[:, -1] * (width - w + 1)), (width - w) // 2)
    return np.stack([top, left, h, w], axis=1).astype(int)


def crop_resize(images: Tensor, boxes: np.ndarray, size: Size, interpolation: str) -> Tensor:
    """Cut a box (top, left, height, width) out of each image and resize it with antialiasing, to (B, C, *size)."""
    height, width = images.shape[-2:]
    if height * width > BATCHED:
        mode = v2.InterpolationMode(interpolation)
        parts = (
            F.resized_crop(image, *box, list(size), mode) for image, box in zip(images, boxes.tolist(), strict=True)
        )
        return torch.stack(list(parts))
    rows = resize_matrix(boxes[:, 0], boxes[:, 2], height, size[0], interpolation)[:, None]  # (B, 1, h, H)
    columns = resize_matrix(boxes[:, 1], boxes[:, 3], width, size[1], interpolation)[:, None]  # (B, 1, w, W)
    # numpy, as torch's operations on so little wait for threads far longer than they take
    parts = rows @ images.numpy().astype(np.float32) @ columns.swapaxes(2, 3)
    return torch.from_numpy(parts.round().clip(0, 255).astype(np.uint8) if images.dtype == torch.uint8 else parts)


def resize_matrix(start: np.ndarray, length: np.ndarray, extent: int, size: int, interpolation: str) -> np.ndarray:
    """Weights (B, size, extent) that take `length` pixels from `start` on, out of `extent`, to `size` pixels."""
    start, length = (part[:, None, None].astype(np.float32) for part in (start, length))
    step = length / np.float32(size)
    centre = start + (np.arange(size, dtype=np.float32)[:, None] + 0.5) * step
    place = np.arange(extent, dtype=np.float32) + 0.5
    x = np.abs(place - centre) / np.maximum(step, 1)  # shrinking widens the kernel: that is the antialiasing
    if interpolation == "bilinear":
        weights = np.maximum(1 - x, 0)
    else:  # Keys' cubic with a = -0.5, as Pillow's
        weights = np.where(x < 1, (1.5 * x - 2.5) * x * x + 1, ((-0.5 * x + 2.5) * x - 4) * x + 2) * (x < 2)
    weights *= (place > start) & (place < start + length)
    return weights / weights.sum(-1, keepdims=True)
