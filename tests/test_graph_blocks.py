"""What is timed is what is deployed: a space's op list, as the ONNX graph that latency tables are
measured with, computes what the space's torch network computes, once it has that network's weights.
"""

from __future__ import annotations

from collections import defaultdict

import numpy as np
import pytest
import torch
from onnx import numpy_helper
from torch.overrides import TorchFunctionMode

from hw_profiles.graph import onnx_graph
from hw_profiles.op import INPUT
from hw_profiles.runtimes import _torch_graph, onnxruntime
from nas import space
from nas.search_spaces import fbnet

NETWORKS = 4


KINDS = {"avg_pool2d": "avgpool", "mean": "gap", "add": "add", "mul": "mul"}
KINDS["interpolate"] = "upsample"


def place(kind, shape, reads):
    """Where something stands in a network: what it is and where all that it reads stands."""
    return hash((kind, shape, tuple(sorted(reads))))


class Trace(TorchFunctionMode):
    """The layers of a forward pass by their place, whoever calls them, in the order in which they
    run: weight and bias with the norm that follows folded in; a norm that follows no layer is a
    depthwise one. Activations have no place of their own: an op carries its own."""

    def __init__(self):
        super().__init__()
        self.layers = defaultdict(list)
        self.normed = set()
        self.places = {}
        self.alive = []  # tensors are told apart by their ids

    def __torch_function__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.alive.append(out)
        reads = [self.places.get(id(a), 0) for a in args[:2] if isinstance(a, torch.Tensor)]
        name = func.__name__
        if name in ("conv2d", "linear"):
            found = place("layer", tuple(args[1].shape), reads[:1])
            self.layers[found].append([args[1], args[2] if len(args) > 2 else None])
        elif name in KINDS:
            found = place(KINDS[name], (), reads)
        elif name == "batch_norm":
            found = self.fold(id(args[0]), reads[0], args, kwargs)
            self.normed.add(id(out))
        elif name in ("relu", "hardswish", "hardsigmoid", "flatten"):
            found = reads[0]
        else:  # sizes and such
            return out
        self.places[id(out)] = found
        return out

    def fold(self, read, found, args, kwargs):
        x, mean, var = args
        scale = (kwargs["weight"] / torch.sqrt(var + kwargs["eps"]))[:, None, None, None]
        shift = kwargs["bias"] - mean * scale.flatten()
        if read in self.normed or not self.layers[found]:
            found = place("layer", (x.shape[1], 1, 1, 1), [found])
            self.layers[found].append([scale, shift])
        else:
            weight, _ = self.layers[found][-1]
            self.layers[found][-1] = [weight * scale, shift]
        return found


def lively(net, seed):
    """Nothing zero or one as after initialisation: a branch that adds nothing hides its faults."""
    generator = torch.Generator().manual_seed(seed)
    for norm in (m for m in net.modules() if isinstance(m, torch.nn.BatchNorm2d)):
        for tensor in (norm.weight.data, norm.running_var):
            tensor.uniform_(0.6, 1.4, generator=generator)
        for tensor in (norm.bias.data, norm.running_mean):
            tensor.uniform_(-0.3, 0.3, generator=generator)
    return net.eval().requires_grad_(False)


def with_weights_of(net, ops, x):
    """(the graph of `ops` with the weights of `net`, the output of `net`)."""
    with Trace() as trace:
        expected = net(x)
    model, places = onnx_graph(ops), {INPUT: 0}
    tensors = {tensor.name: tensor for tensor in model.graph.initializer}
    read = {at for op in ops for at in op.reads}
    for at, op in enumerate(ops):
        name = "output" if at == len(ops) - 1 else f"t{at}" if at in read else f"output_{at}"
        name += ".pre" if op.act and op.kind != "act" else ""
        reads = [places[read] for read in op.reads]
        if op.kind == "act" and op.act != "zero" and not op.norm:
            places[at] = reads[0]
            continue
        if f"{name}.weight" not in tensors:
            places[at] = place("mul" if op.act == "zero" else op.kind, (), reads)
            continue
        places[at] = place("layer", tuple(tensors[f"{name}.weight"].dims), reads)
        for part, values in zip(("weight", "bias"), trace.layers[places[at]].pop(0), strict=True):
            if values is not None:
                array = numpy_helper.from_array(values.numpy(), f"{name}.{part}")
                tensors[array.name].CopyFrom(array)
    assert not any(trace.layers.values())  # the op list has every layer that ran
    return model.SerializeToString(), expected.numpy()


def unshuffled(found, genes):
    """In op lists a concatenation of one tensor stands in for FBNet's channel shuffle: it moves as
    much and computes something else."""
    if not isinstance(found, fbnet.Space):
        return genes
    return found.from_names([op.removesuffix("_g2") for op in found.decode(genes).ops])


SEQUENCES = ("bert", "vit")  # theirs are in test_graph_tokens.py


@pytest.mark.parametrize("name", [name for name in space.names() if name not in SEQUENCES])
def test_the_timed_graph_computes_what_the_network_computes(name):
    found = space.load(name, size=32)
    rows = [found.smallest, *found.sample(np.random.default_rng(3), NETWORKS - 1)]
    for seed, genes in enumerate(rows):
        arch = found.decode(unshuffled(found, genes))
        generator = torch.Generator().manual_seed(seed)
        x = torch.randn(1, 3, arch.resolution, arch.resolution, generator=generator)
        net = lively(found.build(arch), seed)
        model, expected = with_weights_of(net, found.ops(arch), x)
        assert expected.std() > 1e-3
        limit = 1e-4 * np.abs(expected).max()
        *_, timed = onnxruntime.run(onnxruntime.load(model), {"input": x.numpy()})
        np.testing.assert_allclose(timed, expected, atol=limit)
        *_, in_torch = _torch_graph.read(model, None)(x)
        np.testing.assert_allclose(in_torch.numpy(), expected, atol=limit)
