"""Every kind of operator is known wherever kinds are told apart: a new one fails here until it is.

(`chains` draws no upsampling, and files of other tools name operators by their own words.)
"""

from __future__ import annotations

import numpy as np
import pytest
import torch

from hw_profiles import device, families, latency
from hw_profiles.graph import onnx_graph
from hw_profiles.models import calibrate, structure
from hw_profiles.op import KINDS, Op, Tape, Wire
from hw_profiles.runtimes import _torch_graph, onnxruntime, random_feeds
from nas.errors import NasctlError

CALLS = {
    "conv": lambda t, x: t.conv(x, 6, kernel=3, bias=True),
    "dwconv": lambda t, x: t.conv(x, x.c, kernel=3, groups=x.c, bias=True),
    "linear": lambda t, x: t.linear(t.gap(x), 6),
    "avgpool": lambda t, x: t.avgpool(x),
    "maxpool": lambda t, x: t.maxpool(x, kernel=3, stride=1),
    "gap": lambda t, x: t.gap(x),
    "upsample": lambda t, x: t.upsample(x, 2),
    "add": lambda t, x: t.add(x, t.conv(x, x.c)),
    "mul": lambda t, x: t.mul(x, t.gap(x)),
    "concat": lambda t, x: t.concat(x, x),
    "act": lambda t, x: t.act(x, "relu"),
    "embed": lambda t, _: t.project(t.embed(Wire(t.input.at, 1, 8, 1), 20, 6), 4),
    "position": lambda t, x: t.position(x),
    "layernorm": lambda t, x: t.layernorm(t.position(x)),
    "attention": lambda t, x: t.attention(*(t.position(x) for _ in "qkv"), 2),
}
every_kind = pytest.mark.parametrize("kind", KINDS)


def network(kind):
    tape = Tape(3, 8)
    CALLS[kind](tape, tape.input if kind == "embed" else tape.conv(tape.input, 4, kernel=3))
    assert kind in {op.kind for op in tape.ops}
    return tape.ops


@every_kind
def test_it_has_a_family_with_terms_and_a_stand_in(kind):
    op = next(op for op in network(kind) if op.kind == kind)
    for tile in (0, 8):
        for share in families.shares(op, 4, tile):
            assert share.family in families.FAMILIES and share.family in calibrate.STAND_INS
    assert latency.table(device.load("jetson-tx2")).estimate(network(kind), "?").value_ms > 0


@every_kind
def test_it_is_described_by_its_role(kind):
    ops = network(kind)
    more = structure.describe([ops, [*ops, *ops]])
    assert more[1].sum() > more[0].sum() > 0


@every_kind
def test_its_graph_runs_and_torch_reads_the_same_file(kind):
    ops = network(kind)
    model = onnx_graph(ops, batch=2).SerializeToString()
    session = onnxruntime.load(model)
    feeds = random_feeds(session, np.random.default_rng(0))
    *_, found = onnxruntime.run(session, feeds)
    last = ops[-1]
    assert found.size == 2 * last.elements_out
    net = _torch_graph.read(model, None)
    *_, in_torch = net(*_torch_graph.example(net, feeds, "cpu"))
    np.testing.assert_allclose(in_torch.numpy(), found, rtol=1e-4, atol=1e-5)
    assert torch.isfinite(in_torch).all()


def test_a_kind_that_nobody_knows_is_told():
    for known in (families.shares, lambda op, *_: structure.describe([[op]])):
        with pytest.raises(NasctlError, match="operator 'swirl'"):
            known(Op("swirl", 4, 4, 8, 8), 4)
