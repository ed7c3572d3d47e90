"""A run shortened for a try: what lies after its end is told, and ignored by training and evaluation alike."""

import pytest
import torch

from tests.test_main import fill_folder, finetune, pretrain
from tests.test_plan import Loaded
from util.config import Data, Optim, Run
from util.plan import make_plan
from util.start import Batches, schedule
from util.times import Time, last_size

SIZES = [[0, 128], [100, 160], [300, 192]]


def told(optim, run, **stages):
    lines, length = [], Time(run.steps, "steps") if run.steps else Time(run.epochs)
    loader = Loaded(6400, **{"batch": 64, "per_device": None, "size": 32} | stages, length=length)
    schedule(optim, loader, run, lines.append)
    return lines[1:]  # the first is the arithmetic of the one stage


def test_stages_after_the_end_are_told():
    plan = make_plan(6400, [[0, 64], [300, 128]], None, SIZES, Time(100))
    assert [stage.size for stage in plan.stages] == [(128, 128)] and plan.stages[0].batch == 64
    lines = plan.describe(1.0, 1)
    assert len(lines) == 3 and lines[1].startswith("ignored   data.size would change at step 10,000 (epoch 100), but")
    assert (
        "data.batch and data.size would change at step 30,000 (epoch 300), but the run ends at step 10,000" in lines[2]
    )
    assert not any("ignored" in line for line in make_plan(6400, 64, None, SIZES, Time(301)).describe(1.0, 1))


class Found:
    """As much of a data set as batches ask for."""

    def __init__(self, images):
        self.train = self.val = self.pool = images


@pytest.mark.parametrize(
    ("run", "size", "last"),
    [
        ({"epochs": 1}, SIZES, 128),
        ({"epochs": 100}, SIZES, 128),
        ({"epochs": 101}, SIZES, 160),
        ({}, SIZES, 128),  # 100 epochs
        ({"epochs": 400}, SIZES, 192),
        ({"steps": 20}, [[0, 128], ["20 steps", 160]], 128),
        ({"steps": 21}, [[0, 128], ["20 steps", 160]], 160),
        ({"epochs": 2}, [[0, 128], ["4 steps", 160], ["9 steps", 192]], 160),
    ],
)
def test_evaluation_takes_the_size_that_the_run_ends_with(tmp_path, run, size, last):
    from util.data.images import open_images

    images = open_images(fill_folder(tmp_path / "images", "RGB", 16)).train.take(range(15))
    data = Data("", size=size, batch=5, workers=0, mean=[0.5] * 3, std=[0.5] * 3, crop=0.875)
    batches = Batches(data, Run(str(tmp_path), **run), Found(images), None, torch.device("cpu"), lambda line: None)
    assert next(iter(batches.once(images)))["image"].shape[-2:] == (last, last)
    counted = "epochs" in run and isinstance(size[1][0], str)
    assert last_size(data, Run("", **run)) == ((192, 192) if counted else (last, last))


def test_an_evaluation_that_follows_no_training_need_not_come_out_even(tmp_path, monkeypatch):
    from util import dist
    from util.data.images import open_images

    images = open_images(fill_folder(tmp_path / "images", "RGB", 16)).train
    monkeypatch.setattr(dist, "world", lambda: 3)
    data = Data("", size=8, batch=8, workers=0, mean=[0.5] * 3, std=[0.5] * 3, crop=0.875)
    batches = Batches(data, Run(str(tmp_path)), Found(images), None, torch.device("cpu"), lambda line: None)
    assert len(next(iter(batches.once(images)))["image"]) == 2


def test_a_shortened_run_of_both_mains(tmp_path, capsys):
    root, late = fill_folder(tmp_path / "images", "RGB", 20), ["--data.size", "[[0, 28], [40, 35]]"]
    pretrain(root, tmp_path / "run", *late, "--optim.warmup", "40", "--run.epochs", "1")
    said = capsys.readouterr().out
    assert "ignored   data.size would change at step 40 (epoch 40), but the run ends at step 1" in said
    assert "warning   optim.warmup is 40 epochs, the run 1: the rate ends at 0 of" in said
    finetune("finetune", tmp_path / "run", root, tmp_path / "tuned", *late)
    said = capsys.readouterr().out
    assert "ignored   data.size" in said and "at 28 x 28 px" in said


def test_a_rate_that_never_gets_there_is_told():
    lines = told(Optim(lr=1.0, warmup=40), Run("", epochs=1))
    assert lines == ["warning   optim.warmup is 40 epochs, the run 1: the rate ends at 0.00619 of 0.25"]
    assert "optim.warmup is 4 epochs, the run 4" in told(Optim(warmup=4), Run("", epochs=4))[0]
    assert "optim.warmup is 500 steps, the run 200" in told(Optim(warmup="500 steps"), Run("", steps=200))[0]
    assert "optim.warmup is 5 epochs, the run 3" in told(Optim(warmup="500 steps"), Run("", epochs=3))[0]
    (line,) = told(Optim(milestones=[1, 3, 5]), Run("", epochs=3))
    assert line == "warning   optim.milestones has 3, 5 epochs, the run 3: the rate does not fall there"
    assert (
        "optim.cosine_from is 3 epochs, the run 3: the rate never" in told(Optim(cosine_from=3), Run("", epochs=3))[0]
    )
    assert (
        told(Optim(warmup=2, cosine_from=0), Run("", epochs=3)) == told(Optim(milestones=[2]), Run("", epochs=3)) == []
    )
