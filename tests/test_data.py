"""Images from wherever they lie: found, labelled, parted, and read rightly whatever their format."""

import gzip
import io
import json
import os
import shutil
import tarfile

import numpy as np
import pytest
import tifffile
import torch
from PIL import Image

from util.data.decode import decode, peek
from util.data.images import open_images
from util.data.names import Names
from util.data.survey import measure
from util.errors import UserError

RNG = np.random.default_rng(0)
GRAY = RNG.integers(0, 256, (8, 7), np.uint8)
RGB = RNG.integers(0, 256, (8, 7, 3), np.uint8)
DEEP = RNG.integers(0, 65536, (8, 7), np.uint16)
DEEP_RGB = RNG.integers(0, 65536, (8, 7, 3), np.uint16)
BANDS = RNG.integers(0, 65536, (8, 7, 6), np.uint16)
ALPHA = np.array([0, 255, 128, 255, 255, 0, 77], np.uint8) * np.ones((8, 1), np.uint8)


def pil(array, kind="png", mode=None, **options) -> bytes:
    file = io.BytesIO()
    image = array if isinstance(array, Image.Image) else Image.fromarray(array)
    (image.convert(mode) if mode else image).save(file, kind, **options)
    return file.getvalue()


def tif(array, **options) -> bytes:
    file = io.BytesIO()
    tifffile.imwrite(file, array, **options)
    return file.getvalue()


def npy(array) -> bytes:
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()


