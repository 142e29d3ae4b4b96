"""A smaller transformer from a teacher's weights: what a SuperLM begins with.

AutoDistil (arXiv 2201.12507, section 3.2) takes alternate layers and the leading corner of every
matrix. `ranked` is its control here: heads, middle channels and channels of the teacher are first
put in order of importance, so that the same corner holds what counts most, and `important_layers`
are those whose removal does most to the output. Any order is the same teacher (tested).
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from nas.elastic import leading
from nas.search_spaces.bert import Bert, kept
from nas.transformer import Attention


@torch.no_grad()
def inherit(net: Bert, teacher: Bert, layers: Sequence[int] | None = None) -> Bert:
    """Fill `net` with the leading slices of `teacher`; return it.

    `layers` says which of the teacher's layers its own are, in order; by default the alternate
    ones. Everything of `net` must fit inside the teacher; its head keeps what it has.
    """
    if layers is None:
        depth, of = len(net.arch.layers), len(teacher.arch.layers)
        layers = [teacher.arch.layers[at] for at in kept(depth, of)]
    source = teacher.state_dict()
    names = {str(n): str(m) for n, m in zip(net.arch.layers, layers, strict=True)}
    for name, tensor in net.state_dict().items():
        part, _, rest = name.partition(".")
        if part == "head":
            continue
        if part == "layers":
            number, _, rest = rest.partition(".")
            name = f"layers.{names[number]}.{rest}"
        tensor.copy_(leading(source[name], tensor.shape))
    return net


@torch.no_grad()
def important_layers(teacher: Bert, tokens: Tensor, depth: int) -> list[int]:
    """The `depth` layers of the teacher whose removal, one at a time, changes what it computes of
    the tokens [N, S] most; in their order."""
    layers = teacher.arch.layers
    whole = teacher.look(tokens)
    assert whole.mask is not None
    real, harm = whole.mask, []
    for number in layers:
        rest = replace(teacher.arch, layers=tuple(n for n in layers if n != number))
        without = teacher.look(tokens, rest).features[-1]
        harm.append(float((without - whole.features[-1])[real].square().sum()))
    chosen = sorted(range(len(layers)), key=lambda at: -harm[at])[:depth]
    return [layers[at] for at in sorted(chosen)]


@torch.no_grad()
def ranked(teacher: Bert) -> Bert:
    """A copy of the teacher, the same function, whose most important heads, middle channels and
    channels come first: by the norms of the weights that read them."""
    net = copy.deepcopy(teacher)
    for layer in net.stack():
        for middle in layer.mlp.middles():
            order = _descending(middle.reader.transpose(0, 1))
            for tensor, dim in middle.tensors:
                tensor.copy_(tensor.index_select(dim, order))
        _sort_heads(layer.attention)
    _sort_channels(net)
    return net


def _descending(rows: Tensor) -> Tensor:
    """Positions [N] of rows [N, ...], the largest norm first."""
    return rows.flatten(1).norm(dim=1).argsort(descending=True)


def _sort_heads(attention: Attention) -> None:
    size = attention.size
    importance = attention.output.weight.unflatten(1, (-1, size)).transpose(0, 1)
    order = _descending(importance)
    places = (order[:, None] * size + torch.arange(size)).flatten()
    for part in (attention.query, attention.key, attention.value):
        part.weight.copy_(part.weight[places])
        part.bias.copy_(part.bias[places])
    attention.output.weight.copy_(attention.output.weight[:, places])


def _sort_channels(net: Bert) -> None:
    """Residual sums tie the channels of all layers together: one order for all of them."""
    readers = [net.words.weight.t()]
    for layer in net.stack():
        attention = layer.attention
        for part in (attention.query, attention.key, attention.value, layer.mlp.expand):
            readers.append(part.weight.t())
    order = _descending(torch.cat(readers, 1))
    for name, tensor in net.state_dict().items():
        module, _, kind = name.rpartition(".")
        reads = module.endswith(("query", "key", "value", "expand"))
        if reads and kind == "bias":
            continue
        last = reads or module in ("words", "places", "head")
        if name != "head.bias":
            tensor.copy_(tensor.index_select(tensor.ndim - 1 if last else 0, order))
