"""INT8 with real calibration data, as QuantizeLinear / DequantizeLinear pairs in an ONNX file.

ONNX Runtime's static quantizer does the arithmetic; here is what it is asked for, and why:

* weights are symmetric int8, one scale per output channel, everywhere;
* U8 activations (asymmetric) for processors: with them ONNX Runtime and OpenVINO multiply in VNNI.
  Everything between two multiplications is quantized too, or a network is slowed by the way to
  float and back; but not average pooling, for which ONNX Runtime has slow INT8 code (17 of them
  made nasbench201's INT8 file take 1.6 times as long as float; in float, .7 times). Never U8
  weights: 4 to 5 times slower;
* S8 activations (symmetric, all zero points 0) and no int32 biases for TensorRT, which imports
  nothing else: Q/DQ before the inputs of convolutions, linear layers and residual sums, whose
  other input would otherwise keep its convolution in float. None on their outputs: between a
  convolution and its ReLU a pair keeps TensorRT from fusing the two.

What this costs a network, and what is then done: `compress/guard.py`.
"""

from __future__ import annotations

import contextlib
import copy
import io
import logging
import tempfile
import warnings
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from nas.errors import NasctlError, unknown

Feeds = Mapping[str, np.ndarray]  # input name -> a batch
Ranges = Any  # tensor name -> what it was seen to be: the library's own record

MULTIPLY = ("Conv", "ConvTranspose", "Gemm", "MatMul")
_BETWEEN = ("Add", "Mul", "MaxPool", "GlobalAveragePool", "ReduceMean", "Concat")
_MOVED = ("Flatten", "Reshape", "Transpose", "Relu", "Clip", "HardSigmoid", "Sigmoid")
KINDS = {"u8": (*MULTIPLY, *_BETWEEN, *_MOVED), "s8": (*MULTIPLY, "Add")}

_ENDS = ("float.lowest", "float.largest")  # names of constants

CALIBRATIONS = ("minmax", "entropy", "percentile")
PERCENTILE = 99.999
#: of histograms. The library's default, 128, is as many as it then quantizes to: with that it tries
#: one threshold, the largest value, and is min-max by another name
ENTROPY_BINS = 512


@dataclass(frozen=True, slots=True)
class Scheme:
    """How activations become integers."""

    activations: Literal["u8", "s8"] = "u8"
    calibration: str = "minmax"  # or entropy, percentile: which values a scale spans

    def __post_init__(self) -> None:
        if self.calibration not in CALIBRATIONS:
            raise unknown("calibration", self.calibration, CALIBRATIONS, where="--calibration")

    @property
    def kinds(self) -> tuple[str, ...]:
        """The operators that are quantized."""
        return KINDS[self.activations]


def prepared(model: onnx.ModelProto) -> onnx.ModelProto:
    """A copy ready for `calibrate` and `int8`: constants and batch norms folded, shapes known, each
    node with a name of its own. Raises NasctlError for one that is quantized or not float32."""
    from onnxruntime.quantization.shape_inference import quant_pre_process

    if any(node.op_type in ("QuantizeLinear", "DequantizeLinear") for node in model.graph.node):
        raise NasctlError("is quantized already", where="model", next="Start from its float file.")
    if not any(tensor.data_type == TensorProto.FLOAT for tensor in model.graph.initializer):
        raise NasctlError("has no float32 weights", where="model")
    with tempfile.TemporaryDirectory() as folder, _quiet():
        before, after = Path(folder) / "model.onnx", Path(folder) / "prepared.onnx"
        onnx.save(model, before)
        # its symbolic inference fails on detectors and transformers
        quant_pre_process(before, after, skip_symbolic_shape=True)
        ready = onnx.load(after)
    taken: set[str] = set()
    for place, node in enumerate(ready.graph.node):
        if not node.name or node.name in taken:
            node.name = f"{node.op_type}_{place}"
        taken.add(node.name)
    return ready


def calibrate(model: onnx.ModelProto, batches: Sequence[Feeds], scheme: Scheme) -> Ranges:
    """What every tensor of a prepared model was seen to be on `batches`, of training data.

    Raises NasctlError for batches that are not the model's inputs in its shapes, or not finite.
    """
    from onnxruntime.quantization import CalibrationMethod, create_calibrator

    _check(model, batches)
    methods = {
        "minmax": CalibrationMethod.MinMax,
        "entropy": CalibrationMethod.Entropy,
        "percentile": CalibrationMethod.Percentile,
    }
    more: dict[str, Any] = {"symmetric": scheme.activations == "s8"}
    if scheme.calibration == "percentile":
        more["percentile"] = PERCENTILE
    elif scheme.calibration == "entropy":
        more["num_bins"] = ENTROPY_BINS
    with tempfile.TemporaryDirectory() as folder, _quiet():
        path = Path(folder) / "model.onnx"
        onnx.save(model, path)
        calibrator = create_calibrator(
            path,
            list(scheme.kinds),
            augmented_model_path=str(Path(folder) / "augmented.onnx"),
            calibrate_method=methods[scheme.calibration],
            extra_options=more,
        )
        # one batch at a time: histograms are summed up, intermediate values would pile up
        for batch in batches:
            calibrator.collect_data(_Reader(batch))
        return calibrator.compute_data()


