"""How far a task's loss may grow, from what it has to lose (compress.room)."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from compress import losses, room
from compress.job import Settings, finish
from compress.objective import Objective
from compress.prune import _Round, one_round, prune
from compress.record import Record
from compress.room import LEAST, LOOSENED, Room
from nas.errors import BudgetInfeasible, UsageError
from nas.outputs import changed
from tests.prunable import job

GRID = (0.25, 0.5, 0.75)


def roomy(given, drop=0.02):
    """A label that is lost at 1.3 times its loss, and a map at 1.15 times."""
    before = losses.measure(given.net, given.objectives, given.batches).values
    ceilings = {"label": 1.3 * before["label"], "map": 1.15 * before["map"]}
    return Room(ceilings, dict.fromkeys(ceilings, room.share(drop)))


def settings(given, drop=0.02, **fields):
    return Settings(bound=roomy(given, drop), divisor=4, grid=GRID, **fields)


# ---- ceilings ------------------------------------------------------------------------------------


class Echo(nn.Module):
    def forward(self, x):
        return {"a": x, "deep": [x * 2]}


def test_a_ceiling_is_the_loss_of_the_mean_answer_to_all_images():
    x = torch.tensor([[0.0], [1.0], [5.0]])
    batches = [(x[:2], x[:2]), (x[2:], x[2:])]  # of unequal sizes
    objectives = [
        Objective("a", lambda out, y: F.mse_loss(out["a"], y)),
        Objective("b", lambda out, y: F.l1_loss(out["deep"][0], 2 * y)),
    ]
    found = room.ceilings(Echo(), objectives, batches)
    assert found["a"] == pytest.approx(float(x.var(unbiased=False)))
    assert found["b"] == pytest.approx(float((2 * x - 2 * x.mean()).abs().mean()))


class Sides(nn.Module):
    """What has no row per image, or other shapes from batch to batch, has no mean."""

    def forward(self, x):
        return x, x.sum(0), torch.ones(len(x), len(x)) * x


def test_the_room_of_drops():
    x = torch.tensor([[0.0], [1.0], [5.0]])
    objectives = [Objective("a", lambda out, y: F.mse_loss(out["a"], y))]
    found = room.of(Echo(), objectives, [(x, x + 1)], {"a": 0.02})
    assert found.ceilings == {"a": pytest.approx(float(x.var(unbiased=False)) + 1)}
    assert found.shares == {"a": room.share(0.02)}


def test_answers_without_a_mean_stay_as_they_are():
    x = torch.tensor([[0.0], [1.0], [5.0]])
    batches = [(x[:2], x[:2]), (x[2:], x[2:])]
    objectives = [
        Objective("sum", lambda out, y: (out[1] - y.sum(0)).abs().sum()),
        Objective("square", lambda out, y: (out[2] - y).abs().sum()),
    ]
    assert room.ceilings(Sides(), objectives, batches) == {"sum": 0.0, "square": 0.0}


class Pair(NamedTuple):
    one: torch.Tensor
    two: list[torch.Tensor]


def test_outputs_keep_their_nesting():
    ones = torch.ones(2)
    found = changed({"x": Pair(ones, [ones, None])}, lambda tensor: tensor * 3)
    assert isinstance(found["x"], Pair) and found["x"].two[1] is None
    assert found["x"].one.tolist() == found["x"].two[0].tolist() == [3, 3]


# ---- bounds --------------------------------------------------------------------------------------


def test_every_task_has_its_own_bound_below_its_ceiling():
    found = Room({"class": 2.13, "box": 1.18}, {"class": 0.5, "box": 0.5})
    bounds = found.bounds({"class": 1.0, "box": 1.0})
    assert bounds == pytest.approx({"class": math.sqrt(2.13), "box": math.sqrt(1.18)})
    loss = 1.0
    for _ in range(10):  # rounds
        loss *= found.bounds({"box": loss})["box"]
    assert 1.17 < loss < 1.18


def test_what_may_drop_steers_alone_and_where_all_are_equal():
    """6 ** (drop / most) was 6 for one task, and for equal drops, whatever was typed."""
    shares = [room.share(drop) for drop in (0.001, 0.01, 0.02, 0.1, 0.5, 0.99)]
    assert shares == sorted(shares) and shares[0] > 0 and shares[-1] < 1
    bounds = [Room({"a": 3.0}, {"a": share}).bounds({"a": 1.0})["a"] for share in shares]
    assert bounds == sorted(set(bounds)) and bounds[-1] < 3.0


def test_a_task_that_has_learned_nothing_has_a_little_room():
    """Its loss is as low for the mean answer, or lower; or that one is no number."""
    x = torch.tensor([[0.0], [1.0], [5.0]])
    objectives = [
        Objective("flat", lambda out, y: F.mse_loss(0 * out["a"] + 1, y)),
        Objective("bad", lambda out, y: F.mse_loss(-out["a"], y)),
        Objective("wild", lambda out, y: torch.ones(()) / out["a"].std() * y.mean()),
    ]
    before = losses.measure(Echo(), objectives, [(x, x)]).values
    found = room.of(Echo(), objectives, [(x, x)], dict.fromkeys(before, 0.02))
    assert found.ceilings == pytest.approx({task: LEAST * loss for task, loss in before.items()})
    over = {task: 2 * loss for task, loss in before.items()}  # after a training that went wrong
    for these in (before, over):
        assert found.bounds(these) == pytest.approx(dict.fromkeys(these, LEAST ** room.share(0.02)))


def test_looser_bounds_never_come_to_the_ceiling():
    every = Room({"a": 4.0, "b": 2.0}, {"a": 0.5, "b": 0.9}).loosened()
    assert len(every) == 1 + LOOSENED
    bounds = [one.bounds({"a": 1.0, "b": 1.0}) for one in every]
    assert bounds[0] == {"a": 2.0, "b": pytest.approx(2**0.9)}
    for task, ceiling in every[0].ceilings.items():
        grown = [one[task] for one in bounds]
        assert grown == sorted(set(grown)) and grown[-1] < ceiling


def test_bounds_for_other_tasks_are_told():
    with pytest.raises(UsageError, match="bounds for b; allowed: one for each of a"):
        Settings(bound=Room({"b": 2.0}, {"b": 0.5})).bounds({"a": 1.0})


# ---- pruning by them -----------------------------------------------------------------------------


def test_a_target_is_met_without_giving_a_task_up():
    """Which equal factors do that are as wide as the target needs."""
    given = job("plain", share=0.5)
    ceilings = roomy(given).ceilings
    lost = finish(one_round(given, Settings(bound=1e4, divisor=4, grid=GRID)))
    kept = finish(one_round(given, settings(given)))
    assert lost.cost <= given.target and lost.losses["map"] > ceilings["map"]
    assert kept.cost <= given.target
    assert all(kept.losses[task] < ceiling for task, ceiling in ceilings.items())


def test_bounds_are_loosened_only_as_far_as_the_target_needs():
    given = job("plain", share=0.9)
    tight = finish(one_round(given, settings(given, 0.2)))
    asked = roomy(given, 0.2).bounds(tight.losses_before)
    assert tight.cost <= given.target and tight.bounds == (asked,)
    further = replace(given, target=given.target / 2)
    loose = finish(one_round(further, settings(given, 0.2)))
    assert all(loose.bounds[0][task] > bound for task, bound in asked.items())
    assert [loose.bounds[0]] in [
        [wider.bounds(loose.losses_before)] for wider in roomy(given, 0.2).loosened()
    ]


def _scanned(given, settings):
    run = _Round(given, settings, Record())
    for _ in run.scan():
        pass
    return run


def test_where_bounds_were_loosened_what_is_left_of_a_share_is_the_next_ones():
    given = job("plain", share=0.02)
    first, second, *_ = settings(given, keep=1.0).loosened()
    assert (first.carried, second.carried) == (False, True)
    carried, published = _scanned(given, second), _scanned(given, replace(second, carried=False))
    assert any(not visit.grown for visit in carried.visits)  # those refused leave all of theirs
    for task, before in carried.before.items():
        product = before
        for number, visit in enumerate(carried.visits):
            product *= 1 + carried.schedule.thresholds(number)[task]
            assert visit.row.limits[task] == pytest.approx(product, rel=1e-12)
            assert visit.row.losses[task] <= visit.row.limits[task]
        assert product == pytest.approx(before * carried.bounds[task], rel=1e-9)  # not above D
    for task, limit in carried.visits[-1].row.limits.items():
        assert limit > published.visits[-1].row.limits[task]


def test_units_measured_alone_have_no_slack_to_carry():
    given = job("plain", share=0.02)
    alone = settings(given, keep=1.0, one_shot=True).loosened()[1]
    rows = [visit.row for visit in _scanned(given, alone).visits]
    plain = [visit.row for visit in _scanned(given, replace(alone, carried=False)).visits]
    assert rows == plain


def test_the_sum_may_grow_as_if_each_task_grew_to_its_own_bound():
    given = job("plain")
    run = _Round(given, settings(given, summed=True), Record())
    whole = sum(run.permitted[task] * loss for task, loss in run.losses_before.items())
    assert run.bounds["sum"] * run.before["sum"] == pytest.approx(whole, rel=1e-6)
    assert min(run.permitted.values()) < run.bounds["sum"] < max(run.permitted.values())
    equal = _Round(given, Settings(bound=6.0, divisor=4, grid=GRID, summed=True), Record())
    assert equal.bounds == {"sum": pytest.approx(6.0)}  # as published


def test_bounds_that_stop_nothing_are_not_loosened():
    given = job("plain", share=0.02)
    wide = Room({"label": 1e9, "map": 1e9}, {"label": 0.9, "map": 0.9})
    steps = one_round(given, Settings(bound=wide, divisor=4, grid=GRID))
    assert [step.doing for step in steps].count("choosing units") == 1


def test_each_round_has_what_is_left():
    given = job("plain", share=0.7)
    found = finish(prune(given, settings(given), rounds=2))
    assert len(found.bounds) == 2
    ceilings = roomy(given).ceilings
    assert all(found.losses[task] < ceilings[task] for task in ceilings)


def test_a_target_beyond_all_ceilings_is_infeasible():
    given = job("plain", share=0.02)
    with pytest.raises(BudgetInfeasible, match="as far as it goes"):
        finish(prune(given, settings(given)))


def test_scores_are_in_shares_of_each_tasks_own_bound():
    given = job("plain")
    found = finish(one_round(replace(given, target=1.0), settings(given, keep=1.0)))
    row, before = found.rows[0], found.losses_before
    assert row.accepted < row.width
    spent = sum(
        (row.losses[task] - before[task]) / before[task] / math.log(found.bounds[0][task])
        for task in before
    )
    assert row.score == pytest.approx(spent / row.saved)
    assert losses.measure(given.net, given.objectives, given.batches).values == before
