"""Both mains as a user meets them: any images, wrong options, interruptions, several processes."""

import gzip
import json
import os
import signal
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tifffile
import torch
from PIL import Image
from safetensors.torch import load_file
from torch.distributed.elastic.utils.distributed import get_free_port

import main_finetune
import main_pretrain
from util.errors import UserError
from util.summary import summarize

ROOT = Path(__file__).parent.parent
PRETRAIN = ["--config", str(ROOT / "configs/quickstart/pretrain.yaml"), "--data.batch", "16", "--run.epochs", "2"]
SMALL = ["--encoder.args", "{patch_size: 7, embed_dim: 16, depth: 1, num_heads: 2, position: sincos}"]
SMALL += ["--method.args", "{ratio: 0.6, target: normalized, depth: 1, width: 16, heads: 2}"]
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}


def draw(rng, mode, side=64):
    shape = (side, side, len(mode)) if len(mode) > 1 else (side, side)
    return rng.integers(0, 256, shape, dtype=np.uint8)


def fill_folder(folder, kind, count=40):
    rng = np.random.default_rng(0)
    for i in range(count):
        place = folder / "ab"[i % 2] / "deeper"
        place.mkdir(parents=True, exist_ok=True)
        if kind == "tiff":
            tifffile.imwrite(place / f"{i}.tif", rng.integers(0, 65536, (50, 70), dtype=np.uint16))
        else:
            Image.fromarray(draw(rng, kind)).save(place / f"{i}.png")
    return str(folder)


def pretrain(root, folder, *more):
    main_pretrain.main([*PRETRAIN, *SMALL, "--data.root", root, "--run.folder", str(folder), *more])
    return json.loads((Path(folder) / "report.json").read_text())


def finetune(task, weights, root, folder, *more):
    argv = ["--config", str(ROOT / f"configs/quickstart/{task}.yaml"), "--weights", str(weights), "--data.root", root]
    argv += ["--encoder.args", SMALL[1], "--data.batch", "16", "--run.folder", str(folder), "--data.labels", "null"]
    main_finetune.main([*argv, "--run.epochs", "2", *more])
    return json.loads((Path(folder) / "report.json").read_text())


@pytest.mark.parametrize(("kind", "channels"), [("RGBA", 3), ("tiff", 1), ("L", 1)])
def test_the_same_config_takes_any_images(tmp_path, capsys, kind, channels):
    """Colour with transparency, 16-bit grey, 8-bit grey: nothing changes but data.root."""
    root = fill_folder(tmp_path / "images", kind)
    figures = pretrain(root, tmp_path / "run")
    said = capsys.readouterr().out
    assert {"heldout", "mean_fill", "bilinear_fill", "rank", "spread"} <= figures.keys()
    assert f"{channels} channel" in said and "39 to train on, 1 to validate" in said
    assert "images/s" in said and "left" in said and "held-out" in said
    run = tmp_path / "run"
    assert {p.name for p in run.iterdir()} >= {"config.yaml", "log.jsonl", "tensorboard", "last.pt", "reconstructions"}
    assert list((run / "reconstructions").glob("*.png"))
    for task in ("knn", "linear", "finetune"):
        assert 0 <= finetune(task, run, root, tmp_path / task)["top1"] <= 1
        assert 0 <= finetune(task, "none", root, tmp_path / f"{task}_none")["top1"] <= 1


def test_images_without_labels_are_enough(tmp_path, capsys):
    root = Path(fill_folder(tmp_path / "images", "RGB"))
    for i, path in enumerate(root.rglob("*.png")):
        path.rename(root / f"{i}.png")
    assert "knn" not in pretrain(str(root), tmp_path / "run")


def test_unreadable_images_are_replaced_and_named(tmp_path):
    root = Path(fill_folder(tmp_path / "images", "RGB"))
    broken = root / "a" / "deeper" / "0.png"
    broken.write_bytes(broken.read_bytes()[:100])
    pretrain(str(root), tmp_path / "run")
    assert (tmp_path / "run" / "bad_images.txt").read_text().splitlines() == [str(broken)]
    with pytest.raises(UserError, match="max_bad"):
        pretrain(str(root), tmp_path / "strict", "--data.max_bad", "0")


