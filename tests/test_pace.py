"""An encoder that stays as it is while the rest learns to read it, and then learns more slowly."""

import os

import pytest
import torch
import torch.multiprocessing as mp
from torch.distributed.elastic.utils.distributed import get_free_port

from tests.methods import built
from tests.test_train import STEPS, Images, Stop, equal, stop_at, tiny
from util import dist
from util.checks import check
from util.config import Optim, Run
from util.errors import UserError
from util.log import Log
from util.optim import Pace, Schedule, build_optimizer, parameter_groups
from util.plan import make_plan
from util.start import encoder_pace
from util.times import Time
from util.train import set_rates, train

FROZEN = 4


class Large(Images):
    """The same noise, in images that a pyramid can halve five times."""

    def __init__(self, **more):
        super().__init__(**more)
        stage = self.plan.stages[0]
        self.plan.stages = [type(stage)(**vars(stage) | {"size": (64, 64)})]


def go(folder, model=None, pace=Pace(FROZEN, 0.1), evaluate=None, optimizer="adamw", loader=None, **run):  # noqa: B008
    """A short run at a constant weight decay; gives its task."""
    folder.mkdir(exist_ok=True)
    model = model or tiny()
    settings = {"dtype": "float32", "save_every": 2, "evaluate_every": "1 steps"} | run
    optimizer = build_optimizer(model, optimizer, weight_decay=0.1, pace=pace)
    train(model, loader or Images(), optimizer, Schedule(3e-3, STEPS, warmup=2), 1.0, Run(str(folder), **settings),
          Log(folder), evaluate, Schedule(0.1, STEPS, min_lr=0.2))  # fmt: skip
    return model


def watched(model):
    """The encoder's state and the rest's after each step, and what to call to write them down."""
    seen = []

    def evaluate(step):
        state = {key: value.clone() for key, value in model.state_dict().items()}
        inner = {key for key in state if key.startswith("hide.encoder.")}
        seen.append(({k: state[k] for k in inner}, {k: v for k, v in state.items() if k not in inner}))
        return {}

    return seen, evaluate


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


@pytest.mark.parametrize("optimizer", ["adamw", "lamb", "lars", "sgd"])
def test_the_encoder_stays_to_the_bit_while_it_is_frozen(tmp_path, optimizer):
    model = tiny()
    seen, evaluate = watched(model)
    evaluate(0)
    go(tmp_path / "run", model, evaluate=evaluate, optimizer=optimizer)
    for step in range(STEPS):
        (before, rest_before), (after, rest_after) = seen[step], seen[step + 1]
        assert same(before, after) == (step < FROZEN), step
        assert same(rest_before, rest_after) == (step == 0), step  # the warm-up begins at a rate of 0


def test_statistics_of_batch_norms_stay_too(tmp_path):
    model = built("spark", 1)
    seen, evaluate = watched(model)
    evaluate(0)
    go(tmp_path / "run", model, evaluate=evaluate, loader=Large(steps=FROZEN + 1), optimizer="lamb")
    assert any(key.endswith("running_var") for key in seen[0][0])
    assert all(same(seen[0][0], seen[step][0]) for step in range(FROZEN + 1))
    moved = {key.rpartition(".")[2] for key in seen[0][0] if not torch.equal(seen[0][0][key], seen[-1][0][key])}
    assert moved == {"weight", "bias", "running_mean", "running_var", "num_batches_tracked"}


@pytest.mark.parametrize("stop", [2, 4, 5, 7])
def test_a_stopped_run_continues_to_the_bit(tmp_path, stop):
    """Stopped before, at and after the end of the freeze; what the checkpoint says of the pace wins."""
    whole = go(tmp_path / "whole", evaluate_every=0)
    with pytest.raises(Stop):
        go(tmp_path / "parts", evaluate=stop_at(stop))
    assert equal(whole, go(tmp_path / "parts", pace=Pace(), evaluate_every=0))
    assert not equal(whole, go(tmp_path / "free", pace=Pace(), evaluate_every=0))


