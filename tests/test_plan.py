"""Times in epochs and in steps, stages, and the learning rate that follows from both."""

import random

import pytest

from util.checks import check
from util.config import Data, Optim, Run
from util.errors import UserError
from util.plan import evaluations, make_plan
from util.start import schedule
from util.times import Time, check_times, read_changes, read_time

STAGED = {"batch": [[0, 2048], [2, 1024]], "per_device": [[0, 256], [3, 64]], "size": [[0, 128], [2, 160], [3, 192]]}


def test_times_are_epochs_unless_they_say_steps():
    for text, time in {10: (10, "epochs"), "1e2": (100, "epochs"), "2.5 epochs": (2.5, "epochs")}.items():
        assert read_time("x", text) == time
    assert read_time("x", "500 steps") == read_time("x", "5e2steps") == (500, "steps")
    for wrong in ("fast", "500 images", -1, "1.2.3", ""):
        with pytest.raises(UserError, match="^optim.warmup is .* has to be a number of epochs, or of steps"):
            read_time("optim.warmup", wrong)
    for wrong in ([], [[3, 16]], [[0, 16], [0, 32]], [[0, 16], [5, 32], [4, 64]]):
        with pytest.raises(UserError, match="^data.size .* from epoch 0 on"):
            read_changes("data.size", wrong)


def test_stages_follow_from_the_schedules():
    """10,000 images: 4 steps of 2,048 an epoch, then 9 of 1,024; on 2 processes."""
    plan = make_plan(10_000, **STAGED, length=Time(5), world=2)
    found = [(s.step, s.epoch, s.size, s.batch, s.per_device, s.accumulate, s.steps_per_epoch) for s in plan.stages]
    assert found == [
        (0, 0, (128, 128), 2048, 256, 4, 4),
        (8, 2, (160, 160), 1024, 256, 2, 9),
        (17, 3, (192, 192), 1024, 64, 8, 9),
    ]
    assert plan.steps == 8 + 9 + 18 and plan.images(plan.steps) == 8 * 2048 + 27 * 1024
    lines = plan.describe(1.5e-4, 2)
    assert len(lines) == 4 and "8 of 2,048 images = 2 processes x 256 x 4 accumulated at 128 x 128 px" in lines[0]
    assert "18 of 1,024" in lines[2] and "1.5e-4" not in lines[2] and "x 1024 / 256 = 0.0006" in lines[2]
    assert "35 in all, 5 epochs" in lines[3]


