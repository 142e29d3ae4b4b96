"""A runnable ONNX network from an op list, with random weights: what a latency table times.

Written with `onnx.helper` because a trip through torch's exporter costs seconds per network and
this costs milliseconds. The graph is the deployed form: batch norms are folded (a bias instead),
activations are nodes of their own for the runtime to fuse. Values are meaningless, costs are not.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from hw_profiles import graph_tokens
from hw_profiles.op import INPUT, KINDS, TOKENS, Op
from nas.errors import unknown

ACTS = ("relu", "hswish", "hsigmoid", "silu", "gelu")


def onnx_graph(
    ops: Sequence[Op], *, seed: int = 0, opset: int = 18, batch: int | None = 1
) -> onnx.ModelProto:
    """The network that `ops` describes; `batch=None` leaves the batch dimension free.

    Its input is "input" (batch, channels, height, width), or token numbers (batch, tokens). The
    last op is "output"; any other op that nobody reads becomes "output_<position>", or the runtime
    would drop it as dead code and its cost with it.
    """
    rows: int | str = "batch" if batch is None else batch
    size = _input_shape(ops)
    kind = TensorProto.INT64 if len(size) == 1 else TensorProto.FLOAT
    graph = _Graph(np.random.default_rng(seed))
    wires = {INPUT: _Wire("input", size[0], flat=False)}
    outputs = []
    read = {at for op in ops for at in op.reads}
    for at, op in enumerate(ops):
        name = "output" if at == len(ops) - 1 else f"t{at}" if at in read else f"output_{at}"
        wire = wires[at] = _emit(graph, op, [wires[source] for source in op.reads], name)
        if name.startswith("output"):
            sizes = (rows, *_sizes(op, wire))
            outputs.append(helper.make_tensor_value_info(name, TensorProto.FLOAT, sizes))
    inputs = [helper.make_tensor_value_info("input", kind, (rows, *size))]
    imports = [helper.make_opsetid("", opset)]
    model = helper.make_model(
        helper.make_graph(graph.nodes, "ops", inputs, outputs, graph.weights),
        opset_imports=imports,
        # the library's newest file version runs ahead of what released runtimes read
        ir_version=helper.find_min_ir_version_for(imports),
        producer_name="nasctl",
    )
    onnx.checker.check_model(model)
    return model


@dataclass(frozen=True, slots=True)
class _Wire:
    name: str
    channels: int
    flat: bool  # (batch, channels), what a linear layer writes, rather than a map
    tokens: bool = False  # (batch, tokens, channels)


@dataclass(slots=True)
class _Graph:
    rng: np.random.Generator
    nodes: list[onnx.NodeProto] = field(default_factory=list)
    weights: list[TensorProto] = field(default_factory=list)

    def node(self, kind: str, reads: Sequence[str], out: str, **attributes: Any) -> str:
        self.nodes.append(helper.make_node(kind, reads, [out], name=out, **attributes))
        return out

    def constant(self, name: str, values: np.ndarray) -> str:
        self.weights.append(numpy_helper.from_array(values, name))
        return name

    def random(self, name: str, shape: Sequence[int], std: float) -> str:
        return self.constant(name, (self.rng.standard_normal(shape) * std).astype(np.float32))


def _sizes(op: Op, wire: _Wire) -> tuple[int, ...]:
    """Of an op's result, without the batch."""
    if wire.tokens:
        return op.h, op.c_out
    return (op.c_out,) if wire.flat else (op.c_out, op.h_out, op.w_out)


def _input_shape(ops: Sequence[Op]) -> tuple[int, ...]:
    if ops[0].kind == "embed":
        return (ops[0].h,)
    for op in ops:
        if INPUT in op.reads and op.kind != "concat":  # a concat's channels are a sum
            return op.c_in, op.h, op.w
    raise ValueError("no op but a concat reads the network's input, so its size is unknown")


