"""A run whose size, batch and accumulation change on the way, on weighted roots: said, logged, and resumed anywhere."""

import json

import pytest
import torch
from safetensors.torch import load_file

import main_pretrain
from tests.test_main import PRETRAIN, SMALL, fill_folder
from util import checkpoint
from util.errors import UserError

# of 40 + 20 images 59 are trained on: 3 steps of 16, then 7 of 8 an epoch, then 14 of 4
STAGES = ["--data.size", "[[0, 28], [1, 42]]", "--data.batch", "[[0, 16], [1, 8], [2, 4]]"]
STAGES += ["--run.per_device", "[[0, 8], [2, 4]]", "--data.weights", "[1, 2]", "--run.epochs", "2.5"]


@pytest.fixture(scope="module")
def roots(tmp_path_factory):
    folder = tmp_path_factory.mktemp("roots")
    return "[" + ", ".join(fill_folder(folder / name, "RGB", count) for name, count in (("a", 40), ("b", 20))) + "]"


def go(roots, folder, *more):
    argv = [*PRETRAIN, *SMALL, "--data.root", roots, "--run.folder", str(folder), "--run.evaluate_every", "0"]
    main_pretrain.main([*argv, "--run.log_every", "1", *STAGES, *more])
    return load_file(folder / "encoder.safetensors")


@pytest.fixture(scope="module")
def whole(roots, tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole") / "run"
    return folder, go(roots, folder)


def test_every_stage_and_source_is_said_and_logged(whole):
    lines = [json.loads(line) for line in (whole[0] / "log.jsonl").read_text().splitlines()]
    said = [line["text"] for line in lines if "text" in line]
    steps = [text for text in said if text.startswith("steps ")]
    assert "3 of 16 images = 1 processes x 8 x 2 accumulated at 28 x 28 px, from step 0 (epoch 0) on; 3 an" in steps[0]
    assert "7 of 8 images = 1 processes x 8 x 1 accumulated at 42 x 42 px, from step 3 (epoch 1) on; 7 an" in steps[1]
    assert "7 of 4 images = 1 processes x 4 x 1 accumulated" in steps[2] and "lr 0.003 x 4 / 256 = 4.69e-05" in steps[2]
    assert any("17 in all, 2.5 epochs" in text for text in said)
    sources = [text for text in said if text.startswith("source ")]
    assert "33.3 % of what is drawn" in sources[0] and "66.7 %" in sources[1] and sources[1].startswith("source 2")
    logged = [line for line in lines if "drawn/1" in line]
    assert len(logged) == 17 and all(line["drawn/1"] + line["drawn/2"] == pytest.approx(1) for line in logged)
    drawn = sum(line["drawn/1"] * batch for line, batch in zip(logged, [16] * 3 + [8] * 7))
    assert drawn / 104 == pytest.approx(1 / 3, abs=0.05)
    assert [round(line["epoch"], 3) for line in logged][2:4] == [1.0, 1.143] and logged[-1]["epoch"] == 2.5


@pytest.mark.parametrize("stop", [2, 3, 4, 10, 11])
def test_stopped_around_a_border_it_ends_the_same(roots, whole, tmp_path, monkeypatch, stop):
    save = checkpoint.save

    def saved(folder, task, optimizer, scaler, counts):
        save(folder, task, optimizer, scaler, counts)
        if counts["step"] == stop:
            raise KeyboardInterrupt

    monkeypatch.setattr(checkpoint, "save", saved)
    with pytest.raises(KeyboardInterrupt):
        go(roots, tmp_path / "run", "--run.save_every", "1")
    monkeypatch.undo()
    parts = go(roots, tmp_path / "run", "--run.save_every", "1")
    assert f"continuing at step {stop} of 17" in (tmp_path / "run" / "log.jsonl").read_text()
    assert all(torch.equal(whole[1][key], parts[key]) for key in parts)


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        (["--run.per_device", "[[0, 8], [2, 3]]"], "from epoch 2 on, data.batch 4 is not a multiple of 3"),
        (["--data.weights", "[1]"], "data.weights has 1 numbers, data.root 2 roots"),
        (["--data.weights", "[1, -1]"], "each has to be above 0"),
        (["--run.steps", "9"], "run.epochs 2.5 and run.steps 9 are both given"),
        (["--run.epochs", "null", "--run.steps", "9", "--optim.warmup", "0"], "data.size has epoch 1 in it"),
        (["--data.size", "[[1, 28]]"], "data.size [(1.0, 28)] has to go from epoch 0 on"),
        (["--data.batch", "[[0, 16], [soon, 8]]"], "data.batch is soon"),
    ],
)
def test_what_is_wrong_with_them_is_said(roots, tmp_path, wrong, said):
    with pytest.raises(UserError) as error:
        go(roots, tmp_path / "run", *wrong)
    assert said in str(error.value) and "\n" not in str(error.value)
