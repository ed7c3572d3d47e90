"""Reconstruction panels: rows of images under titles, a caption below, as one picture for a PNG or for TensorBoard."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from util.errors import UserError

GAP, INK, PAPER = 6, (20, 20, 20), (255, 255, 255)


def panel(
    columns: dict[str, Tensor], caption: str = "", bands: Sequence[int] | None = None, rows: int = 8, side: int = 112
) -> np.ndarray:
    """Columns of images under their titles -> (height, width, 3) uint8, for a PNG or add_image(dataformats="HWC").

    columns: title -> (B, C, H, W) in [0, 1], NaN where nothing is to be seen; a column may be some whole times larger
    caption: below all; of which channels are shown, where there are others, it says so by itself
    bands:   which of several channels are red, green and blue, or the one to show in grey; by default the first three
    rows:    images at most, fewer if they would not fit in 2,000 px
    side:    least height of an image in pixels; smaller ones are enlarged without blur
    """
    height = max(x.shape[-2] for x in columns.values())
    height *= math.ceil(side / height)
    rows = min(rows, max(2000 // height, 2), min(len(x) for x in columns.values()))
    tiles = [[tile(image, height, bands) for image in x[:rows]] for x in columns.values()]
    width = tiles[0][0].shape[1]

    font = ImageFont.load_default(max(13, min(width // 10, 22)))
    line = sum(font.getmetrics())
    titles = [wrap(title, font, width) for title in columns]
    total = GAP + len(tiles) * (width + GAP)
    told = f"{caption} {shown(max(x.shape[1] for x in columns.values()), bands)}".strip()
    notes = wrap(told, font, total - 2 * GAP)
    top = GAP + max(map(len, titles)) * line + GAP
    bottom = top + rows * (height + GAP)
    sheet = Image.new("RGB", (total, bottom + len(notes) * line + GAP * bool(notes)), PAPER)
    pen = ImageDraw.Draw(sheet)
    for i, (title, images) in enumerate(zip(titles, tiles)):
        left = GAP + i * (width + GAP)
        for j, words in enumerate(title):
            pen.text((left + width / 2, top - GAP - (len(title) - j) * line), words, INK, font, anchor="ma")
        for j, image in enumerate(images):
            sheet.paste(Image.fromarray(image), (left, top + j * (height + GAP)))
    for j, words in enumerate(notes):
        pen.text((GAP, bottom + j * line), words, INK, font)
    return np.asarray(sheet)


def save_panel(path: Path, picture: np.ndarray) -> None:
    """Write a panel as PNG; folders are made as needed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(picture).save(path)


def tile(image: Tensor, height: int, bands: Sequence[int] | None) -> np.ndarray:
    """One image (C, H, W) as (height, width, 3) uint8, hatched where it is NaN."""
    times, rest = divmod(height, image.shape[1])
    if rest:
        raise ValueError(f"a tile of {height} px is no whole multiple of an image of {image.shape[1]} px")
    x = image[rgb(len(image), bands)].float().cpu().numpy().transpose(1, 2, 0)
    x = x.repeat(times, 0).repeat(times, 1)  # by whole pixels: what one sees is what the method saw
    row, column = np.indices(x.shape[:2])
    hatch = np.where((row + column) % 8 < 2, 0.62, 0.5)[..., None]
    return (np.where(np.isnan(x), hatch, x).clip(0, 1) * 255).round().astype(np.uint8)


def rgb(channels: int, bands: Sequence[int] | None) -> list[int]:
    """The channels to show as red, green and blue. UserError if `bands` asks for one that is not there."""
    if channels == 1:
        return [0, 0, 0]
    bands = list(bands) if bands else list(range(3 if channels >= 3 else 1))
    if len(bands) not in (1, 3) or not all(0 <= band < channels for band in bands):
        raise UserError(f"bands {bands} cannot be shown: give 1 or 3 of the image's channels 0 to {channels - 1}")
    return bands if len(bands) == 3 else bands * 3


def shown(channels: int, bands: Sequence[int] | None) -> str:
    """A sentence on which channels are to be seen, where these are not all; counted from 1."""
    if channels == 1 or (channels == 3 and not bands):
        return ""
    which = [band + 1 for band in rgb(channels, bands)]
    if len(set(which)) == 1:
        return f"Shown is channel {which[0]} of {channels}."
    return f"Shown as red, green and blue are channels {which[0]}, {which[1]} and {which[2]} of {channels}."


def wrap(text: str, font: ImageFont.FreeTypeFont, width: int) -> list[str]:
    """Break a text into lines of at most `width` px, between words."""
    lines: list[str] = []
    for word in text.split():
        if lines and font.getlength(f"{lines[-1]} {word}") <= width:
            lines[-1] += f" {word}"
        else:
            lines.append(word)
    return lines
