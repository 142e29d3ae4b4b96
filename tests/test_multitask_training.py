"""Training with several outputs: what is learned, stopping and going on, the teacher."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from nas import multitask
from nas.errors import NasctlError, UsageError
from nas.goals import box, classes
from nas.multitask import MultiTask
from nas.multitask_training import Schedule, goal_losses, train
from tests.sides import examples

SCHEDULE = Schedule(steps=12, batch=16, lr=0.05)


class Net(nn.Module):
    def __init__(self, seed=0):
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.conv = nn.Conv2d(3, 8, 3, 2, 1, bias=False)
            self.norm = nn.BatchNorm2d(8)
            self.head = nn.Linear(8 * 16, 6)

    def forward(self, x):
        x = self.norm(self.conv(x)).relu().flatten(1)
        answers = self.head(x)
        return {"class": answers[:, :2], "box": answers[:, 2:]}


@pytest.fixture(scope="module")
def task():
    goals = (classes("class", target="label"), box("box", target="box"))
    splits = (examples(64), examples(32, 1), examples(32, 2))
    return MultiTask("sides", goals, *splits, boxes=("box",))


def run(steps):
    return list(steps)


def same(one, two):
    return all(torch.equal(a, b) for a, b in zip(one.parameters(), two.parameters(), strict=True))


def test_both_goals_are_learned(task):
    net = Net()
    losses = run(train(net, task, Schedule(steps=40, batch=16, lr=0.05)))
    assert not net.training
    assert [step.step for step in losses] == list(range(1, 41))
    for name in ("class", "box"):
        assert losses[-1].losses[name] < 0.5 * losses[0].losses[name]
    found = multitask.scores(task, multitask.evidence(net, task, task.val))
    assert found["class"] == 1
    assert found["box"] > 0.7


@pytest.mark.parametrize("stop", [1, 5, 11])
def test_a_stopped_training_goes_on_bit_by_bit(stop, task, tmp_path):
    whole, stopped, resumed = Net(), Net(), Net()
    run(train(whole, task, SCHEDULE))
    path = tmp_path / "state.safetensors"
    steps = train(stopped, task, SCHEDULE, resume=path)
    for _ in range(stop):
        next(steps)
    steps.close()
    rest = run(train(resumed, task, SCHEDULE, resume=path))
    assert rest[0].step == stop + 1
    assert same(whole, resumed)
    assert all(torch.equal(a, b) for a, b in zip(whole.buffers(), resumed.buffers(), strict=True))


def test_a_state_of_another_training_is_refused(task, tmp_path):
    path = tmp_path / "state.safetensors"
    run(train(Net(), task, SCHEDULE, resume=path))
    teacher = Net(3).eval()
    for net, other, taught in (
        (Net(1), SCHEDULE, None),  # the same shapes, but not what it started from
        (Net(), Schedule(steps=12, batch=16, lr=0.04), None),
        (Net(), SCHEDULE, teacher),
    ):
        with pytest.raises(NasctlError, match="another recipe"):
            run(train(net, task, other, teacher=taught, resume=path))


def test_seeds_differ_and_repeat(task):
    nets = [Net() for _ in range(3)]
    for net, seed in zip(nets, (0, 0, 1), strict=True):
        run(train(net, task, Schedule(steps=3, batch=16, seed=seed)))
    assert same(nets[0], nets[1])
    assert not same(nets[0], nets[2])


def test_a_teacher_is_followed_and_left_as_it_is(task):
    teacher = Net(1)
    run(train(teacher, task, Schedule(steps=40, batch=16)))
    before = copy.deepcopy(teacher)
    alone, taught = Net(2), Net(2)
    run(train(alone, task, SCHEDULE))
    run(train(taught, task, SCHEDULE, teacher=teacher))
    assert not same(alone, taught)
    assert same(before, teacher)
    own = Schedule(steps=12, batch=16, lr=0.05, imitation=0.0)
    ignoring = Net(2)
    run(train(ignoring, task, own, teacher=teacher))
    assert same(alone, ignoring)


def test_losses_with_a_teacher_are_the_mixture(task):
    (images, targets) = next(task.batches(task.val))
    one, two = Net().eval()(images), Net(1).eval()(images)
    labels = goal_losses(task, one, targets)
    mixed = goal_losses(task, one, targets, two, 0.25)
    for goal in task.goals:
        soft = goal.imitate(one[goal.name], two[goal.name])
        wanted = 0.75 * labels[goal.name] + 0.25 * soft
        assert torch.allclose(mixed[goal.name], wanted)


def test_a_loss_that_is_no_number_names_its_goal(task):
    net = Net()
    nn.init.constant_(net.head.bias, float("inf"))
    with pytest.raises(NasctlError, match=r"the loss of (class|box) is (nan|inf) at step 1"):
        run(train(net, task, SCHEDULE))


def test_a_missing_output_is_named(task):
    class Half(Net):
        def forward(self, x):
            return {"class": super().forward(x)["class"]}

    with pytest.raises(NasctlError, match="no output 'box'.*this one gives class"):
        run(train(Half(), task, SCHEDULE))


def test_rates_rise_and_fall_to_nothing():
    schedule = Schedule(steps=100, lr=1.0, warmup=0.1)
    rates = [schedule.lr_at(step) for step in range(100)]
    assert rates[:10] == pytest.approx([0.1 * k for k in range(1, 11)])
    assert rates[10:] == sorted(rates[10:], reverse=True)
    assert rates[55] == pytest.approx(0.5)
    assert rates[-1] < 1e-3


@pytest.mark.parametrize(
    "wrong", [{"batch": 1}, {"steps": -1}, {"lr": 0.0}, {"imitation": 1.5}, {"warmup": 2.0}]
)
def test_bad_schedules_name_the_flag(wrong):
    (name,) = wrong
    with pytest.raises(UsageError, match=f"--{name}"):
        Schedule(**{"steps": 1, **wrong})