def _emit(graph: _Graph, op: Op, reads: Sequence[_Wire], out: str) -> _Wire:
    """Append the nodes of one op; the tensor called `out` is its result."""
    if op.kind not in KINDS:
        raise unknown("operator", op.kind, KINDS)
    if op.kind in ("add", "mul") and len(reads) != 2:
        raise ValueError(f"{op.kind} reads two tensors, not {len(reads)}")
    flat = all(wire.flat for wire in reads)
    before = f"{out}.pre" if op.act and op.kind != "act" else out
    if op.kind in TOKENS or any(wire.tokens for wire in reads):
        tokens = graph_tokens.emit(graph, op, [wire.name for wire in reads], before)
        if before != out:
            _activate(graph, op.act, before, out)
        return _Wire(out, op.c_out, flat=not tokens, tokens=tokens)
    if op.kind == "linear":
        flat = True
        _linear(graph, op, reads[0], before)
    elif op.kind in ("add", "mul", "concat", "act"):
        names = [wire.name if flat else _as_map(graph, wire, out) for wire in reads]
        _join(graph, op, names, before)
    else:
        flat = False
        _spatial(graph, op, _as_map(graph, reads[0], out), before)
    if before != out:
        _activate(graph, op.act, before, out)
    return _Wire(out, op.c_out, flat)


def _as_map(graph: _Graph, wire: _Wire, out: str) -> str:
    """A vector as channels x 1 x 1: what a squeeze-excite gate of linear layers needs."""
    if not wire.flat:
        return wire.name
    shape = graph.constant(f"{out}.{wire.name}.shape", np.array([-1, wire.channels, 1, 1]))
    return graph.node("Reshape", [wire.name, shape], f"{out}.{wire.name}.map")


def _linear(graph: _Graph, op: Op, read: _Wire, out: str) -> None:
    x = read.name if read.flat else graph.node("Flatten", [read.name], f"{out}.flat", axis=1)
    graph.node("Gemm", [x, *_weights(graph, op, (op.c_out, op.c_in), out)], out, transB=1)


def _spatial(graph: _Graph, op: Op, x: str, out: str) -> None:
    if op.kind == "gap":
        graph.node("GlobalAveragePool", [x], out)
        return
    if op.kind == "upsample":
        grown = np.array([1, 1, op.stride, op.stride], np.float32)
        scales = graph.constant(f"{out}.scales", grown)
        graph.node("Resize", [x, "", scales], out, mode="linear")
        return
    pad = 0 if op.kernel % 2 == 0 else op.kernel // 2
    window: dict[str, Any] = {
        "kernel_shape": [op.kernel] * 2,
        "strides": [op.stride] * 2,
        "pads": [pad] * 4,
    }
    if op.kind == "avgpool":  # the padding is no pixel: NAS-Bench-201's average does not count it
        graph.node("AveragePool", [x], out, count_include_pad=0, **window)
    elif op.kind == "maxpool":
        graph.node("MaxPool", [x], out, **window)
    else:
        shape = (op.c_out, op.c_in // op.groups, op.kernel, op.kernel)
        graph.node("Conv", [x, *_weights(graph, op, shape, out)], out, group=op.groups, **window)


def _weights(graph: _Graph, op: Op, shape: Sequence[int], out: str) -> list[str]:
    """He-scaled weights, so that deep graphs neither overflow nor sink into slow denormals."""
    fan_in = math.prod(shape[1:])
    names = [graph.random(f"{out}.weight", shape, math.sqrt(2 / fan_in))]
    if op.bias or op.norm:  # a folded batch norm leaves a bias behind
        names.append(graph.random(f"{out}.bias", (op.c_out,), 0.1))
    return names


def _join(graph: _Graph, op: Op, names: list[str], out: str) -> None:
    if op.kind == "concat":
        graph.node("Concat", names, out, axis=1)
    elif op.kind == "act":
        _activate(graph, op.act, _scaled(graph, op, names[0], out), out)
    else:
        graph.node("Add" if op.kind == "add" else "Mul", names, out)


def _scaled(graph: _Graph, op: Op, x: str, out: str) -> str:
    """A batch norm without a layer before it is folded into nothing: scale and shift remain."""
    if not (op.norm or op.bias):
        return x
    factors = _weights(graph, op, (op.c_out, 1, 1, 1), out)
    return graph.node("Conv", [x, *factors], f"{out}.scaled", group=op.c_out)


def _activate(graph: _Graph, act: str, x: str, out: str) -> None:
    if act == "zero":
        graph.node("Mul", [x, graph.constant(f"{out}.zero", np.zeros(1, np.float32))], out)
    elif act == "relu":
        graph.node("Relu", [x], out)
    elif act == "hswish":
        graph.node("HardSwish", [x], out)
    elif act == "hsigmoid":
        graph.node("HardSigmoid", [x], out, alpha=1 / 6, beta=0.5)
    elif act == "silu":
        graph.node("Mul", [x, graph.node("Sigmoid", [x], f"{out}.gate")], out)
    elif act == "gelu":
        graph_tokens.gelu(graph, x, out)
    else:
        raise unknown("activation", act, ACTS)
