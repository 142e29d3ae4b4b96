"""Times of a TensorRT engine and of its kernels, from what trtexec exports.

--exportTimes gives a network, --exportProfile with --exportLayerInfo the kernels. The fields are
those that TensorRT 8 to 11 write: samples/common/sampleReporting.cpp of NVIDIA/TensorRT and the
engine inspector's documentation. Convolutions and poolings are translated into operators, whatever
else an engine does is listed with its time.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from hw_profiles.device import PRECISIONS
from hw_profiles.ingest import Kernel, Kernels, Skipped, number, read_json
from hw_profiles.latency import Measurement
from hw_profiles.op import Op
from nas.errors import NasctlError, unknown

#: how TensorRT names element types, in weights and inside the text that describes a format
TYPES = {"float": "fp32", "fp32": "fp32", "half": "fp16", "fp16": "fp16", "int8": "int8"}
#: a clip is one comparison more in the same epilogue
ACTIVATIONS = {"NONE": "", "RELU": "relu", "CLIPPED_RELU": "relu"}


def network(path: Path) -> Measurement:
    """GPU compute time of a whole network in ms, from `trtexec --exportTimes` (see `times`)."""
    every = times(path)
    low, median, high = np.percentile(every, [25, 50, 75])
    return Measurement(float(median), float(high - low), len(every))


def times(path: Path) -> list[float]:
    """GPU compute time in ms of every call, from `trtexec --exportTimes`.

    Raises NasctlError where the start and end of a call contradict its duration (another unit, or
    an edited file) or where a number is negative or not finite.
    """
    rows = _rows(path, read_json(path), "--exportTimes")
    every = []
    for at, row in enumerate(rows):
        where = f"{path}, entry {at}"
        start, end, ms = (
            number(row, key, where) for key in ("startComputeMs", "endComputeMs", "computeMs")
        )
        rounding = 1e-3 + 2e-5 * end  # trtexec prints six digits of times since its start
        if abs(end - start - ms) > rounding or ms == 0:
            raise NasctlError(
                f"computeMs is {ms:g}, from start to end it is {end - start:g} ms", where=where
            )
        every.append(ms)
    return every


def kernels(layer_info: Path, profile: Path, *, precision: str, batch: int = 1) -> Kernels:
    """Kernels of one engine, from `trtexec --exportLayerInfo` and `--exportProfile`.

    `precision` (fp32, fp16, int8) and `batch` are what the engine was built for. Layers that run in
    another precision are skipped with the reason; an engine without any layer in the one asked for
    is an error, because a builder that lacks a flag quietly builds fp32. Durations include the
    profiler's own cost per layer: use them for operators, `network` for the whole.
    """
    if precision not in PRECISIONS:
        raise unknown("precision", precision, PRECISIONS)
    timed = _profile(profile)
    described: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for layer in _layers(layer_info):
        described[str(layer.get("Name"))].append(layer)
    found, skipped = [], []
    for name, ms, n in timed:
        if not described[name]:
            raise NasctlError(
                f"times a layer that {layer_info.name} does not have: '{name}'",
                where=str(profile),
                next="Both files must come from one engine.",
            )
        layer = described[name].pop(0)  # several layers may share a name: both files are in order
        op = _op(layer, batch, f"{layer_info}, layer '{name}'")
        if isinstance(op, Op) and (other := _precision(layer)) != precision:
            op = f"runs in {other or 'a type that is not understood'}"
        if isinstance(op, Op) and ms > 0:
            found.append(Kernel(name, op, ms, n))
        else:
            skipped.append(Skipped(name, ms, op if isinstance(op, str) else "took no time"))
    if not found:
        raise NasctlError(
            f"no layer of the engine is a convolution or pooling in {precision}",
            where=str(layer_info),
            next="; ".join(sorted({layer.why for layer in skipped})[:3]),
        )
    return Kernels(tuple(found), tuple(skipped))


def _profile(path: Path) -> list[tuple[str, float, int]]:
    """(layer, ms per call, calls) in the order of execution."""
    head, *rows = _rows(path, read_json(path), "--exportProfile")
    count = number(head, "count", f"{path}, entry 0")
    if count < 1 or count != int(count) or not rows:
        raise NasctlError("times no layer", where=str(path), next="Export it with --exportProfile.")
    timed = []
    for at, row in enumerate(rows, start=1):
        where = f"{path}, entry {at}"
        total, mean = (number(row, key, where) for key in ("timeMs", "averageMs"))
        if not math.isclose(total, mean * count, rel_tol=1e-3, abs_tol=1e-5 * count):
            raise NasctlError(
                f"timeMs is {total:g}, but {count:g} calls of averageMs make {mean * count:g}",
                where=where,
            )
        # the median is there since TensorRT 8.5
        ms = number(row, "medianMs", where) if "medianMs" in row else mean
        if not 0.1 * mean <= ms <= 10 * mean:
            raise NasctlError(f"medianMs is {ms:g}, averageMs {mean:g}: mixed units?", where=where)
        timed.append((str(row.get("name")), ms, int(count)))
    return timed


def _layers(path: Path) -> list[dict[str, Any]]:
    content = read_json(path)
    layers = content.get("Layers") if isinstance(content, dict) else None
    if not isinstance(layers, list) or not layers:
        raise NasctlError("has no list 'Layers'", where=str(path), next="Use --exportLayerInfo.")
    if not all(isinstance(layer, dict) for layer in layers):
        raise NasctlError(
            "has names of layers and nothing else",
            where=str(path),
            next="Build the engine with --profilingVerbosity=detailed.",
        )
    return layers


def _op(layer: Mapping[str, Any], batch: int, where: str) -> Op | str:
    """The operator, or why there is none."""
    translate = {"Convolution": _convolution, "Pooling": _pooling}
    kind = layer.get("ParameterType")
    if kind not in translate:
        return f"{kind or layer.get('LayerType')} is not translated"
    try:
        inputs = [tensor["Dimensions"] for tensor in layer["Inputs"]]
        out = layer["Outputs"][0]["Dimensions"]
        if any(len(shape) != 4 for shape in (inputs[0], out)):
            return "is not over two-dimensional maps"
        if inputs[0][0] != batch:
            raise NasctlError(f"has batch {inputs[0][0]}, not {batch}", where=where)
        op = translate[kind](layer, inputs)
    except (KeyError, IndexError, TypeError, ValueError) as error:
        raise NasctlError(
            f"its fields are not what TensorRT writes ({error!r})", where=where
        ) from error
    if isinstance(op, Op) and [op.c_out, op.h_out, op.w_out] != list(out[1:]):
        return "pads or dilates in a way that no Op describes"
    return op


def _convolution(layer: Mapping[str, Any], inputs: Sequence[Sequence[int]]) -> Op | str:
    (_, c_in, h, w), groups, c_out = inputs[0], layer["Groups"], layer["OutMaps"]
    kernel, stride = set(layer["Kernel"]), set(layer["Stride"])
    if len(kernel) > 1 or len(stride) > 1 or set(layer["Dilation"]) != {1}:
        return "is dilated, or not square"
    if layer["Activation"] not in ACTIVATIONS:
        return f"has the activation {layer['Activation']}"
    if len(inputs) > 2 or (len(inputs) == 2 and list(inputs[1][1:2]) != [c_out]):
        return "reads tensors that are not a residual"
    op = Op(
        "dwconv" if groups == c_in == c_out and groups > 1 else "conv",
        *(c_in, c_out, h, w, kernel.pop(), stride.pop(), groups),
        act=ACTIVATIONS[layer["Activation"]],
        bias=layer["Bias"]["Count"] > 0,
        reads=tuple(range(-1, len(inputs) - 1)),
    )
    if op.weights != layer["Weights"]["Count"]:
        return f"has {layer['Weights']['Count']} weights where {op.weights} were expected"
    return op


def _pooling(layer: Mapping[str, Any], inputs: Sequence[Sequence[int]]) -> Op | str:
    (_, c, h, w), window, stride = inputs[0], layer["WindowSize"], set(layer["Stride"])
    kinds = {"AVERAGE": "avgpool", "MAX": "maxpool"}
    if layer["PoolingType"] not in kinds:
        return f"pools by {layer['PoolingType']}"
    if list(window) == [h, w] and layer["PoolingType"] == "AVERAGE":
        return Op("gap", c, c, h, w)
    if len(set(window)) > 1 or len(stride) > 1:
        return "is not square"
    return Op(kinds[layer["PoolingType"]], c, c, h, w, window[0], stride.pop())


def _precision(layer: Mapping[str, Any]) -> str:
    """Of the weights or, without weights, of the input; TensorRT 11 names the type by itself."""
    weights, tensor = layer.get("Weights"), layer["Inputs"][0]
    text = weights["Type"] if weights else tensor.get("DataType", tensor.get("Format/Datatype", ""))
    words = str(text).lower().split()
    return next((TYPES[word] for word in words if word in TYPES), "")


def _rows(path: Path, content: Any, option: str) -> list[dict[str, Any]]:
    listed = isinstance(content, list) and content
    if not listed or not all(isinstance(row, dict) for row in content):
        raise NasctlError(
            "is not a list of entries", where=str(path), next=f"Use trtexec {option}."
        )
    return list(content)
