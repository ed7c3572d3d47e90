import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as F

from util.data.crops import check_interpolation, crop_resize, draw_boxes
from util.data.dice import Dice
from util.errors import UserError
from util.times import Size


class Transform(Protocol):
    """Images of one size, (B, C, H, W) of any channels and uint8 or float32, to (B, C, *size) of the same kind.

    All randomness comes from `dice`, which has a stream for each image.
    """

    def __call__(self, images: Tensor, size: Size, dice: Dice) -> Tensor: ...


class RandomCrop:
    """Cut out a random part of each image, resize it, and mirror every other one (MAE, SimMIM).

    scale: share of the area that is kept, from and to; (1, 1) keeps the whole image, resized.
    ratio: width by height of the part, relative to that of the size asked for.
    flip: share of images to mirror. interpolation: bilinear or bicubic, antialiased.
    """

    def __init__(self, scale=(0.2, 1.0), ratio=(3 / 4, 4 / 3), flip: float = 0.5, interpolation: str = "bicubic"):
        if not 0 < scale[0] <= scale[1] <= 1:
            raise UserError(f"data.scale is {tuple(scale)}: it must be two shares of the area, such as (0.2, 1)")
        check_interpolation(interpolation)
        self.scale, self.ratio, self.flip, self.interpolation = tuple(scale), ratio, flip, interpolation

    def __call__(self, images: Tensor, size: Size, dice: Dice) -> Tensor:
        height, width = images.shape[-2:]
        if self.scale == (1, 1):
            boxes = np.tile([0, 0, height, width], (len(images), 1))
        else:
            boxes = draw_boxes(dice, height, width, self.scale, [r * size[1] / size[0] for r in self.ratio])
        mirrored = dice.uniform(1)[:, 0] < self.flip
        parts = crop_resize(images, boxes, size, self.interpolation)
        pixels = parts.numpy()
        pixels[mirrored] = pixels[mirrored, ..., ::-1]
        return parts


class CentreCrop:
    """Resize the short side to `size / keep` and cut out the centre; an image of that size already is left alone."""

    def __init__(self, keep: float = 0.875, interpolation: str = "bicubic"):
        check_interpolation(interpolation)
        self.keep, self.interpolation = keep, interpolation

    def __call__(self, images: Tensor, size: Size, dice: Dice | None = None) -> Tensor:
        given = images.shape[-2:]
        if tuple(given) == tuple(size):
            return images
        grow = max(wanted / self.keep / side for wanted, side in zip(size, given, strict=True))
        resized = [max(wanted, round(grow * side)) for wanted, side in zip(size, given, strict=True)]
        return F.center_crop(
            F.resize(images, resized, v2.InterpolationMode(self.interpolation), antialias=True), list(size)
        )


class Augment:
    """timm's training transform: random crop and mirror, then RandAugment or colour jitter, then random erasing.

    auto: None, or a RandAugment string such as `rand-m9-mstd0.5-inc1`; with it, colour jitter is left out, as in timm.
    erase: share of images that lose a rectangle to normal noise of the data's mean and std.
    channels, bits: of the data; RandAugment and jitter are defined for 8 bits and 1 or 3 channels only.
    """

    def __init__(
        self,
        mean: list[float],
        std: list[float],
        auto: str | None = "rand-m9-mstd0.5-inc1",
        jitter: float = 0.0,
        erase: float = 0.25,
        scale=(0.08, 1.0),
        ratio=(3 / 4, 4 / 3),
        flip: float = 0.5,
        interpolation: str = "bicubic",
        channels: int = 3,
        bits: int = 8,
    ):
        if (auto or jitter) and (channels not in (1, 3) or bits > 8):
            raise UserError(
                f"RandAugment and colour jitter need 8-bit images of 1 or 3 channels, not {channels} of {bits} bits: "
                "set data.augment to none and data.jitter to 0"
            )
        if auto and not auto.startswith("rand"):
            raise UserError(f"data.augment is {auto}: it must be none or a RandAugment such as rand-m9-mstd0.5-inc1")
        self.crop = RandomCrop(scale, ratio, flip, interpolation)
        self.mean, self.std, self.erase, self.auto = mean, std, erase, auto
        self.jitter = v2.ColorJitter(jitter, jitter, jitter) if jitter and not auto else None

    def __call__(self, images: Tensor, size: Size, dice: Dice) -> Tensor:
        images = self.crop(images, size, dice)
        if (self.auto or self.jitter) and images.dtype == torch.uint8:
            images = torch.stack([self.recolour(image, seed) for image, seed in zip(images, dice.seeds(), strict=True)])
        if self.erase:
            images = self.erased(images, dice)
        return images

    def recolour(self, image: Tensor, seed: int) -> Tensor:
        with seeded(seed):
            if self.jitter:
                return self.jitter(image)
            colour = Image.fromarray(
                image.expand(3, -1, -1).permute(1, 2, 0).numpy()
            )  # gray in three channels stays gray
            augmented = self.rand_augment(image.shape[-2:])(colour)
            return torch.from_numpy(np.array(augmented)).permute(2, 0, 1)[: len(image)]

    def rand_augment(self, size: Size):
        from timm.data.auto_augment import rand_augment_transform

        fill = [min(255, round(255 * m)) for m in self.mean]
        how = Image.Resampling[self.crop.interpolation.upper()]
        options = {"translate_const": int(min(size) * 0.45), "img_mean": tuple(fill * 3)[:3], "interpolation": how}
        if "mmax" not in self.auto:
            options["magnitude_max"] = 9.99  # at 10 timm posterizes to 0 bits, which newer Pillow refuses
        return rand_augment_transform(self.auto, options)

    def erased(self, images: Tensor, dice: Dice) -> Tensor:
        """Random erasing with normal noise (timm's mode `pixel`); before normalising, hence clipped to 8 bits."""
        images = images.clone()
        chosen = dice.uniform(1)[:, 0] < self.erase
        boxes = draw_boxes(dice, *images.shape[-2:], (0.02, 1 / 3), (0.3, 1 / 0.3))
        seeds = dice.seeds()
        mean, std = (torch.tensor(values)[:, None, None] for values in (self.mean, self.std))
        for i in np.flatnonzero(chosen):
            top, left, height, width = boxes[i]
            noise = torch.randn(len(mean), height, width, generator=torch.Generator().manual_seed(seeds[i]))
            patch = mean + std * noise
            if images.dtype == torch.uint8:
                patch = (255 * patch).round().clamp(0, 255)
            images[i, :, top : top + height, left : left + width] = patch.to(images.dtype)
        return images


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Seed the generators that timm and torchvision draw from, and give them back as they were."""
    states = random.getstate(), np.random.get_state(), torch.default_generator.get_state()
    random.seed(seed)
    np.random.seed(seed)
    torch.default_generator.manual_seed(seed)  # torch.manual_seed, for all devices, is a hundred times slower
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.default_generator.set_state(states[2])
