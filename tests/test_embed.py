"""Features of any images: a row for each, whatever happens on the way; and an encoder alone hides nothing."""

import json
import shutil
import subprocess
import sys
from contextlib import nullcontext

import numpy as np
import pytest
import torch
from PIL import Image
from pyarrow import parquet
from safetensors import safe_open

import main_finetune
from models.encoders.grid import Mask
from models.encoders.weights import load_encoder
from models.mim.masker import BlockMasker, RandomMasker
from models.transfer import embed as embedding
from tests.test_export import VIT, encoder_of
from tests.test_main import ENVIRONMENT, ROOT, pretrain, write_idx
from util.checkpoint import export as save_encoder
from util.data.images import open_all
from util.errors import UserError
from util.features import Table

TOLERANCE = 1e-5  # of the largest feature, in float32, between batches of different sizes


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A run with a ViT for 64 px, and 23 images of several kinds beside it, two of them broken."""
    folder = tmp_path_factory.mktemp("source")
    (folder / "run").mkdir()
    norm = {"mean": [0.5, 0.4, 0.3], "std": [0.2, 0.25, 0.3], "size": [64, 64], "crop": 0.8}
    save_encoder(folder / "run/encoder.safetensors", encoder_of(*VIT), norm)
    rng = np.random.default_rng(0)
    for i in range(23):
        place = folder / "images" / ("train", "val", "b/c")[i % 3]
        place.mkdir(parents=True, exist_ok=True)
        pixels = rng.integers(0, 256, (60 + i, 90, 3), dtype=np.uint8)
        Image.fromarray(pixels[..., 0] if i % 4 == 1 else pixels).save(place / f"{i:02}.png")
    for name in ("b/c/05.png", "val/19.png"):
        (folder / "images" / name).write_bytes(b"no image")
    return folder


def embed(source, folder, *more):
    argv = ["--config", str(ROOT / "configs/finetune/embed.yaml"), "--weights", str(source / "run"), "--data.root"]
    argv += [str(source / "images"), "--data.workers", "0", "--run.folder", str(folder), *more]
    return main_finetune.main(argv)


def rows_of(folder):
    return np.load(folder / "features.npy", mmap_mode="r"), (folder / "paths.txt").read_text().splitlines()


def by_hand(source, paths, what):
    """The same features, image by image, from what Pillow reads."""
    encoder, rows = load_encoder(str(source / "run")), []
    for path in paths:
        pixels = Image.open(path).convert("RGB")
        big = [round(side * max(80 / pixels.height, 80 / pixels.width)) for side in (pixels.width, pixels.height)]
        pixels = torch.from_numpy(np.array(pixels)).permute(2, 0, 1)
        pixels = torch.nn.functional.interpolate(pixels[None].float(), big[::-1], mode="bicubic", antialias=True)[0]
        top, left = (round((side - 64) / 2) for side in pixels.shape[1:])
        pixels = pixels[:, top : top + 64, left : left + 64].round().clamp(0, 255) / 255
        mean, std = (torch.tensor(v).view(-1, 1, 1) for v in ([0.5, 0.4, 0.3], [0.2, 0.25, 0.3]))
        with torch.no_grad():
            found = encoder(((pixels - mean) / std)[None])
        map = found.maps[-1][0]
        rows.append({"mean": map.mean((1, 2)), "class": found.prefix[0, 0], "patches": map.movedim(0, -1)}[what])
    return torch.stack(rows).numpy()


@pytest.mark.parametrize("what, shape", [("mean", (24,)), ("class", (24,)), ("patches", (4, 4, 24))])
def test_every_image_in_the_order_of_paths(source, tmp_path, what, shape, capsys):
    """Training and validation images alike, cut and normalised as the weights say; broken ones are named and NaN."""
    embed(source, tmp_path / "out", "--task.args.what", what, "--data.batch", "4")
    rows, paths = rows_of(tmp_path / "out")
    assert isinstance(rows, np.memmap) and rows.shape == (23, *shape) and rows.dtype == np.float32
    assert paths == sorted(str(path) for path in (source / "images").rglob("*.png"))
    bad = [path for path, row in zip(paths, rows) if np.isnan(row).any()]
    assert bad == [str(source / "images" / name) for name in ("b/c/05.png", "val/19.png")]
    assert all(np.isnan(rows[paths.index(path)]).all() for path in bad)
    assert sorted((tmp_path / "out/bad_images.txt").read_text().splitlines()) == bad
    good = [path for path in paths if path not in bad]
    expected = by_hand(source, good, what)
    found = np.stack([rows[paths.index(path)] for path in good])
    far = np.linalg.norm(found - expected) / np.linalg.norm(expected)
    assert far < 0.02  # two ways to resize round differently
    report = json.loads((tmp_path / "out/report.json").read_text())
    assert report["images"] == 23 and report["unreadable"] == 2 and report["images_per_s"] > 0
    said = capsys.readouterr().out
    assert "images    23, from" in said and "23/23" in said and "images/s" in said and "stored with the weights" in said
    assert not [path.name for path in (tmp_path / "out").iterdir() if "writing" in path.name or "done" in path.name]


def test_two_runs_and_other_batches_give_the_same(source, tmp_path):
    """To the bit in the same batches, with workers or without; within TOLERANCE in others."""
    for name, more in {"a": "4", "b": "4", "c": "23"}.items():
        embed(source, tmp_path / name, "--data.batch", more, "--data.workers", "1" if name == "b" else "0")
    a, b, c = (rows_of(tmp_path / name)[0] for name in "abc")
    assert np.array_equal(a, b, equal_nan=True)
    assert np.nanmax(np.abs(a - c)) <= TOLERANCE * np.nanmax(np.abs(a))


def test_parquet_holds_the_same(source, tmp_path):
    embed(source, tmp_path / "npy", "--task.args.what", "patches")
    embed(source, tmp_path / "parquet", "--task.args.what", "patches", "--task.args.to", "parquet")
    rows, paths = rows_of(tmp_path / "npy")
    table = parquet.read_table(tmp_path / "parquet/features.parquet")
    assert table.column_names == ["path", "features"] and table["path"].to_pylist() == paths
    shape = json.loads(table.schema.metadata[b"shape"])
    found = np.array(table["features"].to_pylist(), np.float32).reshape(-1, *shape)
    assert np.array_equal(found, rows, equal_nan=True) and shape == [4, 4, 24]
    assert not (tmp_path / "parquet/features.npy").exists() and not (tmp_path / "parquet/features.writing.npy").exists()


@pytest.mark.parametrize("to", ["npy", "parquet"])
def test_killed_it_goes_on_and_computes_nothing_twice(source, tmp_path, to, monkeypatch):
    embed(source, tmp_path / "whole", "--data.batch", "3", "--task.args.to", to)
    features, seen = embedding.Embed.features, []

    def counted(self, encoder, images):
        if images.any():  # a blank one tells how long a row is
            seen.append(len(images))
            if len(seen) == 4:
                raise KeyboardInterrupt
        return features(self, encoder, images)

    monkeypatch.setattr(embedding.Embed, "features", counted)
    with pytest.raises(KeyboardInterrupt):
        embed(source, tmp_path / "parts", "--data.batch", "3", "--task.args.to", to)
    assert not (tmp_path / f"parts/features.{to}").exists()
    seen[:] = [0] * 10
    embed(source, tmp_path / "parts", "--data.batch", "3", "--task.args.to", to)
    assert sum(seen) == 23 - 3 * 3
    read = (lambda f: parquet.read_table(f / "features.parquet")) if to == "parquet" else (lambda f: rows_of(f)[0])
    whole, parts = (read(tmp_path / name) for name in ("whole", "parts"))
    if to == "parquet":
        whole, parts = (np.array(t["features"].to_pylist(), np.float32) for t in (whole, parts))
    assert np.array_equal(whole, parts, equal_nan=True)
    seen[:] = [0] * 10
    embed(source, tmp_path / "parts", "--data.batch", "3", "--task.args.to", to)  # once more: all is done
    assert sum(seen) == 0
    assert json.loads((tmp_path / "parts/report.json").read_text())["unreadable"] == 2


def test_killed_for_good(source, tmp_path):
    """kill -9 between two batches, with loader processes."""
    shutil.copytree(source / "images/train", tmp_path / "images")
    for i in range(200):
        shutil.copy(tmp_path / "images/00.png", tmp_path / f"images/more_{i:03}.png")
    argv = [sys.executable, ROOT / "main_finetune.py", "--task.name", "embed", "--weights", source / "run"]
    argv += ["--data.root", tmp_path / "images", "--data.batch", "2", "--data.workers", "1", "--run.folder"]
    child = subprocess.Popen([*argv, tmp_path / "parts"], env=ENVIRONMENT, stdout=subprocess.DEVNULL)
    done = tmp_path / "parts/done.npy"
    while child.poll() is None and not (done.exists() and np.load(done).sum() > 3):
        pass
    child.kill()
    child.wait()
    before = int(np.load(done).sum())
    assert 3 < before < len(np.load(done))
    subprocess.run([*argv, tmp_path / "parts"], env=ENVIRONMENT, check=True, capture_output=True)
    subprocess.run([*argv, tmp_path / "whole"], env=ENVIRONMENT, check=True, capture_output=True)
    assert np.array_equal(rows_of(tmp_path / "parts")[0], rows_of(tmp_path / "whole")[0])


def test_processes_share_the_rows(tmp_path, monkeypatch):
    """Each takes its own batches, whatever others did before it, and the file is whole when all are done."""
    names = [f"{i}.png" for i in range(10)]
    monkeypatch.setattr("util.dist.world", lambda: 2)
    monkeypatch.setattr("util.dist.main_first", nullcontext)
    first = Table(tmp_path, "npy", names, (2,), 3, 7)
    assert [part.tolist() for part in first.todo()] == [[0, 1, 2], [6, 7, 8]]
    first.put(np.arange(3), np.ones((3, 2)))
    monkeypatch.setattr("util.dist.world", lambda: 1)
    again = Table(tmp_path, "npy", names, (2,), 3, 7)
    assert [part.tolist() for part in again.todo()] == [[3, 4, 5], [6, 7, 8], [9]]
    for part in again.todo():
        again.put(part, np.full((len(part), 2), 2))
    assert np.load(again.finish()).sum() == 6 + 28 and Table(tmp_path, "npy", names, (2,), 3, 7).todo() == []


@pytest.mark.parametrize("change, match", [
    ({"weights": 8}, r"other images or weights: weights \(7 there, 8 here\) differ"),
    ({"paths": ["a", "c"]}, "paths"),
    ({"shape": (3,)}, r"shape \(\[2\] there, \[3\] here\)"),
])  # fmt: skip
def test_rows_of_other_images_or_weights_are_not_mixed(tmp_path, change, match):
    given = {"folder": tmp_path, "to": "npy", "paths": ["a", "b"], "shape": (2,), "batch": 1, "weights": 7}
    Table(**given)
    with pytest.raises(UserError, match=match):
        Table(**given | change)


def test_a_full_disk_is_told_before_anything_is_computed(tmp_path, monkeypatch):
    def full(*given):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.posix_fallocate", full)
    with pytest.raises(UserError, match=r"cannot hold 4 GB of features: .*No space left"):
        Table(tmp_path, "npy", ["a"] * 1000, (1_000_000,), 1, 7)


def test_lists_shards_and_packed_sets(source, tmp_path):
    """A list keeps its own order; a packed set gives both its parts; one image is enough."""
    (tmp_path / "list.txt").write_text("".join(f"{source}/images/{n}\n" for n in ("val/22.png", "train/00.png")))
    embed(source, tmp_path / "list", "--data.root", str(tmp_path / "list.txt"))
    assert [path[-6:] for path in rows_of(tmp_path / "list")[1]] == ["22.png", "00.png"]
    (tmp_path / "one").mkdir()
    shutil.copy(source / "images/train/00.png", tmp_path / "one")
    subprocess.run(["tar", "-cf", tmp_path / "one.tar", "-C", tmp_path, "one"], check=True)
    for name in ("one", "one.tar"):
        embed(source, tmp_path / f"out_{name}", "--data.root", str(tmp_path / name))
    rows = rows_of(tmp_path / "out_one")[0]
    assert np.array_equal(rows, rows_of(tmp_path / "out_one.tar")[0]) and len(rows) == 1
    assert np.abs(rows[0] - rows_of(tmp_path / "list")[0][1]).max() <= TOLERANCE * np.abs(rows).max()
    found = open_all(write_idx(tmp_path / "idx"))
    assert len(found.train) == 256 + 96 and found.train.path(0) == "train/00000" and found.train.path(256)[:4] == "t10k"


@pytest.mark.parametrize("more, match", [
    (["--task.args.what", "clas"], 'there is no "clas", only mean, class, patches'),
    (["--task.args.to", "csv"], 'there is no "csv", only npy, parquet'),
    (["--task.args.wat", "mean"], "the nearest is what"),
    (["--task.name", "embde"], 'no task is called "embde"; the nearest is "embed"'),
    (["--weights", "none"], "weights is none, but embed needs some"),
    (["--data.root", "none"], "data.root is needed"),
])  # fmt: skip
def test_a_wrong_option_is_told_before_anything_is_written(source, tmp_path, more, match):
    with pytest.raises(UserError, match=match):
        embed(source, tmp_path / "out", *more)
    assert not (tmp_path / "out").exists()


def test_what_an_encoder_or_the_images_cannot_give(source, tmp_path, monkeypatch):
    (tmp_path / "run").mkdir()
    encoder = encoder_of(VIT[0], VIT[1] | {"class_token": False, "global_pool": "avg"})
    save_encoder(tmp_path / "run/encoder.safetensors", encoder, {"mean": [0.5] * 3, "std": [0.5] * 3, "size": [64, 64]})
    more = ["--weights", str(tmp_path / "run"), "--task.args.what", "class"]
    with pytest.raises(UserError, match='no class token for "class": use "mean" or "patches"'):
        embed(source, tmp_path / "a", *more)
    with pytest.raises(UserError, match="2 of 23 images cannot be read, data.max_bad allows 0.01"):
        embed(source, tmp_path / "b", "--data.max_bad", "0.01")
    monkeypatch.setattr(embedding, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="parquet needs pyarrow: pip install pyarrow"):
        embed(source, tmp_path / "c", "--task.args.to", "parquet")
    embed(source, tmp_path / "d")
    with pytest.raises(UserError, match=r"holds another run: data.batch \(64 there, 8 here\)"):
        embed(source, tmp_path / "d", "--data.batch", "8")


def test_an_encoder_in_python_is_deterministic_and_reaches_no_mask_code(source, tmp_path, monkeypatch):
    """Features of a pretrained encoder must not depend on which cells a mask would hide."""
    pretrain(write_idx(tmp_path / "idx"), tmp_path / "run", "--run.epochs", "1", "--run.probe", "16")
    with safe_open(tmp_path / "run/encoder.safetensors", "pt") as file:
        assert json.loads(file.metadata()["normalization"])["crop"] == 0.875

    def reached(*given, **more):
        raise AssertionError("mask code was reached")

    for name in ("__init__", "at", "visible"):
        monkeypatch.setattr(Mask, name, reached)
    for masker in (RandomMasker, BlockMasker):
        monkeypatch.setattr(masker, "__call__", reached)
    for weights, shape in ((tmp_path / "run", (2, 1, 28, 28)), (source / "run", (2, 3, 64, 64))):
        images = torch.randn(shape)
        encoder = load_encoder(str(weights))
        assert not encoder.training
        first = encoder(images)
        torch.manual_seed(99)
        again, anew = encoder(images), load_encoder(str(weights))(images)
        assert torch.equal(first.maps[-1], again.maps[-1]) and torch.equal(first.maps[-1], anew.maps[-1])