def test_steps_and_epochs_are_each_other_whatever_the_stages():
    """Each epoch of the plan takes exactly its steps, and each length in epochs is reached at exactly its step."""
    rng = random.Random(0)
    for _ in range(50):
        images, starts = rng.randint(1, 3000), [0, *sorted(rng.sample(range(1, 9), 3))]
        batch = [(start, rng.randint(1, 200)) for start in starts]
        plan = make_plan(images, batch, None, 32, Time(12))
        step = 0
        for epoch in range(12):
            assert plan.epoch(step) == epoch and make_plan(images, batch, None, 32, Time(max(epoch, 1))).steps >= step
            size = next(size for start, size in reversed(batch) if start <= epoch)
            assert {plan.at(s).batch for s in range(step, step + max(images // size, 1))} == {size}
            step += max(images // size, 1)
        assert plan.steps == step
        assert [s for s in range(1, step + 1) if plan.due(s, Time(2))] == [
            s for s in range(1, step + 1) if plan.epoch(s) % 2 == 0
        ]


def test_stages_in_steps_begin_at_those_steps():
    plan = make_plan(100, [(0, 10), ("25 steps", 20)], None, 32, Time(40, "steps"))
    assert [s.step for s in plan.stages] == [0, 25] and plan.epoch(25) == 2.5 and plan.epoch(30) == 3.5
    assert plan.stages[1].passes == 3  # the third pass is cut short
    with pytest.raises(UserError, match="change in epochs here and in steps there"):
        make_plan(100, [(0, 10), ("25 steps", 20)], None, [(0, 32), (3, 64)], Time(1))


def test_what_does_not_come_out_even_is_named_with_its_stage():
    with pytest.raises(UserError, match=r"^data.batch 100 is not a multiple of 48 \(2 .* x .* 24\): use 96 or 144$"):
        make_plan(1000, 100, 24, 16, Time(1), 2)
    with pytest.raises(UserError, match=r"^from epoch 200 on, data.batch 1000 is not a multiple of 256 \(1 .*768 or"):
        make_plan(1000, [[0, 2048], [200, 1000]], 256, 16, Time(1))
    with pytest.raises(UserError, match=r"^from step 5,000 on, data.batch 2048 is not .* run.per_device 1500"):
        make_plan(1000, 2048, [[0, 256], ["5000 steps", 1500]], 16, Time(1))


def test_evaluations_come_when_they_are_due():
    plan = make_plan(100, 10, None, 32, Time(3))
    due = lambda every: [step for step in range(1, 31) if plan.due(step, evaluations(every, plan))]
    assert due(None) == due(1) == due("10 steps") == [10, 20, 30]
    assert due(0.1) == list(range(1, 31)) and due(0.25)[:4] == [3, 5, 8, 10] and due("2.5 steps")[:3] == [3, 5, 8]
    assert due(0) == due("0 steps") == []
    long = make_plan(100, 10, None, 32, Time(4000, "steps"))
    assert [step for step in range(1, 601) if long.due(step, evaluations(None, long))] == [200, 400, 600]


class Loaded:
    """As much of a loader as the learning rate asks for."""

    note = ""

    def __init__(self, *args, **kwargs):
        self.plan = make_plan(*args, **kwargs)


def rates(images, optim, run, **stages):
    length = Time(run.steps, "steps") if run.steps else Time(run.epochs)
    loader = Loaded(images, **{"batch": 64, "per_device": None, "size": 32} | stages, length=length)
    lr_at = schedule(optim, loader, run, lambda line: None)
    return [lr_at(step) for step in range(loader.plan.steps)], loader.plan


def test_a_run_in_steps_is_the_same_for_every_number_of_images():
    """As SwinV2's data scaling needs it: length and rate at each step do not depend on the fraction."""
    optim = Optim(lr=1e-3, warmup="20 steps", min_lr=1e-5)
    runs = [rates(images, optim, Run("", steps=200))[0] for images in (100, 1000, 5000)]
    assert runs[0] == runs[1] == runs[2] and len(runs[0]) == 200
    assert runs[0][20] == max(runs[0]) == 1e-3 * 64 / 256 and runs[0][10] == runs[0][20] / 2
    stairs = Optim(lr=1e-3, milestones=["150 steps"])
    assert rates(1000, stairs, Run("", steps=200))[0][149:151] == [1e-3 / 4, pytest.approx(1e-4 / 4)]


def test_the_rate_follows_the_batch_and_the_cosine_the_epochs():
    """FastMIM: lr * batch / 256 of each stage, times a cosine over epochs; half of it is over in mid-run."""
    found, plan = rates(6400, Optim(lr=1.0), Run("", epochs=4), batch=[[0, 128], [2, 64]])
    assert plan.steps == 100 + 200 and found[0] == 0.5
    assert found[100] == pytest.approx(0.5 * 0.25) and found[99] == pytest.approx(0.25, rel=0.02)
    one, _ = rates(6400, Optim(lr=1.0), Run("", epochs=4))
    assert found[200] == pytest.approx(one[300])  # both at epoch 3, with 64 images


def test_warmup_in_steps_of_a_run_in_epochs():
    found, _ = rates(6400, Optim(lr=1.0, warmup="50 steps"), Run("", epochs=4))
    assert found[50] == max(found) == 0.25 and found[25] == 0.125


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"run.epochs": 3.0, "run.steps": 100}, "run.epochs 3 and run.steps 100 are both given: set one to null"),
        ({"run.epochs": 0.0}, "run.epochs is 0"),
        ({"run.steps": 0}, "run.steps is 0, but has to be at least 1"),
        ({"run.steps": 100, "optim.warmup": 10.0}, "optim.warmup has epoch 10 in it, but run.steps is given"),
        ({"run.steps": 100, "optim.milestones": ["5 steps", 7]}, "optim.milestones has epoch 7 in it"),
        ({"run.steps": 100, "optim.cosine_from": 2}, "optim.cosine_from has epoch 2 in it"),
        ({"run.steps": 100, "data.size": [[0, 16], [5, 32]]}, "data.size has epoch 5 in it"),
        ({"data.batch": [[0, 16], [5, 0]]}, "data.batch is 0, but has to be at least 1"),
        ({"run.evaluate_every": "often"}, "run.evaluate_every is often"),
        ({"data.weights": [1.0, 2.0]}, "data.weights has 2 numbers, data.root 1 roots"),
        ({"data.root": ["a", "b"], "data.weights": [1.0, 0.0]}, "each has to be above 0"),
    ],
)
def test_lengths_times_and_weights_that_cannot_be_meant(changes, said):
    sections = {"data": Data("images"), "optim": Optim(), "run": Run("")}
    for key, value in changes.items():
        section, name = key.split(".")
        setattr(sections[section], name, value)
    with pytest.raises(UserError) as error:
        check(*sections.values())
    assert said in str(error.value) and "\n" not in str(error.value)


def test_a_run_in_steps_may_have_no_times_at_all():
    check_times(Data("images"), Optim(), Run("", steps=100, evaluate_every=2))
