"""The learning rate over a run, the groups of parameters, and LARS."""

import pytest
import torch
from torch import nn

from util.optim import LARS, Schedule, build_optimizer, parameter_groups


class Encoder(nn.Module):
    """Three layers and a final norm."""

    def __init__(self):
        super().__init__()
        self.stem, self.block, self.last, self.norm = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4), nn.LayerNorm(4)
        self.token = nn.Parameter(torch.ones(1, 1, 4))

    @property
    def layers(self):
        return [[self.token, *self.stem.parameters()], list(self.block.parameters()), list(self.last.parameters())]


class Task(nn.Module):
    def __init__(self):
        super().__init__()
        self.encoder, self.head = Encoder(), nn.Linear(4, 2)

    def forward(self, x):
        return self.head(self.encoder.norm(self.encoder.last(self.encoder.block(self.encoder.stem(x)))))


def by_name(task, groups):
    names = {id(p): name for name, p in task.named_parameters()}
    return {names[id(p)]: (g["lr_scale"], g["weight_decay"]) for g in groups for p in g["params"]}


def test_schedule_is_continuous_where_the_warmup_ends_and_stays_at_the_minimum():
    lr_at = Schedule(lr=1.0, steps=100, warmup=10, warmup_lr=0.2, min_lr=0.1)
    assert lr_at(0) == 0.2 and lr_at(5) == pytest.approx(0.6) and lr_at(10) == 1.0
    assert lr_at(55) == pytest.approx(0.55)
    assert lr_at(100) == lr_at(1000) == 0.1


def test_schedule_of_a_run_shorter_than_its_warmup():
    lr_at = Schedule(lr=1.0, steps=4, warmup=10)
    assert [lr_at(step) for step in range(4)] == pytest.approx([0, 0.1, 0.2, 0.3])


def test_schedule_staircase_drops_at_the_milestone_itself():
    lr_at = Schedule(lr=1.0, steps=100, milestones=(50, 80), gamma=0.5)
    assert [lr_at(step) for step in (0, 49, 50, 79, 80, 99)] == [1, 1, 0.5, 0.5, 0.25, 0.25]


def test_groups_scale_each_layer_and_spare_biases_norms_and_named_parameters():
    task = Task()
    found = by_name(task, parameter_groups(task, 0.05, layer_decay=0.5, no_decay=["token"]))
    expected = {"encoder.token": (0.125, 0.0), "encoder.norm.weight": (1.0, 0.0), "encoder.norm.bias": (1.0, 0.0)}
    for name, scale in {"encoder.stem": 0.125, "encoder.block": 0.25, "encoder.last": 0.5, "head": 1.0}.items():
        expected |= {f"{name}.weight": (scale, 0.05), f"{name}.bias": (scale, 0.0)}
    assert found == expected


def test_groups_are_as_few_as_possible_and_decay_what_is_not_named():
    task = Task()
    groups = parameter_groups(task, 0.05)
    assert len(groups) == 2 and by_name(task, groups)["encoder.token"] == (1.0, 0.05)


def test_groups_leave_out_what_is_frozen():
    task = Task()
    task.encoder.requires_grad_(False)
    assert set(by_name(task, parameter_groups(task, 0.05, layer_decay=0.5))) == {"head.weight", "head.bias"}


def test_nothing_to_train_is_an_error():
    with pytest.raises(ValueError, match="nothing to train"):
        build_optimizer(Task().requires_grad_(False))


def test_unknown_optimizer_is_an_error():
    with pytest.raises(ValueError, match="'adam'.*adamw, lamb, lars and sgd"):
        build_optimizer(Task(), "adam")


@pytest.mark.parametrize("name", ["adamw", "lamb", "lars", "sgd"])
def test_a_scale_of_half_moves_by_half_and_rate_zero_not_at_all(name):
    torch.manual_seed(0)
    moved = {}
    for scale in (0.0, 0.5, 1.0):
        torch.manual_seed(0)
        task = Task()
        before = task.head.weight.detach().clone()
        optimizer = build_optimizer(task, name)
        for group in optimizer.param_groups:
            group["lr"] = 0.01 * scale
        task(torch.ones(3, 4)).square().sum().backward()
        optimizer.step()
        moved[scale] = task.head.weight.detach() - before
    assert moved[0.0].abs().max() == 0 and moved[1.0].abs().max() > 0
    torch.testing.assert_close(moved[0.5] * 2, moved[1.0], rtol=1e-3, atol=1e-6)


def test_lars_steps_are_those_of_the_formula():
    torch.manual_seed(0)
    weight, bias, still = nn.Parameter(torch.randn(3, 2)), nn.Parameter(torch.randn(3)), nn.Parameter(torch.zeros(2, 2))
    optimizer = LARS([weight, bias, still], lr=0.1, weight_decay=0.01, momentum=0.9, trust=0.02)
    w, b, s, momenta = weight.detach().clone(), bias.detach().clone(), still.detach().clone(), [0.0, 0.0, 0.0]
    for _ in range(3):
        weight.grad, bias.grad, still.grad = torch.randn(3, 2), torch.randn(3), torch.randn(2, 2)
        change = weight.grad + 0.01 * w
        change = change * (0.02 * w.pow(2).sum().sqrt() / change.pow(2).sum().sqrt())
        change_s = still.grad + 0.01 * s
        if s.norm() > 0:  # from zero weights the gradient is taken as it is
            change_s = change_s * (0.02 * s.pow(2).sum().sqrt() / change_s.pow(2).sum().sqrt())
        for i, step in enumerate([change, bias.grad, change_s]):
            momenta[i] = 0.9 * momenta[i] + step
        w, b, s = w - 0.1 * momenta[0], b - 0.1 * momenta[1], s - 0.1 * momenta[2]
        optimizer.step()
        torch.testing.assert_close([weight.data, bias.data, still.data], [w, b, s])


def test_lars_resumes_from_its_state():
    torch.manual_seed(0)
    one, two = nn.Parameter(torch.ones(2, 2)), nn.Parameter(torch.ones(2, 2))
    grads, first, second = torch.randn(3, 2, 2), LARS([one], lr=0.1), LARS([two], lr=0.1)
    for i, grad in enumerate(grads):
        if i == 2:
            again = LARS([two], lr=0.0)
            again.load_state_dict(second.state_dict())
            second = again
        one.grad, two.grad = grad, grad.clone()
        first.step(), second.step()
    assert torch.equal(one, two)
