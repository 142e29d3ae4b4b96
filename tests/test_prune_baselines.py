from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch
import torch_pruning as tp

from compress import baselines, units
from compress.baselines.halp import knapsack
from compress.history import History, Step
from compress.job import Settings, finish
from compress.reach import by_threshold
from compress.units import Unit
from nas.errors import BudgetInfeasible, UsageError
from nas.outputs import tensors
from tests.graphs import ResNet18
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
    again = found.history.replay(given.net, given.example_inputs)
    assert all(torch.equal(t, again.state_dict()[n]) for n, t in found.net.state_dict().items())
    shapes = [
        [t.shape for t in tensors(net(given.example_inputs))] for net in (found.net, given.net)
    ]
    assert shapes[0] == shapes[1]
    assert all(row.kept % 4 == 0 for row in found.rows)


def test_methods_differ(results):
    histories = {name: found.history.to_json() for name, found in results[1].items()}
    assert len(set(histories.values())) >= 5


def test_random_follows_its_seed(results):
    given, found = results
    other = finish(baselines.load("random")(given, replace(SETTINGS, seed=1)))
    assert other.history != found["random"].history
    assert finish(baselines.load("random")(given, SETTINGS)).history == found["random"].history


def test_a_target_out_of_reach_says_what_is_in_reach():
    with pytest.raises(BudgetInfeasible, match="MACs is the least that this method comes to"):
        finish(baselines.load("uniform")(job("plain", share=0.001), SETTINGS))


def test_scopes_share_out_what_goes():
    wide, narrow = Unit("wide", 8, 1, ()), Unit("narrow", 4, 1, ())
    scores = {wide: torch.arange(8.0), narrow: torch.arange(4.0) + 100}
    settings = Settings(divisor=1)
    alone = by_threshold(scores, lambda unit: unit.root, settings)
    together = by_threshold(scores, lambda unit: "all", settings)
    assert alone(0.5) == {wide: 4, narrow: 2}
    assert together(0.5) == {wide: 2, narrow: 4}
    assert alone(0.0) == together(0.0) == {wide: 8, narrow: 4}


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
