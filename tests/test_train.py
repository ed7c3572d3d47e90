"""The loop: resuming to the bit, accumulation, non-finite steps, signals, several processes."""

import itertools
import json
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
import torch.multiprocessing as mp
from torch.distributed.elastic.utils.distributed import get_free_port
from torch.utils._python_dispatch import TorchDispatchMode

from models.encoders.build import build_encoder
from models.mim.recipes import mae
from models.transfer.recipes import finetune
from util import checkpoint, dist
from util.config import Run
from util.errors import UserError
from util.log import Log
from util.optim import Schedule, build_optimizer
from util.plan import make_plan
from util.times import Time
from util.train import train

STEPS = 10


class Images:
    """Micro-batches of noise that depend on their number alone; some are not numbers. An epoch is of 32 images."""

    waited = 0.0

    def __init__(self, batch=8, accumulate=2, bad=(), steps=STEPS, stages=None):
        constant = {"batch": batch, "per_device": batch // accumulate // dist.world(), "size": 16}
        self.plan = make_plan(32, **constant | (stages or {}), length=Time(steps, "steps"), world=dist.world())
        self.bad = bad

    def batches(self, start):
        for step in itertools.count(start):
            stage = self.plan.at(step)
            for micro in range(stage.accumulate):
                generator = torch.Generator().manual_seed((2 * step + micro) % 8)
                share = stage.per_device
                images = torch.randn(share * dist.world(), 1, *stage.size, generator=generator)
                images = images[dist.rank() * share :][:share]
                factor = float("nan") if step in self.bad else 1.0
                yield {"image": images * factor, "label": torch.arange(share) % 3, "figures": {"drawn": images.mean()}}


def tiny(task="mae"):
    torch.manual_seed(0)
    args = {"img_size": 16, "patch_size": 4, "depth": 2, "embed_dim": 16, "num_heads": 2, "drop_path_rate": 0.2}
    encoder = build_encoder("vit_tiny_patch16_224", 1, **args)
    if task == "mae":
        return mae(encoder, depth=1, width=16, heads=2)
    return finetune(encoder, 3, mixup=0.8, cutmix=1.0, ema=0.5)


def go(folder, loader=None, task="mae", evaluate=None, clip=1.0, **run):
    """A short run; gives its task."""
    folder.mkdir(exist_ok=True)
    model = tiny(task)
    settings = {"dtype": "float32", "log_every": 3, "save_every": 3, "evaluate_every": 0} | run
    optimizer = build_optimizer(model, no_decay=["fill"])
    log = Log(folder)
    schedule = Schedule(3e-3, STEPS, warmup=2)
    train(model, loader or Images(), optimizer, schedule, clip, Run(str(folder), **settings), log, evaluate)
    log.close()
    return model


def equal(a, b):
    return all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values()))


class Stop(Exception):
    pass


def stop_at(when):
    def evaluate(step):
        if step == when:
            raise Stop
        return {}

    return evaluate


def lines(folder, key):
    """The objects of log.jsonl that have a key."""
    objects = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return [o for o in objects if key in o]


