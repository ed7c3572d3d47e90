"""The grid of fractions and models: every cell is the run that the mains would make, is done once, and is drawn."""

import json

import numpy as np
import pytest
from PIL import Image

import main_pretrain
from benchmarks import data_scaling
from tests.test_main import ROOT, SMALL, write_idx
from util.errors import UserError

CONFIG = str(ROOT / "configs/quickstart/pretrain.yaml")
TRANSFERS = [
    f"{ROOT}/configs/quickstart/knn.yaml --task.args.k 3",
    f"{ROOT}/configs/quickstart/linear.yaml --run.epochs 1 --data.batch 8",
]
PRETRAIN = [*SMALL, "--data.batch", "8", "--run.epochs", "null", "--run.steps", "2", "--optim.warmup", "1 steps"]


@pytest.fixture
def grid(tmp_path):
    root = write_idx(tmp_path / "idx", 16, 16)
    models = ["small=", "large=--encoder.args.embed_dim 32"]
    argv = ["--config", CONFIG, "--folder", str(tmp_path / "grid"), "--root", root, "--fractions", "1", "0.5"]
    return [*argv, "--models", *models, "--transfers", *TRANSFERS, *PRETRAIN], root, tmp_path / "grid"


def test_a_grid_is_run_drawn_and_continued(grid, tmp_path, monkeypatch):
    argv, root, folder = grid
    data_scaling.main(argv)
    rows = json.loads((folder / "scaling.json").read_text())
    assert [(row["model"], row["fraction"]) for row in rows] == [
        ("small", 0.5),
        ("small", 1.0),
        ("large", 0.5),
        ("large", 1.0),
    ]
    assert all(row["top1"].keys() == {"knn", "linear"} and row["heldout"] > 0 for row in rows)
    assert len({row["heldout"] for row in rows}) == 4
    picture = np.asarray(Image.open(folder / "scaling.png").convert("RGB"))
    assert picture.shape[0] > 400 and len(np.unique(picture.reshape(-1, 3), axis=0)) > 20

    alone = ["--config", CONFIG, *PRETRAIN, "--data.root", root, "--data.fraction", "0.5"]
    main_pretrain.main([*alone, "--run.folder", str(tmp_path / "alone")])
    assert json.loads((tmp_path / "alone/report.json").read_text())["heldout"] == rows[0]["heldout"]

    done = []
    pretrain = data_scaling.pretrain
    monkeypatch.setattr(data_scaling, "pretrain", lambda *run: done.append(run[0].run.folder) or pretrain(*run))
    (folder / "large/0.5/pretrain/report.json").unlink()
    before = (folder / "scaling.json").read_text()
    data_scaling.main(argv)
    assert done == [f"{folder}/large/0.5/pretrain"] and (folder / "scaling.json").read_text() == before
    with pytest.raises(UserError, match=r"holds another run: optim.lr \(0.003 there, 0.1 here\)"):
        data_scaling.main([*argv, "--optim.lr", "0.1"])


def test_what_is_wrong_is_said_before_the_first_run(grid, monkeypatch):
    argv, _, folder = grid
    for wrong, said in (
        (["--optim.lrr", "1"], "there is no option optim.lrr"),
        (["--models", "small"], 'has to be a name, "=" and options'),
        (["--transfers", TRANSFERS[0], TRANSFERS[0]], "two of the name knn"),
    ):
        with pytest.raises(UserError, match=said):
            data_scaling.main([*argv, *wrong])
    assert not folder.exists()