def deep_png(pixels: np.ndarray) -> bytes:
    """A 16-bit colour PNG, which neither Pillow nor torchvision writes."""
    import struct
    import zlib

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    height, width, channels = pixels.shape
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in pixels)
    header = struct.pack(">IIBBBBB", width, height, 16, {3: 2, 4: 6}[channels], 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def on_white(colour: np.ndarray) -> np.ndarray:
    alpha = ALPHA.reshape(8, 7, *[1] * (colour.ndim - 2)) / 255
    return np.round(colour * alpha + 255 * (1 - alpha))


def palette(transparent: bool) -> tuple[bytes, np.ndarray]:
    colours = RNG.integers(0, 256, (16, 3), np.uint8)
    indices = RNG.integers(0, 16, (8, 7), np.uint8)
    image = Image.fromarray(indices)
    image = Image.frombytes("P", image.size, image.tobytes())
    image.putpalette(colours.flatten().tolist())
    truth = colours[indices].astype(float)
    if transparent:
        truth[indices == 3] = 255
    return pil(image, **({"transparency": 3} if transparent else {})), truth


UPRIGHT = RNG.integers(0, 256, (8, 7, 3), np.uint8)
FORMATS = {
    "gray": (pil(GRAY), GRAY),
    "1-bit": (pil(GRAY > 99), 255.0 * (GRAY > 99)),
    "1-bit tiff": (pil(GRAY > 99, "tiff"), 255.0 * (GRAY > 99)),
    "rgb": (pil(RGB), RGB),
    "rgb tiff": (tif(RGB, photometric="rgb"), RGB),
    "rgb webp": (pil(RGB, "webp", lossless=True), RGB),
    "gray alpha": (pil(np.dstack([GRAY, ALPHA]), mode="LA"), on_white(GRAY)),
    "rgba": (pil(np.dstack([RGB, ALPHA])), on_white(RGB)),
    "rgba tiff": (tif(np.dstack([RGB, ALPHA]), photometric="rgb", extrasamples=["unassalpha"]), on_white(RGB)),
    "palette": palette(False),
    "palette with transparency": palette(True),
    "cmyk tiff": (
        pil(
            Image.merge("CMYK", [Image.fromarray(255 - RGB[..., i]) for i in range(3)] + [Image.new("L", (7, 8))]),
            "tiff",
        ),
        RGB,
    ),
    "16-bit png": (pil(DEEP), DEEP / 65535),
    "16-bit rgb png": (deep_png(DEEP_RGB), DEEP_RGB / 65535),
    "16-bit tiff": (tif(DEEP), DEEP / 65535),
    "16-bit lzw tiff": (pil(DEEP, "tiff", compression="tiff_lzw"), DEEP / 65535),
    "16-bit rgb tiff": (tif(DEEP_RGB, photometric="rgb"), DEEP_RGB / 65535),
    "float tiff": (tif((DEEP / 65535 * 3 - 1).astype(np.float32)), DEEP / 65535 * 3 - 1),
    "6 bands": (tif(BANDS, photometric="minisblack", planarconfig="contig"), BANDS / 65535),
    "6 bands, planar": (
        tif(BANDS.transpose(2, 0, 1), photometric="minisblack", planarconfig="separate"),
        BANDS / 65535,
    ),
    "6 bands, a page each": (tif(BANDS.transpose(2, 0, 1)), BANDS / 65535),
    "4 bands of 8 bits": (
        tif(np.dstack([RGB, GRAY]), photometric="minisblack", planarconfig="contig", extrasamples=["unspecified"] * 3),
        np.dstack([RGB, GRAY]),
    ),
    "npy": (npy(DEEP), DEEP / 65535),
    "npy with bands": (npy(BANDS), BANDS / 65535),
}


@pytest.mark.parametrize("name", FORMATS)
def test_formats_are_read_rightly(name):
    data, truth = FORMATS[name]
    pixels = decode(io.BytesIO(data))
    truth = np.atleast_3d(truth)
    deep = truth.dtype.kind == "f" and truth.max() <= 2
    assert pixels.dtype == (np.float32 if deep else np.uint8) and pixels.shape == truth.shape
    assert np.abs(pixels - truth.astype(float)).max() <= (1e-6 if deep else 1)
    header = peek(io.BytesIO(data))
    assert (header.height, header.width, header.channels) == truth.shape and (header.bits > 8) == deep


def test_cmyk_jpeg_keeps_its_colours():
    data = pil(Image.new("RGB", (16, 16), (200, 30, 60)), "jpeg", mode="CMYK", quality=95)
    assert np.abs(decode(io.BytesIO(data)).mean((0, 1)) - [200, 30, 60]).max() < 8


@pytest.mark.parametrize("orientation", range(1, 9))
def test_orientation_is_applied_by_both_readers(orientation):
    """Pillow's own tables turn 8 bits upright; those for deep TIFFs must agree with them."""
    exif = Image.Exif()
    exif[274] = orientation
    upright = decode(io.BytesIO(pil(UPRIGHT, "tiff", exif=exif)))
    deep = decode(
        io.BytesIO(tif(UPRIGHT.astype(np.uint16) * 257, photometric="rgb", extratags=[(274, 3, 1, orientation, True)]))
    )
    assert (upright.shape == (7, 8, 3)) == (orientation > 4)
    assert np.array_equal(deep * 255, upright) or np.abs(deep * 255 - upright).max() < 1e-3


def test_broken_files_raise():
    for data in (b"", b"no image", pil(RGB)[:60], npy(np.full((4, 4), np.nan)), npy(np.zeros(4))):
        with pytest.raises((OSError, EOFError, ValueError)):
            decode(io.BytesIO(data))


def make(folder, names, size=(8, 8), color=None):
    for i, name in enumerate(names):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB" if color is None else color, size, i % 256 if color else (i % 256, 0, 0)).save(path)


def test_any_nesting_without_labels_and_a_held_out_percent(tmp_path):
    names = [f"a/{'b/' * (i % 3)}{i:03d}.png" for i in range(300)]
    make(tmp_path / "x", names)
    (tmp_path / "x" / "a" / "notes.txt").write_text("not an image")
    (tmp_path / "x" / "a" / "up").symlink_to(tmp_path / "x")
    data = open_images(str(tmp_path / "x"))
    held = {data.val.path(i).removeprefix(f"{tmp_path}/x/") for i in range(len(data.val))}
    kept = {data.train.path(i).removeprefix(f"{tmp_path}/x/") for i in range(len(data.train))}
    assert len(held) == 3 and len(kept) == 297 and held | kept == set(names)
    shutil.move(tmp_path / "x", tmp_path / "elsewhere")  # another place, made in another order, holds out the same
    again = open_images(f"{tmp_path}/elsewhere")
    assert {again.val.path(i).removeprefix(f"{tmp_path}/elsewhere/") for i in range(len(again.val))} == held
    assert data.train.labels is None and "300" not in str(data.survey) and "297" in str(data.survey)


def test_train_and_val_folders_and_integer_classes(tmp_path):
    make(
        tmp_path, [f"{split}/{label}/{i}.png" for split in ("train", "val") for label in (0, 2, 10, 1) for i in (0, 1)]
    )
    data = open_images(str(tmp_path), labels=True)
    assert data.classes == ["0", "1", "2", "10"] and len(data.train) == len(data.val) == 8
    assert [int(label) for label in data.val.labels] == [
        int({"10": 3}.get(data.val.path(i).split("/")[-2], data.val.path(i).split("/")[-2])) for i in range(8)
    ]
    make(tmp_path / "other", ["7/a.png"])
    with pytest.raises(UserError, match="class 7 is not among the 4 classes"):
        open_images(str(tmp_path), val=str(tmp_path / "other"), labels=True)


def test_a_class_may_be_called_train(tmp_path):
    make(tmp_path, [f"{name}/{i}.png" for name in ("bus", "train") for i in range(3)])
    assert open_images(str(tmp_path), labels=True).classes == ["bus", "train"]


def test_lists(tmp_path):
    make(tmp_path / "images", ["a b.png", "c,d.png", "e.png"])
    (tmp_path / "train.txt").write_text("# path label\nimages/a b.png cat\nimages/c,d.png, dog\n\nimages/e.png\tcat\n")
    (tmp_path / "val.txt").write_text(f"{tmp_path}/images/e.png dog\n")
    data = open_images(str(tmp_path / "train.txt"), val=str(tmp_path / "val.txt"), labels=True)
    assert (
        data.classes == ["cat", "dog"] and data.train.labels.tolist() == [0, 1, 0] and data.val.labels.tolist() == [1]
    )
    assert all(data.train.read(i).shape == (3, 8, 8) for i in range(3))
    (tmp_path / "plain.txt").write_text("images/a b.png\nimages/c,d.png\n")
    assert sorted(open_images(str(tmp_path / "plain.txt"), val=str(tmp_path / "val.txt")).train.source.names) == [
        "images/a b.png",
        "images/c,d.png",
    ]


def test_a_list_without_labels_has_none(tmp_path):
    """Its folders are no labels either: a list says what it means."""
    make(tmp_path, [f"photos/{i}.png" for i in range(6)])
    (tmp_path / "all.txt").write_text("".join(f"photos/{i}.png\n" for i in range(6)))
    assert open_images(str(tmp_path / "all.txt")).train.labels is None
    with pytest.raises(UserError, match="has no label"):
        open_images(str(tmp_path / "all.txt"), labels=True)


def shard(path, samples):
    with tarfile.open(path, "w") as tar:
        for name, content in samples:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))


