"""What both ONNX Runtime providers share: sessions, its exceptions, what it made of a model."""

from __future__ import annotations

import json
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any, Dict, Mapping, Sequence, Tuple

from hw_profiles.runtimes import SIZES, Session, short, summary, where
from nas.errors import NasctlError

Providers = Sequence[Tuple[str, Dict[str, str]]]

#: operators that multiply floats, by the position of their weights; also after ONNX Runtime's
#: fusions, whose names and domains differ
MULTIPLY = ("Conv", "ConvTranspose", "FusedConv", "Gemm", "FusedGemm", "MatMul", "FusedMatMul")
MULTIPLY_INT8 = (
    "QLinearConv",
    "ConvInteger",
    "QLinearMatMul",
    "MatMulInteger",
    "MatMulIntegerToFloat",
    "DynamicQuantizeMatMul",
    "QGemm",
)


def library(hint: str = "pip install onnxruntime") -> Any:
    """The imported library. Raises NasctlError with the hint when it is absent."""
    try:
        import onnxruntime
    except ImportError as error:
        raise NasctlError("ONNX Runtime is not installed", next=f"Install it: {hint}") from error
    return onnxruntime


def failures(*more: type[Exception]) -> tuple[type[Exception], ...]:
    """The library's own exceptions, siblings below Exception without a common root, and `more`."""
    from onnxruntime.capi import onnxruntime_pybind11_state as state

    return (
        state.Fail,
        state.InvalidArgument,
        state.InvalidGraph,
        state.InvalidProtobuf,
        state.NoModel,
        state.NoSuchFile,
        state.NotImplemented,
        state.RuntimeException,
        *more,
    )


def options(threads: int) -> Any:
    """One thread setting and one optimisation level for profiling and for deployment."""
    ort = library()
    made = ort.SessionOptions()
    # the top level is up to 3x faster than none on small networks; it is also the default
    made.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_ALL
    made.execution_mode = ort.ExecutionMode.ORT_SEQUENTIAL
    made.intra_op_num_threads = threads
    made.inter_op_num_threads = 1
    if threads > 1:  # waiting threads that spin take the core from whoever else needs it
        made.add_session_config_entry("session.intra_op.allow_spinning", "0")
    made.log_severity_level = 4  # failures arrive as exceptions; do not also print them
    return made


def inference_session(model: bytes | Path, settings: Any, providers: Providers) -> Any:
    """The library's session. Raises NasctlError for a model that it cannot load."""
    name = where(model)
    source = str(model) if isinstance(model, Path) else model
    try:
        return library().InferenceSession(source, settings, providers=list(providers))
    except failures() as error:
        raise NasctlError(
            f"ONNX Runtime cannot load it ({short(error)})",
            where=name,
            next="The file is damaged or uses operators this version lacks: export it again.",
        ) from error


def described(inner: Any, found: Any, name: str) -> Session:
    """A Session around `inner`, with the inputs and outputs of the library's session `found`."""
    kinds = {"tensor(float16)": "float16", "tensor(double)": "float64", "tensor(int64)": "int64"}
    return Session(
        inner,
        name,
        {value.name: tuple(value.shape) for value in found.get_inputs()},
        tuple(value.name for value in found.get_outputs()),
        {value.name: kinds[value.type] for value in found.get_inputs() if value.type in kinds},
        _sizes(found.get_modelmeta().custom_metadata_map.get(SIZES, "")),
    )


def _sizes(said: str) -> dict[str, int]:
    """Of a file's property SIZES, whoever wrote it: nothing where it is not what we write."""
    try:
        found = json.loads(said)
    except ValueError:
        return {}
    return found if isinstance(found, dict) and all(type(n) is int for n in found.values()) else {}


def cannot_run(session: Session, error: BaseException) -> NasctlError:
    """The error for feeds that do not fit, naming those that do."""
    return NasctlError(
        f"ONNX Runtime cannot run it ({short(error)})",
        where=session.where,
        allowed=(f"{name} {list(shape)}" for name, shape in session.inputs.items()),
    )


def observed(model: bytes | Path, providers: Providers) -> str:
    """Precisions of the multiplying operators of the graph that ONNX Runtime makes of a model.

    The graph after fusion and after its casts is written out and read back: a float16 convolution
    that the processor has no kernel for is then a float32 one between casts.
    """
    try:
        import onnx
    except ImportError as error:  # on boards
        raise NasctlError(
            "what the model computes in cannot be told without the onnx package",
            where=where(model),
            next="Install it there (pip install onnx), or demand no precision.",
        ) from error
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "optimized.onnx"
        settings = options(threads=1)
        settings.optimized_model_filepath = str(path)
        inference_session(model, settings, providers)
        graph = onnx.load(path).graph
    counts: Counter[str] = Counter()
    types = _types(graph)
    for node in graph.node:
        if node.op_type in MULTIPLY_INT8:
            counts["int8"] += 1
        elif node.op_type in MULTIPLY:
            counts[types.get(node.input[1], "?")] += 1
    return summary(counts)


def _types(graph: Any) -> Mapping[str, str]:
    """Tensor name -> precision, as far as the file says."""
    from onnx import TensorProto

    names = {
        TensorProto.FLOAT: "fp32",
        TensorProto.FLOAT16: "fp16",
        TensorProto.BFLOAT16: "bf16",
        TensorProto.DOUBLE: "fp64",
    }
    values = [*graph.input, *graph.value_info, *graph.output]
    codes = {value.name: value.type.tensor_type.elem_type for value in values}
    codes.update((tensor.name, tensor.data_type) for tensor in graph.initializer)
    for node in graph.node:
        if node.op_type == "Cast":
            codes[node.output[0]] = next(a.i for a in node.attribute if a.name == "to")
        elif node.op_type == "DequantizeLinear":  # in the type of its scale
            codes[node.output[0]] = codes.get(node.input[1], TensorProto.FLOAT)
    return {name: names.get(code, "?") for name, code in codes.items()}
