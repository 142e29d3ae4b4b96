"""Paired intervals: against a closed form, and what pairing is for."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from nas.goals import classes, segmentation
from nas.paired import change


def rng():
    return np.random.default_rng(0)


def correct(share, n=1000, seed=0):
    return (torch.rand(n, generator=torch.Generator().manual_seed(seed)) < share).float()


def test_of_a_mean_it_is_the_closed_form():
    goal, n = classes("c", target="y"), 1000
    before = torch.ones(n)
    after = correct(0.8, n)
    found = change(goal, [before], [after], rng=rng())
    share = after.mean().item()
    half = 1.96 * np.sqrt(share * (1 - share) / n)
    assert found.value == pytest.approx(share - 1)
    assert found.low == pytest.approx(share - 1 - half, abs=0.15 * half)
    assert found.high == pytest.approx(share - 1 + half, abs=0.15 * half)


def test_what_both_get_wrong_widens_nothing():
    goal = classes("c", target="y")
    before = correct(0.5)
    after = before.clone()
    after[before.nonzero()[:10]] = 0
    found = change(goal, [before], [after], rng=rng())
    unpaired = 1.96 * np.sqrt(2 * 0.25 / 1000) / 0.5
    assert found.high - found.low < unpaired / 3
    assert found.low < -10 / before.sum() < found.high


def test_the_same_network_has_not_changed():
    evidence = torch.randint(0, 9, (30, 3, 3), generator=torch.Generator().manual_seed(0))
    evidence[..., 0] = 0.5 * evidence.min(2).values
    found = change(segmentation("s", target="m", n_classes=3), [evidence], [evidence], rng=rng())
    assert (found.value, found.low, found.high) == (0, 0, 0)


def test_seeds_are_averaged_on_the_same_images():
    goal = classes("c", target="y")
    befores = [correct(0.8, seed=s) for s in range(4)]
    afters = [correct(0.78, seed=10 + s) for s in range(4)]
    one = change(goal, befores[:1], afters[:1], rng=rng())
    four = change(goal, befores, afters, rng=rng())
    ratio = (four.high - four.low) / (one.high - one.low)
    assert 0.4 < ratio < 0.6  # independent errors: half as wide
    wanted = np.mean([a.mean() for a in afters]) / np.mean([b.mean() for b in befores]) - 1
    assert four.value == pytest.approx(wanted, rel=1e-4)


def test_neighbours_that_are_alike_are_drawn_together():
    goal, block = classes("c", target="y"), 10
    scenes = correct(0.8, 100)
    frames = scenes.repeat_interleave(block)
    wanted = change(goal, [torch.ones(100)], [scenes], rng=rng())
    found = change(goal, [torch.ones(1000)], [frames], rng=rng(), block=block)
    assert (found.low, found.high) == pytest.approx((wanted.low, wanted.high))
    alone = change(goal, [torch.ones(1000)], [frames], rng=rng())
    assert alone.high - alone.low < 0.5 * (found.high - found.low)


def test_a_last_block_may_be_shorter():
    found = change(classes("c", target="y"), [torch.ones(7)], [torch.ones(7)], rng=rng(), block=3)
    assert (found.value, found.low, found.high) == (0, 0, 0)


def test_trainings_that_differ_widen_the_interval():
    goal = classes("c", target="y")
    befores = [torch.ones(100)] * 3
    afters = [torch.arange(100) < right for right in (70, 80, 90)]
    afters = [after.float() for after in afters]
    images = change(goal, befores, afters, rng=rng())
    both = change(goal, befores, afters, rng=rng(), trainings=True)
    assert both.value == images.value == pytest.approx(-0.2)
    assert both.high - both.low > 1.2 * (images.high - images.low)


def test_evidence_of_other_images_is_a_mistake_of_ours():
    with pytest.raises(AssertionError, match="other images"):
        change(classes("c", target="y"), [torch.ones(3)], [torch.ones(4)], rng=rng())


def test_images_that_none_answered_before_break_nothing():
    goal = classes("class", target="label", n_classes=2)
    before, after = torch.tensor([1.0, 0, 0, 0]), torch.tensor([1.0, 0, 0, 0])
    found = change(goal, [before], [after], rng=np.random.default_rng(0))  # some draws are all 0
    assert found.value == found.low == found.high == 0
