"""Statistics of batch norms are taken anew before a pruned network is judged (compress.norms)."""

from __future__ import annotations

import contextlib
import copy
from dataclasses import replace

import pytest
import torch
from torch import nn

from compress import baselines, losses, norms
from compress.history import History
from compress.job import Settings, finish
from compress.prune import one_round, prune
from compress.reuse import Prefix
from nas.elastic import recalibrate
from nas.errors import UsageError
from tests.graphs import chain, settled
from tests.prunable import job

SETTINGS = Settings(bound=3.0, divisor=4, grid=(0.25, 0.5, 0.75))


def drawn(n=40, seed=1):
    return torch.randn(n, 3, 8, 8, generator=torch.Generator().manual_seed(seed))


def recorded(monkeypatch, given, settings):
    """All that was measured of trials, in order, and the result."""
    found = []
    measure = losses.measure

    def recording(*arguments):
        found.append(measure(*arguments))
        return found[-1]

    with monkeypatch.context() as patch:
        patch.setattr(losses, "measure", recording)
        result = finish(one_round(given, settings))
    return found, result


@pytest.mark.parametrize("variant", [{}, {"one_shot": True}])
def test_a_trial_that_reuses_activations_equals_a_whole_one(monkeypatch, variant):
    given = replace(job("residual", "plain"), calibration=drawn())
    settings = replace(SETTINGS, **variant)
    forward = nn.BatchNorm2d.forward

    def run():
        calls = []

        def counting(*arguments):
            calls.append(arguments)
            return forward(*arguments)

        with monkeypatch.context() as patch:
            patch.setattr(nn.BatchNorm2d, "forward", counting)
            return recorded(patch, given, settings), len(calls)

    (trials, result), few = run()
    monkeypatch.setattr(Prefix, "on", lambda *_: contextlib.nullcontext())
    (others, whole), many = run()
    assert len(trials) > 10 and trials == others  # to the last bit
    assert few < many
    for name, tensor in whole.net.state_dict().items():
        assert torch.equal(tensor, result.net.state_dict()[name])


def test_what_is_judged_and_kept_has_statistics_of_its_own():
    """Other ones than the network came with, by another way to them."""
    given = job("plain")
    given = replace(given, net=settled(copy.deepcopy(given.net)), calibration=drawn())

    def judged(net):
        own = recalibrate(copy.deepcopy(net), [given.calibration])
        return losses.measure(own, given.objectives, given.batches).values

    found = finish(one_round(given, SETTINGS))
    again = found.history.replay(given.net, given.example_inputs)
    assert found.losses_before == pytest.approx(judged(given.net), rel=1e-5)
    assert found.losses == pytest.approx(judged(again), rel=1e-5)
    kept = losses.measure(found.net, given.objectives, given.batches).values
    assert kept == dict(found.losses)
    rival = finish(baselines.load("uniform")(given, SETTINGS))
    again = rival.history.replay(given.net, given.example_inputs)
    assert rival.losses_before == pytest.approx(found.losses_before, rel=1e-5)
    assert rival.losses == pytest.approx(judged(again), rel=1e-5)
    kept = losses.measure(rival.net, given.objectives, given.batches).values
    assert kept == dict(rival.losses)


@pytest.mark.parametrize("method", ["pagcp", "uniform"])
def test_stale_statistics_are_the_whole_networks(method):
    given = job("plain")
    given = replace(given, net=settled(copy.deepcopy(given.net)), calibration=drawn())
    run = one_round if method == "pagcp" else baselines.load(method)
    found = finish(run(given, replace(SETTINGS, bound=50.0, stale=True)))
    bare = found.history.replay(given.net, given.example_inputs)
    assert found.history.steps
    for net, said in ((given.net, found.losses_before), (bare, found.losses)):
        assert losses.measure(net, given.objectives, given.batches).values == dict(said)
    for name, tensor in bare.state_dict().items():
        assert torch.equal(tensor, found.net.state_dict()[name])


def test_a_record_of_stale_statistics_is_not_taken_for_one_of_renewed(tmp_path):
    given = replace(job("plain"), calibration=drawn())
    path = tmp_path / "record.jsonl"
    stale = finish(one_round(given, replace(SETTINGS, stale=True), path))
    renewed = finish(one_round(given, SETTINGS, path))
    assert renewed.losses_before != stale.losses_before
    assert renewed.rows == finish(one_round(given, SETTINGS)).rows
    assert given.inputs() != replace(given, calibration=drawn(seed=2)).inputs()


def test_rounds_begin_with_statistics_of_what_was_trained():
    given = replace(job("plain", share=0.5), calibration=drawn())

    def recover(net, number):
        return settled(net, seed=number)  # statistics as a training might leave them

    found = finish(prune(given, replace(SETTINGS, bound=1e3), rounds=2, recover=recover))
    own = recalibrate(copy.deepcopy(found.net), [given.calibration])
    for name, tensor in own.state_dict().items():
        if "running" in name:
            assert torch.allclose(tensor, found.net.state_dict()[name], atol=1e-6)


class Dropping(nn.Module):
    def __init__(self):
        super().__init__()
        self.net, self.dropout = chain("plain"), nn.Dropout(0.5)

    def forward(self, x):
        return self.net(self.dropout(x))


def test_only_statistics_change_and_nothing_is_random():
    net = settled(Dropping())
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    again = copy.deepcopy(net)
    for one in (net, again):
        norms.renew(one, drawn())
    for name, tensor in net.state_dict().items():
        assert torch.equal(tensor, again.state_dict()[name])
        assert torch.equal(tensor, before[name]) != ("running" in name)
    assert not any(module.training for module in net.modules())
    assert all(norm.momentum == 0.1 for norm in norms.of(net))


def test_a_network_without_batch_norms_is_not_run_for_them(monkeypatch):
    given = job("plain")
    bare = nn.Sequential(nn.Conv2d(3, 8, 3), nn.GroupNorm(2, 8), nn.BatchNorm2d(8, affine=False))
    bare[2] = nn.BatchNorm2d(8, track_running_stats=False)

    def never(*_):
        raise AssertionError

    monkeypatch.setattr(norms, "forward", never)
    alone = replace(given, net=bare.eval(), calibration=drawn(1))  # one image is enough for it
    assert alone.renewed(bare) is bare
    assert alone.inputs() == replace(alone, calibration=None).inputs()


def test_without_training_images_those_that_steer_are_used():
    given = job("plain", n=24)
    assert torch.equal(given.images, torch.cat([x for x, _ in given.batches]))
    many = replace(given, batches=list(given.batches) * 10)
    assert len(many.images) == norms.IMAGES
    with pytest.raises(UsageError, match="calibration: one image: batch norms have no statistics"):
        replace(given, calibration=drawn(1))


def test_the_history_and_the_images_give_the_network_bit_by_bit():
    given = replace(job("residual", "plain"), calibration=drawn())
    found = finish(one_round(given, SETTINGS))
    again = History.from_json(found.history.to_json()).replay(given.net, given.example_inputs)
    for name, tensor in given.renewed(again).state_dict().items():
        assert torch.equal(tensor, found.net.state_dict()[name])
