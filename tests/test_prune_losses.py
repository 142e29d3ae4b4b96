"""Losses of networks being pruned, activations that are reused, and costs."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import nn

from compress import losses
from compress.cost import Macs, Params
from compress.graph import LAYERS
from compress.objective import Objective
from compress.reuse import Prefix
from tests.graphs import Detector, chain, settled
from tests.prunable import job

# ---- losses and reuse ----------------------------------------------------------------------------


def test_a_measurement_ends_when_a_limit_is_surely_exceeded():
    given, calls = job(), []
    counted = [
        Objective(o.name, lambda out, y, o=o: (calls.append(o.name), o.loss(out, y))[1])
        for o in given.objectives
    ]
    whole = losses.measure(given.net, counted, given.batches).values
    assert len(calls) == 6 and not losses.measure(given.net, counted, given.batches, whole).over
    calls.clear()
    tight = {**whole, "map": whole["map"] * 0.2}
    assert losses.measure(given.net, counted, given.batches, tight).over == "map"
    assert len(calls) == 2  # the first batch alone is more than a fifth of the sum
    calls.clear()
    unknown = [replace(o, least=-math.inf) for o in counted]
    assert losses.measure(given.net, unknown, given.batches, tight).over == "map"
    assert len(calls) == 6


def test_batches_count_by_their_samples():
    given = job()
    inputs, targets = given.batches[0]
    parts = [(inputs[:3], {k: v[:3] for k, v in targets.items()})]
    parts += [(inputs[3:], {k: v[3:] for k, v in targets.items()})]
    one = losses.measure(given.net, given.objectives, given.batches[:1]).values
    two = losses.measure(given.net, given.objectives, parts).values
    assert two == pytest.approx(one, rel=1e-5)


@pytest.mark.parametrize("changed", ["blocks.1.a.0", "blocks.0.b.0", "stem.0", "map"])
def test_reused_activations_change_nothing(changed):
    """The network's activations work in place, so what is kept could be overwritten."""
    given = job("residual", "plain")
    run, prefix = [], Prefix([changed])
    nets = [chain("residual", "plain") for _ in range(3)]
    for number, net in enumerate(nets):
        module = net.get_submodule(changed)
        module.weight.data.mul_(1 + number)
        bare = losses.measure(net, given.objectives, given.batches)
        counts = _counted(net)
        with prefix.on(net):
            assert losses.measure(net, given.objectives, given.batches) == bare
        run.append(sum(counts.values()))
        assert losses.measure(net, given.objectives, given.batches) == bare
    assert run[1] == run[2]
    assert (run[1] < run[0]) == (changed != "stem.0")


def _counted(net):
    counts = {}
    for name, module in net.named_modules():
        if isinstance(module, nn.Conv2d):
            run = module._conv_forward

            def counting(*args, name=name, run=run):
                counts[name] = counts.get(name, 0) + 1
                return run(*args)

            module._conv_forward = counting
    return counts


def test_nothing_is_reused_of_weights_used_behind_the_modules_back():
    class Functional(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x):
            return self.b(x @ self.a.weight.T)

    objective = Objective("y", lambda out, y: (out - y).square().mean())
    batches = [(torch.ones(2, 4), torch.zeros(2, 4))]
    prefix, found = Prefix(["a"]), []
    for scale in (1, 2):
        torch.manual_seed(0)
        net = Functional()
        net.a.weight.data.mul_(scale)
        with prefix.on(net):
            found.append(losses.measure(net, [objective], batches).values["y"])
    assert found[0] != found[1]


# ---- costs ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("net", [chain("grouped", "depthwise", "gated"), settled(Detector(c=8))])
def test_multiply_adds_are_what_the_layers_shapes_say(net):
    counted = 0

    def count(module, inputs, output):
        nonlocal counted
        positions = output.numel() / output.shape[-1 if isinstance(module, nn.Linear) else 1]
        counted += module.weight.numel() * positions

    hooks = [m.register_forward_hook(count) for m in net.modules() if isinstance(m, LAYERS)]
    images = torch.randn(1, 3, 32, 32)
    net(images)
    for hook in hooks:
        hook.remove()
    assert Macs().of(net, images) == counted
    assert Params().of(net, images) == sum(p.numel() for p in net.parameters())


def test_a_loss_that_is_no_number_is_over_every_limit():
    given = job("plain")
    broken = Objective("a", lambda out, y: out["map"].sum() * math.nan)
    assert losses.measure(given.net, [broken], given.batches, {"a": 1e9}).over == "a"