@pytest.mark.parametrize("task", ["mae", "finetune"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_a_stopped_run_continues_to_the_bit(tmp_path, task, dtype):
    """Stopped in mid-epoch, seven steps in, one after its last checkpoint."""
    whole = go(tmp_path / "whole", task=task, dtype=dtype)
    with pytest.raises(Stop):
        go(tmp_path / "parts", task=task, dtype=dtype, evaluate=stop_at(7), evaluate_every=0.25)
    assert torch.load(tmp_path / "parts" / "last.pt", weights_only=True)["counts"]["step"] == 6
    assert equal(whole, go(tmp_path / "parts", task=task, dtype=dtype))
    assert not equal(whole, tiny(task))


@pytest.mark.parametrize("stop", [3, 4, 5, 6, 7])
def test_a_run_in_stages_continues_to_the_bit(tmp_path, stop):
    """Stopped before, at and after the borders of stages: 4 steps of 8 images, 2 of 4 larger ones, then of 2."""
    stages = {"batch": [(0, 8), (1, 4), (1.25, 2)], "per_device": [(0, 4), (1.25, 2)], "size": [(0, 16), (1, (16, 24))]}
    whole = go(tmp_path / "whole", Images(stages=stages))
    with pytest.raises(Stop):
        go(tmp_path / "parts", Images(stages=stages), evaluate=stop_at(stop), evaluate_every="1 steps", save_every=2)
    assert equal(whole, go(tmp_path / "parts", Images(stages=stages)))
    assert [one["epoch"] for one in lines(tmp_path / "whole", "loss")] == [0.25, 0.75, 1.25, 1.4375, 1.5]


def test_a_checkpoint_cut_short_gives_way_to_the_one_before(tmp_path):
    whole = go(tmp_path / "whole")
    with pytest.raises(Stop):
        go(tmp_path / "parts", evaluate=stop_at(7), evaluate_every=0.25)
    last = tmp_path / "parts" / "last.pt"
    last.write_bytes(last.read_bytes()[:1000])
    assert equal(whole, go(tmp_path / "parts"))
    said = " ".join(o["text"] for o in lines(tmp_path / "parts", "text"))
    assert "last.pt cannot be read" in said and "continuing at step 3 of 10" in said


def test_no_readable_checkpoint_is_no_fresh_start(tmp_path):
    go(tmp_path / "run")
    for name in (checkpoint.LAST, checkpoint.BEFORE):
        (tmp_path / "run" / name).write_bytes(b"cut")
    with pytest.raises(UserError, match="remove last.pt and before.pt"):
        go(tmp_path / "run")


def test_a_checkpoint_of_another_model_is_refused(tmp_path):
    go(tmp_path / "run")
    with pytest.raises(UserError, match="holds another model"):
        go(tmp_path / "run", task="finetune")


def test_accumulated_batches_make_the_step_of_a_whole_one(tmp_path):
    """Without anything random in the model: a classifier, neither mixed nor dropped."""

    def one(accumulate):
        torch.manual_seed(0)
        args = {"img_size": 16, "patch_size": 4, "depth": 1, "embed_dim": 16, "num_heads": 2}
        model = finetune(build_encoder("vit_tiny_patch16_224", 1, **args), 3)
        folder = tmp_path / str(accumulate)
        folder.mkdir()
        images = Images(8, accumulate, steps=1)
        images.batches = lambda start: iter(
            [{"image": x, "label": y} for x, y in zip(pixels.chunk(accumulate), labels.chunk(accumulate))]
        )
        run = Run(str(folder), dtype="float32", evaluate_every=0)
        train(model, images, build_optimizer(model, "sgd"), lambda step: 0.1, 0.0, run, Log(folder))
        return model

    pixels, labels = torch.randn(8, 1, 16, 16), torch.arange(8) % 3
    for a, b in zip(one(1).state_dict().values(), one(4).state_dict().values()):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("optimizer", ["adamw", "lamb", "lars", "sgd"])
def test_a_step_that_is_not_finite_changes_nothing(tmp_path, optimizer):
    from util.train import take_step

    model = tiny()
    optim = build_optimizer(model, optimizer)
    for group in optim.param_groups:
        group["lr"] = 0.1
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter) if parameter.requires_grad else None
    take_step(optim, scaler, torch.tensor(True))
    before = [p.clone() for p in model.parameters()]
    moments = [m.clone() for m in state_of(optim)]
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.grad = torch.full_like(parameter, float("nan"))
    take_step(optim, scaler, torch.tensor(False))
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters()))
    assert moments and all(torch.equal(a, b) for a, b in zip(moments, state_of(optim)))
    assert not torch.equal(before[-1], list(tiny().parameters())[-1])


def state_of(optimizer):
    return [value for state in optimizer.state.values() for value in state.values() if value is not None]


