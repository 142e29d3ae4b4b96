"""The float16 or bfloat16 twin of a float32 ONNX model: lower where it multiplies, float32 where
that would hurt.

Neither ONNX Runtime nor TensorRT 11, whose networks are strongly typed, lowers a precision by
itself, so asking for one there means changing the file. Inputs and outputs stay float32: callers
feed and read the same arrays, and the casts are part of what is timed, as they are with trtexec's
default formats.

What is lowered is listed, everything else stays in float32 between casts: sums over many values
(means, norms, softmax), whose terms half the bits lose one by one; powers, exponentials and roots,
which leave float16's range (6e-8 to 65504) at everyday values; Resize, whose scales are float32;
what is computed of whole numbers up to the next multiplication, since those above 2048 (256) are
none of float16's (bfloat16's); and every operator that nobody has looked at.
docs/methods/quantization.md has what they lost.
"""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

import numpy as np
import onnx
from google.protobuf.message import DecodeError
from onnx import TensorProto, helper, numpy_helper, shape_inference

from nas.errors import NasctlError

CODES = {"fp16": TensorProto.FLOAT16, "bf16": TensorProto.BFLOAT16}
LARGEST = float(np.finfo(np.float16).max)
LEAST = float(np.finfo(np.float16).smallest_subnormal)  # half of it is rounded to 0
BF16_OPSET = 22  # from which convolutions and pooling take bfloat16

#: operators that are lowered: they multiply, or only move, compare or scale what others made
LOWERED = (
    *("Conv", "ConvTranspose", "Gemm", "MatMul", "Add", "Sub", "Mul", "Concat", "Constant"),
    *("Relu", "LeakyRelu", "Clip", "Sigmoid", "HardSigmoid", "HardSwish", "Gelu", "Tanh"),
    *("MaxPool", "AveragePool", "Flatten", "Reshape", "Transpose", "Identity", "Cast"),
    *("Squeeze", "Unsqueeze", "Slice", "Gather", "Split", "Pad", "Expand", "Where"),
)
MULTIPLY = ("Conv", "ConvTranspose", "Gemm", "MatMul")
FLOATS = (TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.BFLOAT16, TensorProto.DOUBLE)
#: whole numbers that both lower precisions hold
NARROW = (TensorProto.BOOL, TensorProto.INT8, TensorProto.UINT8)


def half_file(model: bytes | Path, where: str, *, to: str = "fp16") -> bytes:
    """`half` of an ONNX file (path or content); a file that has such weights stays as it is."""
    content = model.read_bytes() if isinstance(model, Path) else model
    try:
        proto = onnx.load_from_string(content)
    except DecodeError as error:
        raise NasctlError("is no ONNX file", where=where) from error
    if any(tensor.data_type == CODES[to] for tensor in proto.graph.initializer):
        return content
    return half(proto, where, to=to).SerializeToString()


def half(
    model: onnx.ModelProto, where: str, *, to: str = "fp16", keep: Collection[str] = ()
) -> onnx.ModelProto:
    """A copy of `model` that computes in `to` where LOWERED says so, but for the nodes named in
    `keep`; `where` names the model in messages.

    Raises NasctlError for a model that is not float32 or has control flow, for weights above
    float16's range and for tensors whose type cannot be told.
    """
    twin = onnx.ModelProto()
    twin.CopyFrom(model)
    if not any(tensor.data_type == TensorProto.FLOAT for tensor in twin.graph.initializer):
        raise NasctlError("has no float32 weights to lower", where=where)
    if to == "bf16" and _opset(twin) < BF16_OPSET:
        try:
            twin = onnx.version_converter.convert_version(twin, BF16_OPSET)
        except (onnx.version_converter.ConvertError, RuntimeError) as error:
            raise _refused(error, where) from error
        except IndexError as error:  # what onnx 1.19 to 1.21 say of an operator without a schema
            what = "cannot be lowered (an operator has no registered schema)"
            raise NasctlError(what, where=where) from error
    _Lowering(twin, where, to, frozenset(keep)).run()
    try:
        onnx.checker.check_model(twin)
    except onnx.checker.ValidationError as error:
        raise _refused(error, where) from error
    return twin


def kept(model: onnx.ModelProto, keep: Collection[str] = ()) -> list[onnx.NodeProto]:
    """The nodes of a float32 model that `half` leaves in float32."""
    kinds = _types(model, "model")
    whole = _whole(model.graph, kinds)
    return [
        node
        for node in model.graph.node
        if _floats(node, kinds) and not _lowered(node, kinds, keep, whole)
    ]


def vanishing(model: onnx.ModelProto) -> int:
    """How many weights of a float32 model other than 0 are 0 in float16, too small for it."""
    found = 0
    for tensor in model.graph.initializer:
        if tensor.data_type == TensorProto.FLOAT:
            values = numpy_helper.to_array(tensor)
            found += int(((values != 0) & (np.abs(values) <= LEAST / 2)).sum())
    return found


def _refused(error: Exception, where: str) -> NasctlError:
    """What onnx says, in one line."""
    return NasctlError(f"cannot be lowered ({' '.join(str(error).split())})", where=where)


def _opset(model: onnx.ModelProto) -> int:
    return max(each.version for each in model.opset_import if each.domain in ("", "ai.onnx"))


def _types(model: onnx.ModelProto, where: str) -> dict[str, int]:
    """Element types by tensor name."""
    try:
        graph = shape_inference.infer_shapes(model).graph
    except shape_inference.InferenceError as error:
        raise _refused(error, where) from error
    values = [*graph.input, *graph.value_info, *graph.output]
    kinds = {value.name: value.type.tensor_type.elem_type for value in values}
    kinds.update((tensor.name, tensor.data_type) for tensor in graph.initializer)
    for node in graph.node:
        if any(a.type in (a.GRAPH, a.GRAPHS) for a in node.attribute):
            raise NasctlError(f"cannot be lowered: control flow ({node.op_type})", where=where)
        for name in node.output:
            if name and not kinds.get(name):
                raise NasctlError(
                    f"cannot be lowered: nobody knows the type of '{name}' ({node.op_type})",
                    where=where,
                    next="Call .half() on the network and export it again.",
                )
    return kinds


