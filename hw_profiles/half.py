"""The float16 twin of a float32 ONNX model, for runtimes that take their precision from the file.

TensorRT 11 has strongly typed networks only and ONNX Runtime never lowers a precision by itself, so
asking for fp16 there means changing the file. Inputs and outputs stay float32, with a cast after
and before them: callers feed and read the same arrays, and the casts are part of what is timed, as
they are with trtexec's default formats.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
from google.protobuf.message import DecodeError
from onnx import TensorProto, helper, numpy_helper

from nas.errors import NasctlError

#: operators whose inputs and outputs are all of one type, which may be float16
KNOWN = (
    "Add",
    "AveragePool",
    "Clip",
    "Concat",
    "Constant",
    "Conv",
    "Flatten",
    "Gelu",
    "Gemm",
    "GlobalAveragePool",
    "HardSigmoid",
    "HardSwish",
    "Identity",
    "MatMul",
    "MaxPool",
    "Mul",
    "ReduceMean",
    "Relu",
    "Reshape",
    "Sigmoid",
    "Softmax",
    "Sub",
    "Transpose",
)


def half_file(model: bytes | Path, where: str) -> bytes:
    """`half` of an ONNX file (path or content); a file that has float16 weights stays as it is."""
    content = model.read_bytes() if isinstance(model, Path) else model
    try:
        proto = onnx.load_from_string(content)
    except DecodeError as error:
        raise NasctlError("is no ONNX file", where=where) from error
    if any(tensor.data_type == TensorProto.FLOAT16 for tensor in proto.graph.initializer):
        return content
    return half(proto, where).SerializeToString()


def half(model: onnx.ModelProto, where: str) -> onnx.ModelProto:
    """A copy of `model` that computes in float16 throughout.

    Raises NasctlError for operators not in KNOWN, for a model that is not float32 and for weights
    above float16's range. `where` names the model in messages.
    """
    twin = onnx.ModelProto()
    twin.CopyFrom(model)
    graph = twin.graph
    strange = sorted({node.op_type for node in graph.node} - set(KNOWN))
    if strange:
        raise NasctlError(
            f"cannot be turned into float16: operator {', '.join(strange)}",
            where=where,
            allowed=KNOWN,
            next="Call .half() on the network and export it again.",
        )
    if not any(tensor.data_type == TensorProto.FLOAT for tensor in graph.initializer):
        raise NasctlError("has no float32 weights to turn into float16", where=where)
    for tensor in graph.initializer:
        _halve(tensor, where)
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.type == onnx.AttributeProto.TENSOR:
                _halve(attribute.t, where)
    graph.ClearField("value_info")  # of the float32 model; runtimes infer it anew
    _cast_ends(graph)
    onnx.checker.check_model(twin)
    return twin


def _halve(tensor: TensorProto, where: str) -> None:
    if tensor.data_type != TensorProto.FLOAT:
        return
    values = numpy_helper.to_array(tensor)
    if np.abs(values).max(initial=0.0) > np.finfo(np.float16).max:
        raise NasctlError(f"weight '{tensor.name}' exceeds float16's range", where=where)
    tensor.CopyFrom(numpy_helper.from_array(values.astype(np.float16), tensor.name))


def _cast_ends(graph: onnx.GraphProto) -> None:
    """Rename every float32 input and output inside the graph; casts lead to and from the names."""
    ends = {
        value.name: f"{value.name}.half"
        for value in (*graph.input, *graph.output)
        if value.type.tensor_type.elem_type == TensorProto.FLOAT
    }
    for node in graph.node:
        for names in (node.input, node.output):
            names[:] = [ends.get(name, name) for name in names]
    first = [
        _cast(v.name, ends[v.name], TensorProto.FLOAT16) for v in graph.input if v.name in ends
    ]
    last = [_cast(ends[v.name], v.name, TensorProto.FLOAT) for v in graph.output if v.name in ends]
    nodes = [*first, *graph.node, *last]
    graph.ClearField("node")
    graph.node.extend(nodes)


def _cast(source: str, target: str, to: int) -> onnx.NodeProto:
    return helper.make_node("Cast", [source], [target], name=f"{target}.cast", to=to)