@pytest.mark.parametrize("form", ["folder", "braces", "json"])
def test_shards_give_images_and_labels_at_random(tmp_path, form):
    long = "x" * 120  # longer than a plain tar header holds
    for s in range(3):
        samples = []
        for i in range(4):
            label = (4 * s + i) % 5
            tag = ("json", json.dumps({"label": label})) if form == "json" else ("cls", str(label))
            samples += [
                (f"{long}/{i}.{tag[0]}", tag[1].encode()),
                (f"{long}/{i}.png", pil(np.full((6, 6), 10 * (4 * s + i), np.uint8))),
            ]
        shard(tmp_path / f"part-{s:03d}.tar", samples)
    root = tmp_path / "part-{000..002}.tar" if form == "braces" else tmp_path
    data = open_images(str(root), labels=True)
    assert len(data.train) == 11 and len(data.val) == 1 and data.survey.channels == 1
    for part in (data.train, data.val):
        for i in reversed(range(len(part))):
            assert int(part.read(i)[0, 0, 0]) // 10 % 5 == part.labels[i]
    assert data.train.path(0).startswith(f"{tmp_path}/part-00") and data.train.path(0).endswith(".png")


def test_several_roots(tmp_path):
    make(tmp_path / "one", [f"{i}.png" for i in range(5)])
    make(tmp_path / "two", [f"{i}.png" for i in range(5)], size=(4, 4))
    data = open_images([str(tmp_path / "one"), str(tmp_path / "two")])
    assert sorted(data.train.read(i).shape[-1] for i in range(9)).count(8) in (4, 5) and len(data.val) == 1