def _floats(node: onnx.NodeProto, kinds: dict[str, int]) -> bool:
    return any(kinds.get(name) == TensorProto.FLOAT for name in node.output)


def _lowered(
    node: onnx.NodeProto, kinds: dict[str, int], keep: Collection[str], whole: set[str]
) -> bool:
    listed = node.op_type in LOWERED and node.name not in keep
    return listed and _floats(node, kinds) and whole.isdisjoint(node.output)


def _whole(graph: onnx.GraphProto, kinds: dict[str, int]) -> set[str]:
    """Float tensors made of whole numbers and constants alone, as masks, positions and indices,
    before any multiplication."""
    constant = {tensor.name for tensor in graph.initializer}
    found: set[str] = set()
    for node in graph.node:
        floats = {n for n in node.input if kinds.get(n) == TensorProto.FLOAT} - constant
        if node.op_type == "Constant":
            constant.update(node.output)
        elif node.op_type == "Cast":
            wide = kinds.get(node.input[0]) not in (*NARROW, *FLOATS)
            if wide or floats <= found and floats:
                found.update(node.output)
        elif floats and floats <= found and node.op_type not in MULTIPLY:
            found.update(node.output)
    return found


def _bounds(graph: onnx.GraphProto) -> set[str]:
    """Tensors that are read as a Clip's bounds and as nothing else."""
    bounds: set[str] = set()
    others = {value.name for value in graph.output}
    for node in graph.node:
        ends = node.input[1:] if node.op_type == "Clip" else []
        bounds.update(ends)
        others.update(node.input[: len(node.input) - len(ends)])
    return bounds - others


class _Lowering:
    """The work on one model. A tensor `t` is `t` in float32 and `t.half` in the lower precision;
    whichever was not made by its node is cast once, where it is first read."""

    def __init__(self, model: onnx.ModelProto, where: str, to: str, keep: frozenset[str]) -> None:
        self.graph, self.where, self.code, self.keep = model.graph, where, CODES[to], keep
        self.kinds = _types(model, where)
        self.weights = {tensor.name: tensor for tensor in self.graph.initializer}
        self.bounds = _bounds(self.graph)
        self.whole = _whole(self.graph, self.kinds)
        self.there = {value.name for value in self.graph.input} | self.weights.keys()
        self.nodes: list[onnx.NodeProto] = []

    def run(self) -> None:
        for node in self.graph.node:
            low = _lowered(node, self.kinds, self.keep, self.whole)
            names = [self.read(name, low) if self.is_float(name) else name for name in node.input]
            node.input[:] = names
            if low:
                name = node.output[0]
                node.output[:] = [self.low(n) if self.is_float(n) else n for n in node.output]
                self.lower_attributes(node, name)
            self.there.update(node.output)
            self.nodes.append(node)
        for value in self.graph.output:
            if self.is_float(value.name):
                self.read(value.name, low=False)
        nodes = [onnx.NodeProto.FromString(node.SerializeToString()) for node in self.nodes]
        del self.graph.node[:]
        self.graph.node.extend(nodes)
        self.graph.ClearField("value_info")  # of the float32 model; runtimes infer it anew
        read = {name for node in nodes for name in node.input}
        kept = [tensor for tensor in self.graph.initializer if tensor.name in read]
        copies = [TensorProto.FromString(tensor.SerializeToString()) for tensor in kept]
        del self.graph.initializer[:]
        self.graph.initializer.extend(copies)

    def is_float(self, name: str) -> bool:
        return self.kinds.get(name) == TensorProto.FLOAT

    def low(self, name: str) -> str:
        return f"{name}.half"

    def read(self, name: str, low: bool) -> str:
        """The tensor in that precision, made if it is not there yet."""
        wanted, other = (self.low(name), name) if low else (name, self.low(name))
        if wanted in self.there:
            return wanted
        if low and name in self.weights:
            tensor = TensorProto.FromString(self.weights[name].SerializeToString())
            self.lower(tensor, name)
            tensor.name = wanted
            self.graph.initializer.append(tensor)
        else:
            to = self.code if low else TensorProto.FLOAT
            self.nodes.append(helper.make_node("Cast", [other], [wanted], f"{wanted}.cast", to=to))
        self.there.add(wanted)
        return wanted

    def lower_attributes(self, node: onnx.NodeProto, name: str) -> None:
        for attribute in node.attribute:
            if attribute.type == onnx.AttributeProto.TENSOR:
                self.lower(attribute.t, name)
            elif node.op_type == "Cast" and attribute.name == "to":
                attribute.i = self.code

    def lower(self, tensor: TensorProto, name: str) -> None:
        """In place; the tensor is the constant of that name."""
        if tensor.data_type != TensorProto.FLOAT:
            return
        values = numpy_helper.to_array(tensor)
        if self.code == TensorProto.FLOAT16 and name in self.bounds:
            values = np.clip(values, -LARGEST, LARGEST)  # no number is beyond these
        if self.code == TensorProto.FLOAT16 and np.abs(values).max(initial=0.0) > LARGEST:
            raise NasctlError(f"weight '{tensor.name}' exceeds float16's range", where=self.where)
        dtype = helper.tensor_dtype_to_np_dtype(self.code)
        tensor.CopyFrom(numpy_helper.from_array(values.astype(dtype), tensor.name))
