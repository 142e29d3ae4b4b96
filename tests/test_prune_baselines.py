from __future__ import annotations

import copy
import itertools
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
import torch_pruning as tp
from torch import nn

from compress import baselines, losses, units, widths
from compress.baselines.halp import knapsack
from compress.baselines.taylor import taylor
from compress.cost import Macs
from compress.history import History, Step
from compress.job import Job, OutOfReach, Settings, finish
from compress.objective import Objective
from compress.reach import by_threshold, evenly, reach
from compress.units import Unit
from nas.errors import BudgetInfeasible, UsageError
from nas.outputs import tensors
from tests.graphs import ResNet18, settled
from tests.prunable import job

SETTINGS = Settings(divisor=4)


def test_every_file_is_a_method_and_others_are_told():
    assert {"halp", "magnitude", "random", "taylor", "uniform"} <= set(baselines.names())
    with pytest.raises(UsageError, match="Did you mean taylor"):
        baselines.load("tailor")


@pytest.fixture(scope="module")
def results():
    given = job("plain")
    return given, {
        name: finish(baselines.load(name)(given, SETTINGS)) for name in baselines.names()
    }


@pytest.mark.parametrize("name", baselines.names())
def test_a_method_meets_the_target_by_a_history_that_rebuilds_its_network(results, name):
    given, found = results[0], results[1][name]
    assert 0.75 * given.target < found.cost <= given.target
    assert found.cost == given.cost.of(found.net, given.example_inputs)
    again = given.renewed(found.history.replay(given.net, given.example_inputs))
    assert all(torch.equal(t, again.state_dict()[n]) for n, t in found.net.state_dict().items())
    shapes = [
        [t.shape for t in tensors(net(given.example_inputs))] for net in (found.net, given.net)
    ]
    assert shapes[0] == shapes[1]
    assert all(row.kept % 4 == 0 for row in found.rows)


@pytest.mark.parametrize("name", baselines.names())
def test_what_a_strength_leaves_of_the_target_is_filled(results, name):
    """No unit's next width fits any more: methods that are compared use up the same target."""
    given, found = results[0], results[1][name]
    by_root = {unit.root: unit for unit in units.find(given.net, given.example_inputs).units}
    kept = {by_root[row.root]: row.kept for row in found.rows}
    pruned = [unit for unit in kept if kept[unit] < unit.width]
    assert pruned
    for unit in pruned:
        ways = (unit.width, *widths.every(unit, SETTINGS))
        wider = {**kept, unit: min(width for width in ways if width > kept[unit])}
        steps = [widths.step(u, range(u.places), n) for u, n in wider.items() if n < u.width]
        net = History(tuple(steps)).replay(given.net, given.example_inputs)
        assert given.cost.of(net, given.example_inputs) > given.target


def test_the_places_that_come_back_are_worth_most():
    """One unit's are by far: it is widened before the others."""
    given = job("plain")
    found = units.find(given.net, given.example_inputs)
    dear, *others = (unit for unit in found.units if unit.width > 4)
    scores = {unit: torch.ones(unit.places) for unit in (*others, dear)}
    scores[dear] = torch.full((dear.places,), 9.0)

    def allocate(strength):
        return {unit: 4 if strength else unit.width for unit in scores}

    ended = finish(reach(given, found, scores, allocate, SETTINGS))
    kept = {row.root: row.kept for row in ended.rows}
    assert kept[dear.root] == dear.width
    assert any(kept[unit.root] < unit.width for unit in others)


def test_methods_differ(results):
    histories = {name: found.history.to_json() for name, found in results[1].items()}
    assert len(set(histories.values())) >= 5


def test_random_follows_its_seed(results):
    given, found = results
    other = finish(baselines.load("random")(given, replace(SETTINGS, seed=1)))
    assert other.history != found["random"].history
    assert finish(baselines.load("random")(given, SETTINGS)).history == found["random"].history


def test_a_target_out_of_reach_says_what_is_in_reach():
    given = job("plain", share=0.001)
    with pytest.raises(OutOfReach, match="MACs is the least that this method comes to") as told:
        finish(baselines.load("uniform")(given, SETTINGS))
    assert isinstance(told.value, BudgetInfeasible) and told.value.exit_code == 3
    reached = told.value.reached
    assert given.target < reached.cost < reached.cost_before
    assert reached.cost == given.cost.of(reached.net, given.example_inputs)
    assert all(row.kept < row.width for row in reached.rows if row.width > SETTINGS.divisor)


def test_scopes_share_out_what_goes():
    wide, narrow = Unit("wide", 8, 1, ()), Unit("narrow", 4, 1, ())
    scores = {wide: torch.arange(8.0), narrow: torch.arange(4.0) + 100}
    settings = Settings(divisor=1)
    alone = by_threshold(scores, lambda unit: unit.root, settings)
    together = by_threshold(scores, lambda unit: "all", settings)
    assert alone(0.5) == {wide: 4, narrow: 2}
    assert together(0.5) == {wide: 2, narrow: 4}
    assert alone(0.0) == together(0.0) == {wide: 8, narrow: 4}


def test_even_shares_come_to_units_one_by_one():
    """All at once they would go from 8 and 8 to 4 and 4: targets between would be missed by far."""
    wide, other, narrow = (Unit(name, n, 1, ()) for name, n in (("a", 8), ("b", 8), ("c", 2)))
    scores = {unit: torch.arange(float(unit.width)) for unit in (wide, other, narrow)}
    allocate = evenly(scores, Settings(divisor=2, grid=(0.75,)))
    every = [allocate(n / 100) for n in range(101)]
    found = list(dict.fromkeys((kept[wide], kept[other]) for kept in every))
    assert found == [(8, 8), (6, 8), (6, 6), (4, 6), (4, 4), (2, 4), (2, 2)]
    assert all(kept[narrow] == 2 for kept in every)  # too narrow for the divisor