def test_skipped_steps_are_counted_and_the_run_goes_on(tmp_path):
    model = go(tmp_path / "run", Images(bad=(2, 5)))
    assert all(p.isfinite().all() for p in model.parameters())
    assert lines(tmp_path / "run", "skipped")[-1]["skipped"] == 2


def test_a_streak_goes_back_to_the_checkpoint_and_then_gives_up(tmp_path, monkeypatch):
    monkeypatch.setattr("util.train.STREAK", 2)
    with pytest.raises(UserError, match="after 3 returns.*lower optim.lr"):
        go(tmp_path / "run", Images(bad=range(6, 100)), save_every=2)
    texts = [o["text"] for o in lines(tmp_path / "run", "text")]
    assert sum("back to the checkpoint of step" in text for text in texts) == 3


def test_a_streak_before_any_checkpoint_says_so(tmp_path, monkeypatch):
    monkeypatch.setattr("util.train.STREAK", 2)
    with pytest.raises(UserError, match="before the first checkpoint"):
        go(tmp_path / "run", Images(bad=range(100)), save_every=100)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_saves_and_leaves(tmp_path, number):
    whole = go(tmp_path / "whole")
    before = signal.getsignal(number)

    class Interrupting(Images):
        def batches(self, start):
            for i, batch in enumerate(super().batches(start)):
                if i == 9 and start == 0:
                    threading.Timer(0, os.kill, (os.getpid(), number)).run()
                yield batch

    with pytest.raises(SystemExit) as left:
        go(tmp_path / "parts", Interrupting(), save_every=100)
    assert left.value.code == 128 + number
    assert signal.getsignal(number) is before
    assert equal(whole, go(tmp_path / "parts", save_every=100))


class Waits(TorchDispatchMode):
    """Counts what would make the host wait for a device: reading a number off a tensor."""

    count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += function in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default)
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("task", ["mae", "finetune"])
def test_no_step_waits_for_the_device(tmp_path, task):
    """Three times the steps between two lines of the log read no more numbers."""
    counts = []
    for steps in (4, 12):
        with Waits() as waits:
            go(tmp_path / str(steps), Images(steps=steps), task=task, log_every=100, save_every=100)
        counts.append(waits.count)
    assert counts[0] == counts[1] > 0


def test_evaluations_come_when_they_are_due(tmp_path):
    seen = []
    go(tmp_path / "run", evaluate=lambda step: seen.append(step) or {}, evaluate_every=0.75)
    assert seen == [3, 6, 9, 10]


def process(rank, world, folder, port):
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(world), "LOCAL_RANK": str(rank)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    dist.init("cpu")
    stages = {"batch": [(0, 8), (1, 4)], "per_device": 2}  # two passes a step, then one
    model = go(Path(folder), Images(stages=stages), clip=0.0)
    torch.save(model.state_dict(), f"{folder}/weights_{rank}.pt")
    dist.shutdown()


def test_two_processes_stay_equal_and_resume(tmp_path):
    mp.spawn(process, (2, str(tmp_path / "run"), get_free_port()), nprocs=2)
    a, b = (torch.load(tmp_path / "run" / f"weights_{rank}.pt") for rank in (0, 1))
    assert all(torch.equal(a[key], b[key]) for key in a)
    start = tiny().state_dict()
    assert any(not torch.equal(a[key], start[key]) for key in a)
    assert len(lines(tmp_path / "run", "loss")) == 5  # one process writes: steps 1, 3, 6, 9 and 10


def test_a_missing_process_is_told_at_once():
    code = (
        "import os, sys\nfrom util import dist\nfrom util.errors import command\ncommand(lambda: dist.init('cpu', 3))"
    )
    environment = {**os.environ, "RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}
    environment["MASTER_PORT"] = str(get_free_port())
    found = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=60)
    assert found.returncode == 2 and "rank 0 of 2 did not meet the others within 3 s" in found.stderr
