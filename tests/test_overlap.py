"""Roots that share files: a file counts once, and nothing held out is trained on; roots of different channels."""

import os
import tarfile
import time

import numpy as np
import pytest
import tifffile
from PIL import Image

from util.data.images import open_images
from util.data.names import Names
from util.data.sources import Files, once


def write(path, count, bands=3):
    path.mkdir(parents=True, exist_ok=True)
    for i in range(count):
        pixels = np.full((8, 8, bands), i, np.uint8)
        if bands in (1, 3):
            Image.fromarray(pixels.squeeze()).save(path / f"{i}.png")
        else:
            tifffile.imwrite(path / f"{i}.tif", pixels, photometric="minisblack", planarconfig="contig")
    return path


def files(images):
    return [os.path.realpath(images.path(i)) for i in range(len(images))]


def listing(path, *names):
    path.write_text("".join(f"{name}\n" for name in names))
    return path


@pytest.fixture
def data(tmp_path):
    """300 images in data/a and data/b; `link` leads to data/a."""
    for name in "ab":
        write(tmp_path / "data" / name, 150)
    (tmp_path / "link").symlink_to(tmp_path / "data" / "a")
    return tmp_path


ROOTS = {
    "the same twice": lambda at: ([at / "data", f"{at}/data/../data/"], 300),
    "one inside the other": lambda at: ([at / "data", at / "data" / "a"], 150),
    "the inner first": lambda at: ([at / "data" / "a", at / "data"], 150),
    "through a link": lambda at: ([at / "data", at / "link"], 150),
    "a list of files in a root": lambda at: (
        [at / "data", listing(at / "few.txt", "data/a/1.png", f"{at}/link/2.png", f"{at}/data/b/3.png")],
        3,
    ),
    "a list that names one twice": lambda at: (
        [listing(at / "all.txt", *(f"data/a/{i}.png" for i in range(150)), "./data/a/7.png", "link/9.png")],
        2,
    ),
}


@pytest.mark.parametrize("case", ROOTS)
def test_a_file_counts_once_and_what_is_held_out_is_not_trained_on(data, case):
    roots, repeated = ROOTS[case](data)
    found = open_images([str(root) for root in roots])
    train, val = files(found.train), files(found.val)
    assert len(train + val) == len(set(train + val)) == (150 if case == "a list that names one twice" else 300)
    assert len(val) == len(train + val) // 100
    assert f"{repeated:,} names of files named before were left out" in str(found.survey)


def test_a_file_stays_with_the_first_root_that_names_it(data):
    found = open_images([str(data / "data" / "a"), str(data / "data")], str(data / "data" / "b"), labels=False)
    assert found.train.bounds.tolist() == [0, 150, 300]
    assert all("/data/a/" in path for path in files(found.train)[:150])
    assert all("/data/b/" in path for path in files(found.train)[150:])


def test_the_labels_of_files_left_out_are_none_of_the_classes(data):
    labelled = listing(data / "all.txt", *(f"data/{name}/{i}.png {name}" for name in "ab" for i in range(150)))
    again = listing(data / "again.txt", *(f"link/{i}.png other" for i in range(150)))
    found = open_images([str(labelled), str(again)], labels=True)
    assert found.classes == ["a", "b"] and np.bincount(found.train.labels).sum() == 297


def test_shards_reached_twice_count_once(data):
    with tarfile.open(data / "data.tar", "w") as tar:
        tar.add(data / "data" / "a", "a")
    (data / "linked.tar").symlink_to("data.tar")
    found = open_images([str(data / "data.tar"), str(data / "linked.tar"), str(data / "data.tar")])
    assert len(found.train) + len(found.val) == 150 and "300 names" in str(found.survey)


def test_what_is_named_once_is_left_as_it_is(data):
    found = open_images([str(data / "data" / "a"), str(data / "data" / "b")])
    assert len(str(found.survey).splitlines()) == 3 and len(found.train) + len(found.val) == 300


def test_validation_images_that_are_trained_on_are_told(data):
    train, val = str(data / "data"), str(data / "data" / "a")
    assert "150 of 150 images to validate are trained on, too" in str(open_images(train, val).survey)
    assert "trained on" not in str(open_images(str(data / "data" / "b"), val).survey)
    split = write(data / "split" / "val", 5) and write(data / "split" / "train", 7).parent
    assert "trained on" not in str(open_images(str(split)).survey)
    both = open_images([str(split), str(split / "val")])
    assert "5 of 5 images to validate are trained on, too" in str(both.survey)


def test_millions_of_names_are_compared_quickly_and_no_file_is_asked_for(tmp_path, monkeypatch):
    """Folders are resolved, each once; the files need not even exist."""
    n, asked, lstat = 100_000, [], os.lstat
    names = Names(f"n{i % 10:02d}/{i}.png" for i in range(n))
    monkeypatch.setattr(os, "lstat", lambda path, **options: asked.append(path) or lstat(path, **options))
    (tmp_path / "n00").mkdir()
    start = time.perf_counter()
    kept, numbers, repeated = once([Files(tmp_path, names), Files(tmp_path / "n00" / "..", names)])
    assert repeated == len(numbers) == n and [len(source.names) for source in kept] == [n, 0]
    assert len(asked) < 20 * 30 and not any(str(path).endswith(".png") for path in asked)
    assert time.perf_counter() - start < 20e-6 * 2 * n


def test_roots_of_different_channels_are_told(tmp_path):
    grey, colour, bands = (write(tmp_path / name, 30, n) for name, n in (("grey", 1), ("colour", 3), ("bands", 4)))
    said = str(open_images([str(grey), str(colour)]).survey)
    assert f"channels  1 in {grey}, 3 in {colour}: the run takes 3" in said and "cannot" not in said
    said = str(open_images([str(colour), str(bands)], channels=3).survey)
    assert f"3 in {colour}, 4 in {bands}" in said
    assert "of 59 images looked at have 4 channels, which cannot be made 3: they count as unreadable" in said
    assert "channels  " not in str(open_images([str(colour)]).survey)


def test_transparency_is_a_fourth_channel_only_where_one_is_asked_for(tmp_path):
    write(tmp_path / "colour", 30)
    (tmp_path / "clear").mkdir()
    for i in range(30):
        Image.fromarray(np.full((8, 8, 4), i, np.uint8)).save(tmp_path / "clear" / f"{i}.png")
    roots = [str(tmp_path / "colour"), str(tmp_path / "clear")]
    assert "cannot" not in str(open_images(roots).survey)
    assert "have 3 channels, which cannot be made 4" in str(open_images(roots, channels=4).survey)