def test_unequal_units_lose_the_same_share_to_within_a_width():
    units_ = [Unit(str(n), n, 1, ()) for n in (16, 24, 64, 128)]
    scores = {unit: torch.arange(float(unit.width)) for unit in units_}
    allocate = evenly(scores, Settings(divisor=8))
    for strength in (0.1, 0.3, 0.5, 0.7):
        kept = allocate(strength)
        lost = sum(unit.width - kept[unit] for unit in units_) / sum(u.width for u in units_)
        for unit in units_:
            assert abs(unit.width - kept[unit] - lost * unit.width) <= 8 + 1e-9


class Normed(nn.Module):
    """A convolution with a norm behind it, and one without."""

    def __init__(self):
        super().__init__()
        self.a = nn.Conv2d(3, 4, 1)
        self.norm = nn.BatchNorm2d(4)
        self.b = nn.Conv2d(4, 4, 1)
        self.head = nn.Linear(4, 2)

    def forward(self, x):
        x = self.b(self.norm(self.a(x)).relu()).relu()
        return self.head(x.mean((2, 3)))


def normed():
    torch.manual_seed(0)
    net = settled(Normed())
    x = torch.randn(6, 3, 4, 4)
    y = torch.arange(6) % 2
    objective = Objective("class", lambda out, target: F.cross_entropy(out, target))
    return Job(net, x[:1], [objective], [(x, y)], Macs(), 1.0)


def test_taylor_gates_on_the_norm_behind_a_layer():
    given = normed()
    found = taylor(given, units.find(given.net, given.example_inputs).units)
    net = copy.deepcopy(given.net)
    ((x, y),) = given.batches
    loss = F.cross_entropy(net(x), y)
    (loss * len(x) / loss.detach()).backward()
    wanted = {
        "a": (net.norm.weight * net.norm.weight.grad + net.norm.bias * net.norm.bias.grad) ** 2,
        "b": ((net.b.weight * net.b.weight.grad).sum((1, 2, 3)) + net.b.bias * net.b.bias.grad)
        ** 2,
    }
    assert {unit.root for unit in found} == set(wanted)
    for unit, scores in found.items():
        assert torch.allclose(scores, wanted[unit.root].detach(), rtol=1e-4), unit.root


def test_taylor_squares_each_batch_before_they_are_added():
    """Of two whose gradients cancel, the sum of both would say that nothing is worth anything."""
    given = normed()
    ((x, y),) = given.batches
    objective = Objective("a", lambda out, sign: 9 + (sign[:, None] * out).sum())
    one = [(x, torch.ones(6))]
    both = [*one, (x, -torch.ones(6))]
    found = units.find(given.net, given.example_inputs).units
    first, all_ = (
        taylor(replace(given, objectives=[objective], batches=batches), found)
        for batches in (one, both)
    )
    before = losses.measure(given.net, [objective], one).values["a"]
    for unit, scores in all_.items():
        assert torch.allclose(scores * 9**2, 2 * first[unit] * before**2, rtol=1e-4)


@pytest.mark.parametrize("frozen", [["a", "norm", "b", "head"], ["a", "norm"]])
def test_taylor_scores_frozen_layers_alike(frozen):
    given = normed()
    found = taylor(given, units.find(given.net, given.example_inputs).units)
    for name in frozen:
        given.net.get_submodule(name).requires_grad_(False)
    again = taylor(given, units.find(given.net, given.example_inputs).units)
    for unit, scores in found.items():
        assert torch.equal(scores, again[unit])
    assert not any(p.requires_grad for p in given.net.a.parameters())  # a copy was unfrozen


def test_the_knapsack_is_as_good_as_trying_everything():
    generator = torch.Generator().manual_seed(0)
    options = {}
    for number in range(4):
        saved = torch.rand(4, generator=generator).cumsum(0).tolist()
        worth = torch.rand(4, generator=generator).cumsum(0).tolist()
        of = {8: (0.0, 0.0), **{7 - n: (saved[n], worth[n]) for n in range(4)}}
        options[Unit(str(number), 8, 1, ())] = of
    total = sum(max(saved for saved, _ in of.values()) for of in options.values())
    for share in (0.1, 0.4, 0.8, 1.0):
        kept = knapsack(options, share * total)
        saved = sum(options[unit][width][0] for unit, width in kept.items())
        worth = sum(options[unit][width][1] for unit, width in kept.items())
        every = itertools.product(*(of.values() for of in options.values()))
        enough = [pick for pick in every if sum(s for s, _ in pick) >= share * total]
        best = min(sum(w for _, w in pick) for pick in enough)
        assert saved >= 0.997 * share * total  # savings are counted in bins
        assert worth <= 1.001 * best


@pytest.mark.slow
def test_half_of_resnet18_is_what_was_published():
    net = ResNet18().eval()
    images = torch.randn(1, 3, 64, 64)
    history = History()
    for unit in units.find(net, images).units:
        history = history.then(Step(unit.root, tuple(range(unit.width // 2))))
    half = history.replay(net, images)
    macs, params = tp.utils.count_ops_and_params(half, torch.randn(1, 3, 224, 224))
    assert macs == 487202536
    assert params == 3055880