def idx(folder, count=300, classes=10):
    folder.mkdir(exist_ok=True)
    for split, n in (("train", count), ("t10k", 20)):
        for kind, array in (
            ("images-idx3", RNG.integers(0, 256, (n, 6, 4), np.uint8)),
            ("labels-idx1", np.arange(n, dtype=np.uint8) % classes),
        ):
            header = bytes([0, 0, 8, array.ndim]) + b"".join(int(side).to_bytes(4, "big") for side in array.shape)
            (folder / f"{split}-{kind}-ubyte.gz").write_bytes(gzip.compress(header + array.tobytes()))
    return folder


def test_fashion_mnist_from_a_folder(tmp_path, monkeypatch):
    data = open_images(f"fashion_mnist:{idx(tmp_path / 'idx')}", labels=True)
    assert data.train.pixels.shape == (300, 1, 6, 4) and len(data.val) == 20 and data.survey.channels == 1
    assert data.train.labels[:12].tolist() == [*range(10), 0, 1] and data.classes[9] == "Ankle boot"
    monkeypatch.setenv("FASHION_MNIST", str(tmp_path / "idx"))
    assert torch.equal(open_images("fashion_mnist").train.pixels, data.train.pixels)
    with pytest.raises(UserError, match="does not hold"):
        open_images(f"fashion_mnist:{tmp_path}")


def test_label_budget_and_fraction_are_even_nested_and_fixed(tmp_path):
    root = str(idx(tmp_path / "idx"))

    def paths(**options):
        train = open_images(root, labels=True, **options).train
        return {train.path(i) for i in range(len(train))}, np.bincount(train.labels, minlength=10)

    few, counts = paths(budget=50)
    assert counts.tolist() == [5] * 10 and paths(budget=50)[0] == few
    more, counts = paths(budget=73)
    assert few < more and counts.sum() == 73 and counts.max() - counts.min() == 1
    assert paths(budget=50, seed=1)[0] != few
    assert paths(fraction=0.1)[0] < paths(fraction=0.5)[0] and len(paths(fraction=0.1)[0]) == 30
    with pytest.raises(UserError, match="data.labels is 301"):
        paths(budget=301)


def test_nothing_found_says_what_was_looked_for(tmp_path):
    for i in range(3):
        (tmp_path / f"scan{i}.dcm").touch()
    with pytest.raises(UserError, match=r"0 images under .* \(looked for \.jpg .*\); found 3 \.dcm"):
        open_images(str(tmp_path))
    with pytest.raises(UserError, match=f"nearest folder that does is {tmp_path}\\)"):
        open_images(str(tmp_path / "no" / "such"))
    make(tmp_path / "flat", ["a.png", "b.png"])
    with pytest.raises(UserError, match="a.png has no label"):
        open_images(str(tmp_path / "flat"), labels=True)


def test_channels_and_statistics_come_from_the_data(tmp_path):
    make(tmp_path / "gray", [f"{i}.png" for i in range(10)], color="L")
    gray = open_images(str(tmp_path / "gray"))
    assert gray.survey.channels == 1 and gray.train.read(0).shape == (1, 8, 8)
    Image.fromarray(RGB).save(tmp_path / "gray" / "colour.png")
    mixed = open_images(str(tmp_path / "gray"))
    assert mixed.survey.channels == 3 and all(mixed.train.read(i).shape[0] == 3 for i in range(len(mixed.train)))
    (tmp_path / "bands").mkdir()
    for i in range(5):
        tifffile.imwrite(
            tmp_path / "bands" / f"{i}.tif",
            np.full((4, 9, 6), 6553 * (i + 1), np.uint16),
            photometric="minisblack",
            planarconfig="contig",
        )
    bands = open_images(str(tmp_path / "bands"))
    assert bands.survey.channels == 6 and bands.survey.bits == 16 and bands.train.read(0).dtype == torch.float32
    values = np.array([bands.train.read(i).mean() for i in range(4)])
    mean, std = measure(bands.train)
    assert np.allclose(mean, values.mean(), atol=1e-6) and np.allclose(std, values.std(), atol=1e-5) and len(mean) == 6
    assert "6 channels, 16-bit" in str(bands.survey) and "9 x 4" in str(bands.survey)


def test_names_are_compact_and_exact():
    names = ["a/ü.png", os.fsdecode(b"b/\xff.png"), "", "c"]
    assert list(Names(names)) == names and len(Names(names).text) < 20
