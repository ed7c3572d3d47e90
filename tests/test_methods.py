"""What every method promises: it learns, in one process or several, compiled or not, and goes on after a stop."""

import json
import math
import os

import pytest
import torch
import torch.multiprocessing as mp
from torch.distributed.elastic.utils.distributed import get_free_port
from torch.nn.parallel import DistributedDataParallel

from models.mim.method import MIM
from models.mim.recipes import METHODS
from models.monitor.picture import reconstruct
from tests.methods import BUILT, built, rough_images, targets
from util import dist
from util.config import Run
from util.log import Log
from util.optim import build_optimizer
from util.plan import make_plan
from util.times import Time
from util.train import train

every_method = pytest.mark.parametrize("name", METHODS)


def test_every_method_is_here():
    assert BUILT.keys() == METHODS.keys()


@pytest.mark.parametrize(("name", "args"), [(name, args) for name in METHODS for args in targets(name)])
def test_it_learns_sixteen_images(name, args):
    mim, images = built(name, **args), rough_images()
    optimizer = torch.optim.AdamW(mim.parameters(), lr=5e-3)
    losses = []
    for _ in range(20):
        torch.manual_seed(1)  # the same masks
        optimizer.zero_grad()
        loss = mim({"image": images})["loss"]
        loss.backward()
        assert not losses or all(p.grad is not None for p in mim.parameters() if p.requires_grad)
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.9 * losses[0] and math.isfinite(losses[-1])


@every_method
@pytest.mark.parametrize("shape", [(1, 64, 64), (5, 64, 96)])
def test_it_takes_other_images(name, shape):
    assert built(name, shape[0])({"image": torch.randn(2, *shape)})["loss"].isfinite()


@every_method
def test_what_it_guesses_can_be_seen(name):
    mim, images = built(name), rough_images(2)
    pictures = reconstruct(mim, images, (0.5,) * 3, (0.25,) * 3)
    if not isinstance(mim, MIM):  # VQ-KD hides nothing
        assert pictures is None
        return
    columns = pictures.columns
    assert {"masked input", "prediction", "prediction + visible", "original"} <= columns.keys() and pictures.caption
    sides = {column.shape[-1] for column in columns.values()}
    assert all(max(sides) % side == 0 for side in sides) and columns["masked input"].isnan().any()
    assert all(column.isfinite().all() for title, column in columns.items() if title != "masked input")


# in processes of their own, where no type checker stands between the parts


def trace(_process, names):
    torch.set_num_threads(1)
    for name in names:
        torch._dynamo.reset()
        mim, batch = built(name), {"image": torch.randn(2, 3, 64, 64)}
        whole = torch.compile(mim, backend="eager", fullgraph=True)
        torch.manual_seed(0)
        expected = mim(batch)["loss"]
        torch.manual_seed(0)
        loss = whole(batch)["loss"]
        loss.backward()
        torch.testing.assert_close(loss, expected)


@pytest.mark.parametrize("third", range(3))
def test_it_traces_as_one_graph(third):
    mp.spawn(trace, (list(METHODS)[third::3],), nprocs=1)


def step_together(rank, port, folder):
    """Two steps of each method in two processes; DistributedDataParallel refuses parameters without gradient."""
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_RANK": str(rank)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    dist.init("cpu")
    weights = {}
    for name in METHODS:
        mim, images = built(name), rough_images(8)[4 * rank :][:4]
        together, optimizer = DistributedDataParallel(mim), torch.optim.SGD(mim.parameters(), lr=1e-2)
        for step in range(2):
            torch.manual_seed(10 * step + rank)
            optimizer.zero_grad()
            together({"image": images})["loss"].backward()
            optimizer.step()
        weights[name] = torch.cat([p.detach().flatten() for p in mim.parameters()])
    torch.save(weights, f"{folder}/{rank}.pt")
    dist.shutdown()


def test_two_processes_step_together(tmp_path):
    mp.spawn(step_together, (get_free_port(), str(tmp_path)), nprocs=2)
    one, two = (torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1))
    assert one.keys() == METHODS.keys()
    for name in METHODS:
        assert torch.equal(one[name], two[name]), name
        start = torch.cat([p.detach().flatten() for p in built(name).parameters()])
        assert not torch.equal(one[name], start), name


# the loop


class Images:
    """Four images a step, in two passes."""

    waited = 0.0

    def __init__(self):
        self.plan = make_plan(16, 4, 2, 64, Time(4, "steps"))
        self.images = rough_images()

    def batches(self, start):
        number = 2 * start
        while True:
            yield {"image": self.images[2 * (number % 8) :][:2]}
            number += 1


class Stop(Exception):
    pass


def run(name, folder, stop=None):
    """Four steps of a method, or as many as until it is stopped; gives its state."""

    def evaluate(step):
        if step == stop:
            raise Stop
        return {}

    folder.mkdir(exist_ok=True)
    task, log = built(name), Log(folder)
    settings = Run(str(folder), steps=4, dtype="bfloat16", log_every=2, save_every=2, evaluate_every="3 steps")
    train(task, Images(), build_optimizer(task), lambda step: 1e-3, 1.0, settings, log, evaluate)
    log.close()
    return task.state_dict()


@every_method
def test_a_stopped_run_continues_to_the_bit(name, tmp_path):
    """Stopped one step after its checkpoint."""
    whole = run(name, tmp_path / "whole")
    with pytest.raises(Stop):
        run(name, tmp_path / "parts", stop=3)
    parts = run(name, tmp_path / "parts")
    assert all(torch.equal(whole[key], parts[key]) for key in whole)
    assert any(not torch.equal(whole[key], value) for key, value in built(name).state_dict().items())
    saved = torch.load(tmp_path / "whole/last.pt", weights_only=True)["task"]
    assert not any(key.startswith("target.") for key in saved)  # what is frozen stays out
    losses = [json.loads(line) for line in (tmp_path / "whole/log.jsonl").read_text().splitlines()]
    assert any(math.isfinite(line.get("loss", math.nan)) for line in losses)