WRONG = [
    (["--optim.lrr", "1"], "there is no option optim.lrr; the nearest is optim.lr"),
    (["--optim.lr", "fast"], "optim.lr is fast, but has to be float"),
    (["--method.name", "maee"], 'no method is called "maee"; the nearest is "mae"'),
    (["--method.args", "{rato: 0.5}"], "there is no option rato; the nearest is ratio"),
    (["--method.args", "{ratio: 1.0}"], "method mae: ratio is 1.0: it has to lie between 0 and 1"),
    (["--method.args", "{ratio: 0.99}"], "ratio 0.99 hides 16 of 16 cells of 7 px"),
    (["--encoder.name", "vit_base_patch16_244"], "the nearest are vit_base_patch16_224"),
    (["--encoder.args", "{dpth: 3}"], 'has no argument "dpth"; the nearest is "depth"'),
    (["--encoder.args", "{patch_size: 0}"], "encoder: "),
    (["--method.args", "{depth: 1, width: 16, heads: 0}"], "heads is 0: it has to be at least 1"),
    (["--method.args", "{unit: 14, cell: 4}"], "the target's 4 px: the target's must divide the others; 1 px would"),
    (
        ["--method.name", "vqkd", "--method.args", "{target: pixels, vocabulary: 0}"],
        "vocabulary is 0: it has to be at least 1",
    ),
    (["--method.args", "{target: hgo}"], "clip:FILE, timm:NAME and run:FOLDER"),
    (["--data.size", "30"], "28 or 35"),
    (["--data.root", "/no/such/folder"], "/no/such/folder"),
    (["--data.batch", "16", "--run.per_device", "5"], "15 or 20"),
    (["--run.dtype", "float8"], "bfloat16, float16 or float32"),
    (["--method.name", "mae", "--encoder.name", "swin_tiny_patch4_window7_224", "--encoder.args", "{}"], "simmim"),
]


@pytest.mark.parametrize(("wrong", "said"), WRONG, ids=lambda x: x if isinstance(x, str) else None)
def test_what_is_wrong_is_said(tmp_path, wrong, said):
    root = fill_folder(tmp_path / "images", "RGB", 4)
    with pytest.raises(UserError) as error:
        pretrain(root, tmp_path / "run", *wrong)
    assert said in str(error.value) and "\n" not in str(error.value)


def test_errors_are_one_line_and_exit_with_2(tmp_path):
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "scan.dcm").write_bytes(b"")
    argv = [sys.executable, ROOT / "main_pretrain.py", *PRETRAIN, "--data.root", tmp_path / "images"]
    found = subprocess.run(argv, cwd=tmp_path, env=ENVIRONMENT, capture_output=True, text=True)
    assert found.returncode == 2
    assert len(found.stderr.splitlines()) == 1 and "1 .dcm" in found.stderr


def test_a_folder_of_another_run_is_refused(tmp_path):
    root = fill_folder(tmp_path / "images", "RGB", 20)
    pretrain(root, tmp_path / "run")
    kept = (tmp_path / "run" / "config.yaml").read_text()
    with pytest.raises(UserError, match=r"optim.lr \(0.0\d+ there, 0.5 here\)"):
        pretrain(root, tmp_path / "run", "--optim.lr", "0.5")
    assert (tmp_path / "run" / "config.yaml").read_text() == kept
    pretrain(root, tmp_path / "run", "--data.workers", "1")  # what changes no result is free


def test_weights_that_do_not_fit_are_refused(tmp_path):
    root = fill_folder(tmp_path / "images", "RGB", 20)
    pretrain(root, tmp_path / "run")
    with pytest.raises(UserError, match=r"\d+/\d+ tensors"):
        finetune("knn", tmp_path / "run", root, tmp_path / "knn", "--changes", "{depth: 3}")
    with pytest.raises(UserError, match="no weights at"):
        finetune("knn", tmp_path / "nothing.safetensors", root, tmp_path / "knn2")


def test_killed_and_started_again_a_run_ends_the_same(tmp_path):
    """kill -9 in mid-epoch, with loader processes, twice."""
    root = fill_folder(tmp_path / "images", "RGB", 60)

    def argv(folder):
        more = ["--data.root", root, "--run.folder", str(tmp_path / folder), "--data.workers", "1", "--run.save_every"]
        more += ["2", "--run.epochs", "8", "--run.evaluate_every", "0"]
        return [sys.executable, ROOT / "main_pretrain.py", *PRETRAIN, *SMALL, *more]

    subprocess.run(argv("whole"), env=ENVIRONMENT, check=True, capture_output=True)
    kills = 0
    for _ in range(2):
        child = subprocess.Popen(argv("parts"), env=ENVIRONMENT, stdout=subprocess.PIPE, text=True)
        for line in child.stdout:
            if (tmp_path / "parts" / "last.pt").exists() and "step " in line:
                child.kill()
                kills += 1
                break
        child.wait()
        child.stdout.close()
    assert kills == 2
    assert not (tmp_path / "parts" / "report.json").exists()
    subprocess.run(argv("parts"), env=ENVIRONMENT, check=True, capture_output=True)
    whole, parts = (load_file(tmp_path / name / "encoder.safetensors") for name in ("whole", "parts"))
    assert all(torch.equal(whole[key], parts[key]) for key in whole)


