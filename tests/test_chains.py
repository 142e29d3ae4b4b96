"""hw_profiles.chains: random calibration networks."""

from collections import Counter

import numpy as np
import pytest

from hw_profiles import chains, op
from hw_profiles.graph import onnx_graph
from hw_profiles.runtimes import onnxruntime, random_feeds


def sample(seed=0, n=60):
    return chains.sample(np.random.default_rng(seed), n)


def test_the_same_seed_draws_the_same_networks():
    assert sample(1, 8) == sample(1, 8) != sample(2, 8)


def test_costs_lie_in_the_range_asked_for():
    drawn = chains.sample(np.random.default_rng(0), 20, macs=(1e6, 2e6))
    assert all(1e6 <= op.macs(ops) <= 2e6 for ops in drawn)


def test_they_hold_every_kind_of_operator_in_many_sizes():
    every = [one for ops in sample(n=150) for one in ops]
    assert {one.kind for one in every} >= set(op.KINDS) - {"act", "upsample", *op.TOKENS}
    assert {one.act for one in every} >= {"", "relu", "hswish", "silu", "hsigmoid"}
    assert any(one.kind == "conv" and 1 < one.groups < one.c_in for one in every)
    assert {one.kernel for one in every if one.kind == "dwconv"} >= {3, 5}
    odd = Counter(one.c_out % 8 > 0 for one in every if one.kind == "conv")
    assert odd[True] > 0.05 * odd.total()
    assert len(set(every)) > 1000


@pytest.mark.parametrize("seed", range(3))
def test_they_run(seed):
    for ops in sample(seed, 6):
        session = onnxruntime.load(onnx_graph(ops).SerializeToString())
        outputs = onnxruntime.run(session, random_feeds(session, np.random.default_rng(0)))
        assert np.isfinite(outputs[-1]).all()
        assert outputs[-1].shape == (1, ops[-1].c_out)
