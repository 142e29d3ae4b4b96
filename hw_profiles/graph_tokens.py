"""The operators of sequences as ONNX nodes, on tensors (batch, tokens, channels): part of `graph`.

Opset 18 has no attention and no GELU of its own: these are the nodes that torch's exporter writes,
for the runtime to fuse.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np

from hw_profiles.op import Op


class Graph(Protocol):
    def node(self, kind: str, reads: Sequence[str], out: str, **attributes: Any) -> str: ...

    def constant(self, name: str, values: np.ndarray) -> str: ...

    def random(self, name: str, shape: Sequence[int], std: float) -> str: ...


def emit(graph: Graph, op: Op, reads: Sequence[str], out: str) -> bool:
    """Append the nodes of one op that reads or writes tokens; whether it writes tokens."""
    if op.kind == "embed":
        table = graph.random(f"{out}.weight", (op.c_in, op.c_out), 1.0)
        places = graph.random(f"{out}.places", (1, op.h, op.c_out), 1.0)
        graph.node("Add", [graph.node("Gather", [table, reads[0]], f"{out}.words"), places], out)
    elif op.kind == "position":
        places = graph.random(f"{out}.places", (1, op.h, op.c_out), 1.0)
        graph.node("Add", [_sequence(graph, op, reads[0], out), places], out)
    elif op.kind == "layernorm":
        parts = [graph.constant(f"{out}.weight", np.ones(op.c_out, np.float32))]
        parts.append(graph.random(f"{out}.bias", (op.c_out,), 0.1))
        graph.node("LayerNormalization", [reads[0], *parts], out, axis=-1)
    elif op.kind == "linear":
        weight = graph.random(f"{out}.weight", (op.c_in, op.c_out), math.sqrt(1 / op.c_in))
        bias = graph.random(f"{out}.bias", (op.c_out,), 0.1)
        graph.node("Add", [graph.node("MatMul", [reads[0], weight], f"{out}.product"), bias], out)
    elif op.kind == "attention":
        _attention(graph, op, reads, out)
    elif op.kind == "add":
        graph.node("Add", reads, out)
    elif op.kind == "gap":
        axes = graph.constant(f"{out}.axes", np.array([1]))
        graph.node("ReduceMean", [reads[0], axes], out, keepdims=0)
    else:
        raise ValueError(f"{op.kind} does not read tokens")
    return op.kind != "gap"


def gelu(graph: Graph, x: str, out: str) -> None:
    """x (1 + erf(x / sqrt 2)) / 2."""
    root, one, half = (
        graph.constant(f"{out}.{name}", np.array(value, np.float32))
        for name, value in (("root", math.sqrt(2)), ("one", 1.0), ("half", 0.5))
    )
    share = graph.node("Erf", [graph.node("Div", [x, root], f"{out}.scaled")], f"{out}.erf")
    gate = graph.node("Add", [share, one], f"{out}.gate")
    graph.node("Mul", [graph.node("Mul", [x, gate], f"{out}.twice"), half], out)


def _sequence(graph: Graph, op: Op, x: str, out: str) -> str:
    """A map (batch, channels, h, w) as (batch, tokens, channels)."""
    shape = graph.constant(f"{out}.shape", np.array([0, op.c_in, op.h]))
    flat = graph.node("Reshape", [x, shape], f"{out}.flat")
    return graph.node("Transpose", [flat], f"{out}.sequence", perm=[0, 2, 1])


def _attention(graph: Graph, op: Op, reads: Sequence[str], out: str) -> None:
    size = op.c_out // op.groups
    split = graph.constant(f"{out}.split", np.array([0, op.h, op.groups, size]))
    heads = []
    for name, read in zip("qkv", reads, strict=True):
        apart = graph.node("Reshape", [read, split], f"{out}.{name}.split")
        perm = [0, 2, 3, 1] if name == "k" else [0, 2, 1, 3]
        heads.append(graph.node("Transpose", [apart], f"{out}.{name}.heads", perm=perm))
    scale = graph.constant(f"{out}.scale", np.array(math.sqrt(size), np.float32))
    scores = graph.node("MatMul", heads[:2], f"{out}.products")
    scores = graph.node("Div", [scores, scale], f"{out}.scores")
    shares = graph.node("Softmax", [scores], f"{out}.shares", axis=-1)
    mixed = graph.node("MatMul", [shares, heads[2]], f"{out}.mixed")
    rows = graph.node("Transpose", [mixed], f"{out}.rows", perm=[0, 2, 1, 3])
    whole = graph.constant(f"{out}.whole", np.array([0, op.h, op.c_out]))
    graph.node("Reshape", [rows, whole], out)
