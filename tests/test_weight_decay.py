"""SparK's optimizer: LAMB is timm's, and weight decay follows its cosine through any interruption."""

import math

import pytest
import torch
from timm.optim import Lamb
from torch import nn

from tests.test_train import STEPS, Images, Stop, equal, stop_at, tiny
from util.checks import check
from util.config import Data, Optim, Run
from util.errors import UserError
from util.log import Log
from util.optim import LAMB, Schedule, build_optimizer
from util.start import decay
from util.train import train


def test_lamb_is_timms():
    """Decayed and not, from zero weights too, while rate and decay change."""
    torch.manual_seed(0)
    ours, theirs = (
        [nn.Parameter(t) for t in tensors] for tensors in zip(*((t, t.clone()) for t in tensors_to_learn()))
    )
    groups = lambda ps: [{"params": ps[:2], "weight_decay": 0.1}, {"params": ps[2:], "weight_decay": 0.0}]
    one = LAMB(groups(ours), lr=0.0, betas=(0.9, 0.95))
    two = Lamb(groups(theirs), lr=0.0, betas=(0.9, 0.95), max_grad_norm=None)
    for step in range(6):
        for a, b in zip(ours, theirs):
            a.grad = torch.randn_like(a)
            b.grad = a.grad.clone()
        for group in (*one.param_groups, *two.param_groups):
            group["lr"] = 0.1 / (1 + step)
            group["weight_decay"] *= 1.5
        one.step(), two.step()
        torch.testing.assert_close(ours, theirs, atol=2e-6, rtol=2e-6)


def tensors_to_learn():
    return torch.randn(4, 3), torch.zeros(2, 2), torch.randn(3), torch.randn(5)


def test_lamb_resumes_from_its_state():
    torch.manual_seed(0)
    one, two = nn.Parameter(torch.ones(2, 2)), nn.Parameter(torch.ones(2, 2))
    grads, first, second = torch.randn(3, 2, 2), LAMB([one], 0.1, 0.05), LAMB([two], 0.1, 0.05)
    for i, grad in enumerate(grads):
        if i == 2:
            again = LAMB([two], lr=0.0)
            again.load_state_dict(second.state_dict())
            second = again
        one.grad, two.grad = grad, grad.clone()
        first.step(), second.step()
    assert torch.equal(one, two)


def test_a_first_step_that_is_not_finite_leaves_lamb_as_new():
    one, two = nn.Parameter(torch.ones(2, 2)), nn.Parameter(torch.ones(2, 2))
    first, second = LAMB([one], 0.1, 0.05), LAMB([two], 0.1, 0.05)
    one.grad, first.found_inf = torch.full_like(one, float("nan")), torch.ones(())
    first.step()
    assert torch.equal(one, two)
    first.found_inf = torch.zeros(())
    one.grad, two.grad = torch.ones(2, 2), torch.ones(2, 2)
    first.step(), second.step()
    assert torch.equal(one, two) and not torch.equal(one, torch.ones(2, 2))


def test_weight_decay_goes_by_a_cosine():
    at = decay(Optim(weight_decay=0.04, weight_decay_end=0.2), 1000)
    for step in (0, 1, 250, 500, 999):
        assert at(step) == pytest.approx(0.2 - 0.16 * (1 + math.cos(math.pi * step / 1000)) / 2, rel=1e-12)
    assert decay(Optim(), 1000) is None


@pytest.mark.parametrize(("start", "end"), [(0.0, 0.2), (0.04, -0.1)])
def test_weight_decay_that_cannot_be_meant_is_refused(start, end):
    with pytest.raises(UserError, match=f"from {start} to {end}.*above 0"):
        check(Data(root=""), Optim(weight_decay=start, weight_decay_end=end), Run(folder=""))


def go(folder, end=0.5, evaluate=None):
    folder.mkdir(exist_ok=True)
    model = tiny()
    optimizer = build_optimizer(model, "lamb", 0.05)
    run = Run(str(folder), epochs=STEPS / 4, dtype="float32", log_every=3, save_every=3, evaluate_every=0.25)
    decay_at = decay(Optim(weight_decay=0.05, weight_decay_end=end), STEPS)
    train(model, Images(), optimizer, Schedule(3e-3, STEPS), 1.0, run, Log(folder), evaluate, decay_at)
    return model, optimizer, decay_at


def test_a_stopped_run_continues_with_the_decay_of_its_step(tmp_path):
    whole, optimizer, decay_at = go(tmp_path / "whole")
    assert {group["weight_decay"] for group in optimizer.param_groups} == {0.0, decay_at(STEPS - 1)}
    with pytest.raises(Stop):
        go(tmp_path / "parts", evaluate=stop_at(7))
    parts, *_ = go(tmp_path / "parts")
    assert equal(whole, parts)
    assert not equal(whole, go(tmp_path / "constant", end=None)[0])
