"""The timed graph of a transformer computes what the network computes, weights copied over."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from onnx import numpy_helper
from torch import nn

from hw_profiles.graph import onnx_graph
from hw_profiles.runtimes import onnxruntime
from nas import space
from nas.elastic import Linear
from nas.search_spaces import bert
from nas.transformer import LayerNorm, Project


def load(name):
    if name == "bert":
        return bert.Space(size=12, frame=bert.Frame(vocabulary=40, positions=16))
    return space.load(name, channels=1, size=16)


def tensors_in_order(net):
    """Weights in the order in which a forward pass uses them, as the graph holds them."""
    found = []

    def note(layer, *_):
        weight = layer.weight if isinstance(layer, (nn.Conv2d, Linear, LayerNorm)) else None
        found.append(layer.weight.t() if weight is None else weight)
        found.append(layer.bias)

    kinds = (Project, LayerNorm, nn.Conv2d, Linear)
    hooks = [m.register_forward_hook(note) for m in net.modules() if isinstance(m, kinds)]
    return found, hooks


@pytest.mark.parametrize("name", ["bert", "vit"])
@pytest.mark.parametrize("which", ["smallest", "largest"])
def test_the_timed_graph_computes_what_the_network_computes(name, which):
    found = load(name)
    arch = found.decode(getattr(found, which))
    torch.manual_seed(0)
    net = found.build(arch).eval()
    for parameter in net.parameters():
        parameter.data.normal_(0, 0.2)
    if name == "bert":
        x = torch.randint(1, 40, (1, 12))
        table = torch.cat([net.words.weight, net.places.weight])
        places = net.places.weight[:12]
    else:
        x = torch.randn(1, 1, 16, 16)
        table, places = None, net.places
    weights, hooks = tensors_in_order(net)
    with torch.no_grad():
        expected = net(x).numpy()
    if name == "vit":  # the patches are no module's forward: they are sliced
        weights[:0] = [net.patch.weight, net.patch.bias]
    assert all(hook.remove() is None for hook in hooks)
    if table is not None:
        weights.insert(0, table)
    model = onnx_graph(found.ops(arch))
    for tensor in model.graph.initializer:
        part = tensor.name.rsplit(".")[-1]
        if part in ("weight", "bias"):
            values = weights.pop(0)
        elif part == "places":
            values = places[None]
        else:
            continue
        array = numpy_helper.from_array(values.detach().contiguous().numpy(), tensor.name)
        assert list(array.dims) == list(tensor.dims), tensor.name
        tensor.CopyFrom(array)
    assert not weights  # the op list has every layer that ran
    (got,) = onnxruntime.run(onnxruntime.load(model.SerializeToString()), {"input": x.numpy()})
    assert expected.std() > 1e-2
    np.testing.assert_allclose(got, expected, atol=1e-4 * np.abs(expected).max())