def process(rank, world, folder, port):
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(world), "LOCAL_RANK": str(rank)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    dist.init("cpu")
    for steps in (FROZEN, STEPS):  # the second run goes on with the first
        model = go(folder / "run", loader=Images(steps=steps), evaluate_every=0)
        torch.save(model.state_dict(), folder / f"{steps}_{rank}.pt")
        torch.distributed.barrier()  # one process writes the checkpoint from which both go on
    dist.shutdown()


def test_two_processes_stay_equal(tmp_path):
    mp.spawn(process, (2, tmp_path, get_free_port()), nprocs=2)
    held, end = ([torch.load(tmp_path / f"{steps}_{rank}.pt") for rank in (0, 1)] for steps in (FROZEN, STEPS))
    assert same(*held) and same(*end)
    start = tiny().state_dict()
    moved = {key.startswith("hide.encoder.") for key in start if not torch.equal(start[key], held[0][key])}
    assert moved == {False}
    moved = {key.startswith("hide.encoder.") for key in start if not torch.equal(start[key], end[0][key])}
    assert moved == {False, True}


def test_rates_of_the_groups():
    model = tiny()
    optimizer = build_optimizer(model, layer_decay=0.5, pace=Pace(3, 0.1))
    names = {id(p): name for name, p in model.named_parameters()}
    for step, factor in ((0, 0), (2, 0), (3, 0.1), (9, 0.1)):
        set_rates(model, optimizer, step, 2.0, None)
        assert model.encoder.training == (step >= 3) and model.head.training
        for group in optimizer.param_groups:
            for p in group["params"]:
                if names[id(p)].startswith("head."):
                    assert group["lr"] == 2.0
                elif ".blocks.1." in names[id(p)]:
                    assert group["lr"] == 2.0 * 0.5 * factor
                else:
                    assert group["lr"] <= 2.0 * factor
    assert len(parameter_groups(model, 0.05)) == 2 and len(parameter_groups(model, 0.05, pace=Pace())) == 4


def test_times_are_steps_or_epochs_and_defaults_go_with_a_fresh_decoder():
    plan, said = make_plan(100, [(0, 10), (2, 20)], None, 16, Time(4.0)), []  # 10 steps an epoch, then 5
    assert plan.steps == 30 and [plan.step(Time(epoch)) for epoch in (0, 0.5, 2, 3)] == [0, 5, 20, 25]
    assert encoder_pace(Optim(), plan) is None
    assert encoder_pace(Optim(), plan, True) == Pace(0, 1.0)
    assert encoder_pace(Optim(freeze_encoder=3, encoder_lr_scale=0.5), plan, True) == Pace(25, 0.5)
    assert encoder_pace(Optim(encoder_lr_scale=0.5), plan) == Pace(0, 0.5)
    assert encoder_pace(Optim(freeze_encoder="7 steps"), plan, False, said.append) == Pace(7, 0.1)
    assert encoder_pace(Optim(freeze_encoder=0), plan, False, said.append) == Pace(0, 0.1)
    assert "fresh: it learns for 7 steps" in said[0] and "0.1 of the rate" in said[0]
    with pytest.raises(UserError, match="freeze_encoder is 500 steps: .* for all 30 steps of the run; give less"):
        encoder_pace(Optim(), plan, False, said.append)


def test_wrong_times_and_factors_are_told():
    from util.config import Data

    run = Run("none", steps=10)
    for wrong, said in (({"freeze_encoder": "soon"}, "optim.freeze_encoder is soon, but has to be a number of epochs"),
                        ({"freeze_encoder": 2}, "optim.freeze_encoder has epoch 2 in it, but run.steps is given"),
                        ({"encoder_lr_scale": -1}, "optim.encoder_lr_scale is -1")):  # fmt: skip
        with pytest.raises(UserError, match=said):
            check(Data("none"), Optim(**wrong), run)
