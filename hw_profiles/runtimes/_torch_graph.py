"""An ONNX model as a torch module, for the operators that our graphs and exports are made of.

The torch runtimes take the same files as all others, so that one network means one file and every
runtime is compared on it. Not a general importer: an operator outside OPERATORS is one clear error.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any, Callable, Mapping

import onnx
import torch
import torch.nn.functional as F
from google.protobuf.message import DecodeError
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor, nn

from hw_profiles.runtimes import Shape, fitting, short, where
from nas.errors import NasctlError

if TYPE_CHECKING:
    from hw_profiles.runtimes import Feeds

Attributes = Mapping[str, Any]
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
CODES = {"fp32": TensorProto.FLOAT, "fp16": TensorProto.FLOAT16, "bf16": TensorProto.BFLOAT16}
CASTS = {CODES[name]: dtype for name, dtype in DTYPES.items()}
#: what goes in besides floats
INTEGERS = {TensorProto.INT64: torch.int64, TensorProto.INT32: torch.int32}


def _padding(attributes: Attributes) -> tuple[int, ...]:
    pads = attributes.get("pads", [0, 0, 0, 0])
    half = len(pads) // 2
    if list(pads[:half]) != list(pads[half:]) or attributes.get("auto_pad", b"NOTSET") != b"NOTSET":
        raise NasctlError("torch pads both sides alike", where=f"pads {list(pads)}")
    return tuple(pads[:half])


def _conv(a: Attributes, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    strides, dilations = a.get("strides", 1), a.get("dilations", 1)
    return F.conv2d(x, weight, bias, strides, _padding(a), dilations, a.get("group", 1))


def _gemm(a: Attributes, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    if (a.get("alpha", 1.0), a.get("beta", 1.0), a.get("transA", 0)) != (1.0, 1.0, 0):
        raise NasctlError("only x @ w + b is known", where="operator Gemm")
    return F.linear(x, weight if a.get("transB", 0) else weight.T, bias)


def _max_pool(a: Attributes, x: Tensor) -> Tensor:
    return F.max_pool2d(x, a["kernel_shape"], a.get("strides", 1), _padding(a))


def _average_pool(a: Attributes, x: Tensor) -> Tensor:
    counted = bool(a.get("count_include_pad", 0))
    strides = a.get("strides", 1)
    return F.avg_pool2d(x, a["kernel_shape"], strides, _padding(a), count_include_pad=counted)


def _hard_sigmoid(a: Attributes, x: Tensor) -> Tensor:
    if abs(a.get("alpha", 0.2) - 1 / 6) > 1e-6 or a.get("beta", 0.5) != 0.5:
        return (x * a.get("alpha", 0.2) + a.get("beta", 0.5)).clamp(0, 1)
    return F.hardsigmoid(x)


def _mean(a: Attributes, x: Tensor, axes: list[int] | None = None) -> Tensor:
    return x.mean(axes if axes is not None else a["axes"], keepdim=bool(a.get("keepdims", 1)))


def _reshape(a: Attributes, x: Tensor, shape: list[int]) -> Tensor:
    return x.reshape([x.shape[at] if size == 0 else size for at, size in enumerate(shape)])


def _resize(a: Attributes, x: Tensor, to: list[Any]) -> Tensor:
    """`to` is the whole new shape, or how many times each dimension grows."""
    if a.get("mode", b"nearest") != b"linear" or not a.get(
        "coordinate_transformation_mode", b"half_pixel"
    ).endswith(b"half_pixel"):
        raise NasctlError("only bilinear, by half pixels, is known", where="operator Resize")
    if isinstance(to[0], int):
        return F.interpolate(x, to[2:], mode="bilinear", align_corners=False)
    return F.interpolate(x, scale_factor=to[2:], mode="bilinear", align_corners=False)


def _gather(a: Attributes, table: Tensor, rows: Tensor) -> Tensor:
    if a.get("axis", 0) != 0 or not isinstance(rows, Tensor):
        raise NasctlError("only rows of a table are known", where="operator Gather")
    return F.embedding(rows, table)


def _layer_norm(a: Attributes, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    if a.get("axis", -1) not in (-1, x.ndim - 1):
        raise NasctlError("only over channels is known", where="operator LayerNormalization")
    return F.layer_norm(x, weight.shape, weight, bias, a.get("epsilon", 1e-5))


def _batch_norm(a: Attributes, x: Tensor, *of: Tensor) -> Tensor:
    weight, bias, mean, variance = of
    return F.batch_norm(x, mean, variance, weight, bias, eps=a.get("epsilon", 1e-5))


def _cast(a: Attributes, x: Tensor) -> Tensor:
    if a["to"] not in CASTS:
        raise NasctlError(f"type {a['to']} is not known", where="operator Cast")
    return x.to(CASTS[a["to"]])


def _sum(a: Attributes, x: Tensor, axes: list[int] | None = None) -> Tensor:
    if not axes:
        raise NasctlError("only over named axes is known", where="operator ReduceSum")
    return x.sum(axes, keepdim=bool(a.get("keepdims", 1)))


def _unsqueeze(a: Attributes, x: Tensor, axes: list[int]) -> Tensor:
    if min(axes) < 0 < len(axes) - 1:
        raise NasctlError("several axes counted from the end", where="operator Unsqueeze")
    for axis in sorted(axes):
        x = x.unsqueeze(axis)
    return x


#: integers (shapes, axes) and factors arrive as lists, because torch wants them so
OPERATORS: dict[str, Callable[..., Tensor]] = {
    "Add": lambda a, x, y: x + y,
    "AveragePool": _average_pool,
    "BatchNormalization": _batch_norm,
    "Cast": _cast,
    "Concat": lambda a, *xs: torch.cat(xs, a["axis"]),
    "Conv": _conv,
    "Div": lambda a, x, y: x / y,
    "Equal": lambda a, x, y: x == torch.as_tensor(y),
    "Erf": lambda a, x: torch.erf(x),
    "Flatten": lambda a, x: x.flatten(1),
    "Gather": _gather,
    "Gemm": _gemm,
    "GlobalAveragePool": lambda a, x: x.mean((2, 3), keepdim=True),
    "HardSigmoid": _hard_sigmoid,
    "HardSwish": lambda a, x: F.hardswish(x),
    "Identity": lambda a, x: x,
    "IsNaN": lambda a, x: torch.isnan(x),
    "LayerNormalization": _layer_norm,
    "MatMul": lambda a, x, y: x @ y,
    "MaxPool": _max_pool,
    "Mul": lambda a, x, y: x * y,
    "Not": lambda a, x: ~x,
    "ReduceMean": _mean,
    "ReduceSum": _sum,
    "Relu": lambda a, x: F.relu(x),
    "Reshape": _reshape,
    "Resize": _resize,
    "Sigmoid": lambda a, x: torch.sigmoid(x),
    "Softmax": lambda a, x: x.softmax(a.get("axis", -1)),
    "Transpose": lambda a, x: x.permute(a["perm"]),
    "Unsqueeze": _unsqueeze,
    "Where": lambda a, choose, x, y: torch.where(choose, x, y),
}


#: their second input are the weights
MULTIPLY = ("Conv", "Gemm", "MatMul")


class Graph(nn.Module):
    """Runs an ONNX graph: `graph(*inputs)` in the order of `inputs`, a tuple in that of `outputs`.

    Weights are buffers, so that `.to(device, dtype)` moves them and no gradient is kept.
    """

    def __init__(self, graph: onnx.GraphProto, name: str) -> None:
        super().__init__()
        strange = sorted({node.op_type for node in graph.node} - set(OPERATORS))
        if strange:
            raise NasctlError(
                f"cannot be turned into torch: operator {', '.join(strange)}",
                where=name,
                allowed=OPERATORS,
            )
        self.lists: dict[str, list[Any]] = {}
        self.buffer_of: dict[str, str] = {}  # tensor name -> ours: theirs may contain dots
        factors = {name for node in graph.node if node.op_type == "Resize" for name in node.input}
        for at, tensor in enumerate(graph.initializer):
            values = numpy_helper.to_array(tensor)
            if tensor.data_type == TensorProto.INT64 or tensor.name in factors:
                self.lists[tensor.name] = values.tolist()
            else:
                self.buffer_of[tensor.name] = f"weight{at}"
                self.register_buffer(f"weight{at}", torch.from_numpy(values.copy()))
        known = self.lists.keys() | self.buffer_of.keys()
        self.inputs = {v.name: _shape(v) for v in graph.input if v.name not in known}
        kinds = {value.name: value.type.tensor_type.elem_type for value in graph.input}
        self.integers = {n: INTEGERS[kinds[n]] for n in self.inputs if kinds[n] in INTEGERS}
        self.outputs = tuple(value.name for value in graph.output)
        self.steps = [
            (
                OPERATORS[node.op_type],
                {part.name: helper.get_attribute_value(part) for part in node.attribute},
                tuple(node.input),
                node.output[0],
            )
            for node in graph.node
        ]
        multiplied = [node.input[1] for node in graph.node if node.op_type in MULTIPLY]
        self.multiplied = [self.buffer_of[name] for name in multiplied if name in self.buffer_of]

    def forward(self, *xs: Tensor) -> tuple[Tensor, ...]:
        values: dict[str, Any] = {**self.lists, **dict(zip(self.inputs, xs))}
        values.update((name, getattr(self, buffer)) for name, buffer in self.buffer_of.items())
        for operator, attributes, reads, out in self.steps:
            values[out] = operator(attributes, *(values[name] for name in reads if name))
        return tuple(values[name] for name in self.outputs)

    @property
    def dtype(self) -> torch.dtype:
        return next(b.dtype for b in self.buffers() if b.is_floating_point())

    def lower(self, precision: str) -> Graph:
        """Weights, and what is cast to float32 on the way, in that precision; in place."""
        for _, attributes, _, _ in self.steps:
            if attributes.get("to") == TensorProto.FLOAT:
                attributes["to"] = CODES[precision]
        return self.to(DTYPES[precision])

    def precisions(self) -> Counter[str]:
        """How many multiplying operators have weights of each precision."""
        names = {dtype: name for name, dtype in DTYPES.items()}
        return Counter(names.get(getattr(self, name).dtype, "?") for name in self.multiplied)


def _shape(value: onnx.ValueInfoProto) -> Shape:
    dims = value.type.tensor_type.shape.dim
    return tuple(dim.dim_value or dim.dim_param or "?" for dim in dims)


def read(model: bytes | Path, precision: str | None) -> Graph:
    """The module of an ONNX file (path or content), in eval mode, its weights in `precision`.

    Raises NasctlError for a damaged file, for one without weights and for an operator outside
    OPERATORS.
    """
    name = where(model)
    try:
        proto = onnx.load(model) if isinstance(model, Path) else onnx.load_from_string(model)
    except DecodeError as error:
        raise NasctlError(f"is no ONNX file ({short(error)})", where=name) from error
    net = Graph(proto.graph, name).eval()
    if not net.multiplied:
        raise NasctlError("is no ONNX file, or one without weights", where=name)
    return net.lower(precision) if precision else net


def example(net: Graph, feeds: Feeds, device: str) -> tuple[Tensor, ...]:
    """The feeds as the module's positional inputs, on a device; floats in its weights' precision.

    Raises NasctlError for feeds that are not exactly the module's inputs.
    """
    fitting(net.inputs, feeds, "model")
    given = (torch.from_numpy(feeds[name]).to(device) for name in net.inputs)
    return tuple(x.to(net.dtype) if x.is_floating_point() else x for x in given)