def int8(
    model: onnx.ModelProto, ranges: Ranges, scheme: Scheme, keep: Collection[str] = ()
) -> onnx.ModelProto:
    """A prepared model in INT8, with the nodes of these names left in float."""
    from onnxruntime.quantization import QuantType
    from onnxruntime.quantization.qdq_quantizer import QDQQuantizer

    signed = scheme.activations == "s8"
    twin = onnx.ModelProto()
    twin.CopyFrom(model)  # it is changed in place
    with _quiet():
        quantizer = QDQQuantizer(
            twin,
            per_channel=True,
            reduce_range=False,  # for processors without VNNI; here it only costs accuracy
            weight_qType=QuantType.QInt8,
            activation_qType=QuantType.QInt8 if signed else QuantType.QUInt8,
            tensors_range=copy.deepcopy(ranges),  # which it narrows in place, too
            nodes_to_quantize=[],
            nodes_to_exclude=sorted({*keep, *(_shifts(model) if signed else ())}),
            op_types_to_quantize=list(scheme.kinds),
            extra_options={
                "ActivationSymmetric": signed,
                "WeightSymmetric": True,
                "QuantizeBias": not signed,
                "AddQDQPairToWeight": signed,
                "OpTypesToExcludeOutputQuantization": list(scheme.kinds) if signed else [],
            },
        )
        quantizer.quantize_model()
        quantizer.model.topological_sort()
    made: onnx.ModelProto = quantizer.model.model
    if not signed:
        _defend(made, keep)
    onnx.checker.check_model(made)
    return made


def _defend(model: onnx.ModelProto, keep: Collection[str]) -> None:
    """Make ONNX Runtime leave nodes in float that were kept in float, and average pooling.

    Since 1.21 it quantizes float weights between a DequantizeLinear and a QuantizeLinear by itself
    (its optimizer WeightBiasQuantization), with one scale for the whole tensor: a node kept because
    it is sensitive would then be quantized worse than before; and it fuses such a pair with what is
    between. A Clip to all finite numbers, which changes nothing and is not optimized away, hides
    the DequantizeLinear from it.
    """
    graph = model.graph
    dequantized = {n.output[0] for n in graph.node if n.op_type == "DequantizeLinear"}
    nodes = []
    for node in graph.node:
        multiplies = node.op_type in MULTIPLY and node.name in keep
        if (multiplies or node.op_type == "AveragePool") and node.input[0] in dequantized:
            free = f"{node.name}.float"
            nodes.append(helper.make_node("Clip", [node.input[0], *_ENDS], [free], name=free))
            node.input[0] = free
        nodes.append(node)
    if len(nodes) > len(graph.node):
        ends = np.finfo(np.float32)
        for name, value in zip(_ENDS, (ends.min, ends.max), strict=True):
            graph.initializer.append(numpy_helper.from_array(np.array(value), name))
        copies = [onnx.NodeProto.FromString(node.SerializeToString()) for node in nodes]
        del graph.node[:]
        graph.node.extend(copies)


def quantized(model: onnx.ModelProto, scheme: Scheme) -> list[onnx.NodeProto]:
    """The nodes of a prepared model that carry weights or sums into INT8, and so can lose accuracy:
    what only moves values takes the scale of what it moves."""
    carrying = {*MULTIPLY, *_BETWEEN} & set(scheme.kinds)
    left = _shifts(model) if scheme.activations == "s8" else ()
    return [n for n in model.graph.node if n.op_type in carrying and n.name not in left]


def _shifts(model: onnx.ModelProto) -> set[str]:
    """Names of the Adds of a constant, as biases and what GELU adds: they are no residual sums."""
    constants = {tensor.name for tensor in model.graph.initializer}
    return {
        node.name
        for node in model.graph.node
        if node.op_type == "Add" and not constants.isdisjoint(node.input)
    }


def depthwise(model: onnx.ModelProto) -> list[str]:
    """Names of convolutions with as many groups as channels: ONNX Runtime has slow INT8 code for
    them, so a network with many is often faster with these in float."""
    shapes = {tensor.name: tensor.dims for tensor in model.graph.initializer}
    found = []
    for node in model.graph.node:
        if node.op_type == "Conv" and len(shape := shapes.get(node.input[1], ())) > 1:
            groups = next((a.i for a in node.attribute if a.name == "group"), 1)
            if groups > 1 and shape[1] == 1:
                found.append(node.name)
    return found


class _Reader:
    """One batch, as the library reads calibration data."""

    def __init__(self, batch: Feeds) -> None:
        self._batches: Iterator[dict[str, np.ndarray]] = iter([dict(batch)])

    def get_next(self) -> dict[str, np.ndarray] | None:
        return next(self._batches, None)


def _check(model: onnx.ModelProto, batches: Sequence[Feeds]) -> None:
    if not batches:
        raise NasctlError("no calibration data", where="calibration")
    weights = {tensor.name for tensor in model.graph.initializer}
    wanted = {
        value.name: [dim.dim_value for dim in value.type.tensor_type.shape.dim]
        for value in model.graph.input
        if value.name not in weights
    }
    for batch in batches:
        for name in wanted.keys() | batch.keys():
            shape = list(batch[name].shape) if name in batch else None
            sizes = wanted.get(name)
            fits = shape is not None and sizes is not None and len(shape) == len(sizes)
            if not fits or any(n and n != m for n, m in zip(sizes or (), shape or (), strict=True)):
                raise NasctlError(
                    f"input '{name}' gets {shape}",
                    where="calibration data",
                    allowed=", ".join(f"{n} {s} (0 is any)" for n, s in wanted.items()),
                )
            if batch[name].dtype.kind == "f" and not np.isfinite(batch[name]).all():
                raise NasctlError(f"input '{name}' is not finite", where="calibration data")


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep the quantizer from printing progress, logging advice and warning of empty histograms."""
    disabled = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(disabled)
