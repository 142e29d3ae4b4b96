"""A training that falls back to chance, or explodes, returns to a sound state."""

from __future__ import annotations

import math
from itertools import islice

import pytest
import torch
from torch import nn

from nas import supernet
from nas.collapse import PATIENCE, Watch
from nas.errors import NasctlError
from nas.recipe import Recipe

CHANCE = math.log(4)


def watched(losses, start=None):
    watch = start or Watch()
    for loss in losses:
        watch = watch.after([loss], CHANCE)
    return watch


def test_back_at_chance_after_having_learned_is_a_collapse():
    learned = watched([1.0] * PATIENCE)
    assert learned.learned and learned.calm
    assert not watched([CHANCE] * (PATIENCE - 1), learned).collapsed
    assert watched([CHANCE + 0.04] * PATIENCE, learned).collapsed
    assert not watched([CHANCE] * 19 + [1.2] + [CHANCE] * 19, learned).collapsed
    assert not watched([CHANCE + 0.3] * 100, learned).collapsed


def test_a_start_at_chance_is_none():
    assert not watched([CHANCE] * 200).collapsed
    assert not watched(([1.0] * 19 + [CHANCE]) * 10).learned


@pytest.mark.parametrize("loss", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_is_one_at_once(loss):
    assert watched([1.0, loss]).collapsed
    assert Watch().after([1.0, loss], CHANCE).collapsed, "a child's loss counts too"


def test_a_state_just_after_a_jump_is_no_place_to_return_to():
    assert not watched([1.0] * PATIENCE + [5.0]).calm


class Fragile(nn.Module):
    """A classifier that loses its weights, to zeros or to nonsense, whenever it has run `at` often.

    Counts forward passes of its life, so a rolled-back training passes the place unharmed.
    """

    def __init__(self, at, value):
        super().__init__()
        self.linear, self.at, self.value = nn.Linear(64, 4), at, value
        for parameter in self.parameters():
            parameter.data.normal_(0, 0.1, generator=torch.Generator().manual_seed(0))
        self.arch = ARCH
        self.calls = 0

    def forward(self, x, arch):
        self.calls += 1
        if self.calls in self.at:
            with torch.no_grad():
                self.linear.weight.fill_(self.value)
                self.linear.bias.fill_(self.value)
        if self.value == 0 and any(self.calls >= at > self.calls - PATIENCE for at in self.at):
            return self.linear(x.flatten(1)) * 0  # stays at chance for a while
        return self.linear(x.flatten(1))


class ARCH:
    resolution = 8


RECIPE = Recipe(steps=160, batch=50, lr=0.1, label_smoothing=0.0)


def run(net, tiny, recipe=RECIPE, **options):
    return list(supernet.train(net, supernet.alone(net), tiny, recipe, **options))


@pytest.mark.parametrize("value", [math.nan, 0.0])
def test_it_returns_to_the_last_sound_state_with_half_the_rate(value, tiny):
    net = Fragile([121], value)
    steps = run(net, tiny)
    at = [step.step for step in steps]
    back = next(i for i in range(1, len(at)) if at[i] < at[i - 1])
    assert at[back] == 100 and at[back + 1] == 101 and at[-1] == 160
    assert at[back - 1] == (120 if math.isnan(value) else 139)
    assert [step.halvings for step in steps] == [0] * back + [1] * (len(at) - back)
    # afterwards it is the run that had half the rate from step 100 on
    assert steps[-1].losses[0] < 1.0
    assert torch.isfinite(net.linear.weight).all()


def test_a_run_stopped_after_a_collapse_goes_on_as_if_it_had_not(tiny, tmp_path):
    whole = Fragile([121, 140], math.nan)
    run(whole, tiny)
    file = tmp_path / "state.safetensors"
    for stop in (121, 121 + 10, 1000):  # just at the return to step 100, within, to the end
        net = Fragile([121, 140], math.nan)
        net.calls = calls(file)
        steps = supernet.train(net, supernet.alone(net), tiny, RECIPE, resume=file)
        for last in islice(steps, stop - net.calls):  # noqa: B007
            pass
        steps.close()
        (tmp_path / "calls").write_text(str(net.calls))
    assert last.step == 160 and last.halvings == 2
    assert torch.equal(net.linear.weight, whole.linear.weight)


def calls(file):
    """What a resumed stand-in has to know, which real networks do not."""
    path = file.with_name("calls")
    return int(path.read_text()) if path.exists() else 0


def test_after_three_returns_it_is_one_clear_error(tiny):
    net = Fragile(range(5, 500), math.nan)
    with pytest.raises(NasctlError, match="--lr: training diverged at step 1:.*at 1/8 of the rate"):
        run(net, tiny)


def test_nothing_to_return_to_is_an_error_at_once(tiny):
    with pytest.raises(NasctlError, match="diverged at step 1: the loss is not finite. Try"):
        run(Fragile([1], math.nan), tiny)


def test_a_watched_run_without_trouble_is_the_same_run(tiny, monkeypatch):
    a, b = Fragile([], 0.0), Fragile([], 0.0)
    run(a, tiny)
    monkeypatch.setattr(supernet, "SAFE_EVERY", 7)
    run(b, tiny)
    assert torch.equal(a.linear.weight, b.linear.weight)
