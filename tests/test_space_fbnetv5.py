"""The backbone that several tasks mask: gates, heads, and what one task's network costs."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from test_graph_blocks import lively, with_weights_of
from torch.utils.flop_counter import FlopCounterMode

from hw_profiles import op
from hw_profiles.runtimes import onnxruntime
from nas.elastic import extract
from nas.errors import NasctlError
from nas.heads import Answer
from nas.search_spaces import fbnetv5
from nas.search_spaces.fbnetv5 import GATES, Space

TASKS = {"class": Answer("vector", 3), "box": Answer("box"), "seg": Answer("map", 5)}
every_task = pytest.mark.parametrize("task", TASKS)


@pytest.fixture(scope="module")
def space():
    return Space(size=24, across=32, width=0.25, tasks=TASKS)


def genes(space, *parts):
    """What keeps the gates whose names hold one of these."""
    return np.array([int(any(part in g.name for part in parts)) for g in space.genes])


def images(space, n=2, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, 3, space.resolution, space.across, generator=generator)


def test_sweeps_go_down_and_up_and_fuse_what_they_come_from():
    assert [(gate.path, gate.source) for gate in GATES if gate.name.startswith("sweep1")] == [
        (3, 4),
        (2, 3),
        (2, 3),
        (1, 2),
        (1, 2),
        (0, 1),
        (0, 1),
    ]
    assert {gate.source - gate.path for gate in GATES if gate.sweep == 0} == {-1}
    assert len(GATES) == 4 * (4 + 3)


@pytest.mark.parametrize(("side", "strides"), [(224, 4), (96, 4), (95, 2), (24, 2), (23, 1)])
def test_strides_fit_the_size_of_the_images(side, strides):
    space = Space(size=side)
    assert space.maps.stride == strides
    assert space.resolution % fbnetv5.multiple(side) == 0 and space.resolution >= side


@every_task
def test_a_tasks_network_costs_what_torch_counts(space, task):
    own = space.only(task)
    for row in (own.smallest, own.largest, *own.sample(np.random.default_rng(0), 3)):
        arch = own.decode(row)
        net, ops = own.build(arch).eval(), own.ops(arch)
        assert op.params(ops) == sum(p.numel() for p in net.parameters())
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            net(images(own, 1))
        assert 2 * op.macs(ops) == counter.get_total_flops()


@every_task
def test_a_tasks_network_is_cut_from_the_one_of_all_tasks(space, task):
    torch.manual_seed(0)
    whole, own = lively(space.supernet(), 0), space.only(task)
    for row in own.sample(np.random.default_rng(1), 3):
        arch = own.decode(row)
        small = extract(whole, own.build(arch))
        x = images(own)
        torch.testing.assert_close(small(x), whole(x, arch)[task], rtol=0, atol=1e-4)


@every_task
def test_the_timed_graph_computes_what_the_network_computes(space, task):
    own = space.only(task)
    arch = own.decode(own.sample(np.random.default_rng(2), 1)[0])
    net, x = lively(own.build(arch), 1), images(own, 1)
    model, expected = with_weights_of(net, own.ops(arch), x)
    *_, found = onnxruntime.run(onnxruntime.load(model), {"input": x.numpy()})
    np.testing.assert_allclose(found, expected, atol=1e-4 * np.abs(expected).max())


def test_the_backbone_runs_once_however_many_heads_there_are(space, monkeypatch):
    calls = []
    real = fbnetv5.FBNetV5.backbone
    monkeypatch.setattr(
        fbnetv5.FBNetV5, "backbone", lambda self, *a: calls.append(1) or real(self, *a)
    )
    answers = space.supernet()(images(space))
    assert len(calls) == 1
    shapes = {name: tuple(answer.shape) for name, answer in answers.items()}
    assert shapes == {
        "class": (2, 3),
        "box": (2, 4),
        "seg": (2, 5, space.resolution, space.across),
    }


def test_tasks_share_genes_and_differ_in_cost(space):
    macs = {}
    for task in TASKS:
        own = space.only(task)
        assert own.genes == space.genes and own.tasks == {task: TASKS[task]}
        macs[task] = own.costs(own.largest[None])[0, 0]
    assert len(set(macs.values())) == 3
    assert max(macs.values()) < space.costs(space.largest[None])[0, 0] < sum(macs.values())


def test_parts_of_the_mask_are_known_networks(space):
    """A pyramid never looks up, and without fusions paths do not hear of each other."""
    net = lively(space.supernet(), 3)
    x = images(space, 1)

    def moved(*parts):
        """Which paths change when the finest path's first block is left out."""
        kept = genes(space, *parts)
        without = kept.copy()
        without[space.index["sweep0.path0.block"]] = 0
        each = [net.backbone(x, space.decode(row)) for row in (kept, without)]
        return [not torch.equal(a, b) for a, b in zip(*each, strict=True)]

    assert moved("block") == [True, False, False, False]
    assert moved("sweep0") == [True, True, True, True]
    assert moved("block", "sweep2.path2.fuse") == [True, False, False, False]
    assert moved("block", "sweep0.path1.fuse") == [True, True, False, False]


def test_an_unknown_task_is_told(space):
    with pytest.raises(NasctlError, match="unknown task 'boxes'.*Did you mean box"):
        space.only("boxes")