def test_interrupted_in_the_shell_it_saves(tmp_path):
    root = fill_folder(tmp_path / "images", "RGB", 60)
    more = ["--data.root", root, "--run.folder", str(tmp_path / "run"), "--data.workers", "1", "--run.epochs", "500"]
    argv = [sys.executable, ROOT / "main_pretrain.py", *PRETRAIN, *SMALL, *more]
    child = subprocess.Popen(argv, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    for line in child.stdout:
        if line.startswith("step "):
            child.send_signal(signal.SIGINT)
            break
    out, err = child.communicate(timeout=60)
    assert child.returncode == 128 + signal.SIGINT and "Traceback" not in err
    assert "the same command continues" in out and (tmp_path / "run" / "last.pt").exists()


def test_torchrun(tmp_path):
    """Two processes on the quickstart's own config, as in the README."""
    root = write_idx(tmp_path / "fashion")
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2"]
    launcher += ["--master_port", str(get_free_port())]
    more = ["--data.root", root, "--run.folder", str(tmp_path / "run"), "--run.probe", "64", "--data.batch", "32"]
    argv = [*launcher, ROOT / "main_pretrain.py", *PRETRAIN[:2], *more, "--run.epochs", "0.5"]
    found = subprocess.run(argv, env=ENVIRONMENT, capture_output=True, text=True)
    assert found.returncode == 0, found.stderr[-2000:]
    assert "2 processes x 16 x 1 accumulated" in found.stdout
    assert found.stdout.count("step 1/") == 1
    assert "knn" in json.loads((tmp_path / "run" / "report.json").read_text())


def write_idx(folder, train=256, test=96):
    """A data set in Fashion-MNIST's own files, of noise."""
    folder.mkdir()
    rng = np.random.default_rng(0)
    for split, count in (("train", train), ("t10k", test)):
        images, labels = rng.integers(0, 256, (count, 28, 28), dtype=np.uint8), np.arange(count, dtype=np.uint8) % 10
        for name, magic, array in (("images-idx3", 3, images), ("labels-idx1", 1, labels)):
            header = struct.pack(">BBBB", 0, 0, 8, magic) + struct.pack(f">{magic}i", *array.shape)
            (folder / f"{split}-{name}-ubyte.gz").write_bytes(gzip.compress(header + array.tobytes(), 1))
    return f"fashion_mnist:{folder}"


def test_help_waits_for_no_heavy_import():
    code = "import sys; sys.argv = ['main_pretrain.py', '--help']\nimport main_pretrain\n"
    code += "try: main_pretrain.main()\nexcept SystemExit: pass\nassert 'torch' not in sys.modules"
    found = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert found.returncode == 0, found.stderr
    assert "per 256 images" in found.stdout


def test_the_summary_has_the_figures_of_all_runs(tmp_path):
    for i, (task, weights) in enumerate(
        [(t, w) for t in ("knn", "linear", "finetune") for w in ("scratch", "pretrained")]
    ):
        (tmp_path / task / weights).mkdir(parents=True)
        (tmp_path / task / weights / "report.json").write_text(json.dumps({"top1": i / 10}))
    table = summarize(tmp_path)
    assert json.loads((tmp_path / "report.json").read_text()) == {
        "knn.random": 0.0,
        "knn.pretrained": 0.1,
        "linear.random": 0.2,
        "linear.pretrained": 0.3,
        "finetune_1000.scratch": 0.4,
        "finetune_1000.pretrained": 0.5,
    }
    assert "0.4000      0.5000  +0.1000" in table


def test_one_folder_is_written_by_one_run(tmp_path):
    root = fill_folder(tmp_path / "images", "RGB", 20)
    more = ["--data.root", root, "--run.folder", str(tmp_path / "run"), "--run.epochs", "500"]
    argv = [sys.executable, ROOT / "main_pretrain.py", *PRETRAIN, *SMALL, *more]
    first = subprocess.Popen(argv, env=ENVIRONMENT, stdout=subprocess.PIPE, text=True)
    assert any("step " in line for line in first.stdout)
    second = subprocess.run(argv, env=ENVIRONMENT, capture_output=True, text=True)
    first.kill()
    first.communicate()
    assert second.returncode == 2 and "another run is writing" in second.stderr
