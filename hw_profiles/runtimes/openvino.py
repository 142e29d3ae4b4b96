"""OpenVINO on Intel (and Arm) CPUs: load a model, run it.

Left to itself the library chooses its precision by what the processor is fast at: bf16 on recent
Xeons, for a file in float32. So the precision is always set here, float32 unless stated otherwise.
"""

from __future__ import annotations

import importlib.util
import os
import tempfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hw_profiles.runtimes import (
    Session,
    Shape,
    fitting,
    obeyed,
    offered,
    short,
    summary,
    wall,
    where,
)
from nas.errors import NasctlError

if TYPE_CHECKING:
    import numpy as np

    from hw_profiles.runtimes import Feeds

PRECISIONS = ("fp32", "bf16", "fp16", "int8")
SUFFIX = ".onnx"
ENGINE = ".blob"  # compiled for this processor by this version
TIMED = "one call from Python, inputs already in the library's tensors, outputs left in them"

#: quantized operators are told by the file; this is for the others
HINTS = {None: "f32", "fp32": "f32", "int8": "f32", "bf16": "bf16", "fp16": "f16"}
NAMES = {"f32": "fp32", "bf16": "bf16", "f16": "fp16", "u8": "int8", "i8": "int8"}
#: the library's names of the layers that multiply
MULTIPLY = ("Convolution", "Deconvolution", "FullyConnected", "MatMul")


def unavailable() -> str:
    if importlib.util.find_spec("openvino") is None:
        return "OpenVINO is not installed: pip install -c constraints.txt -e '.[openvino]'"
    return ""


def version() -> str:
    return str(_library().__version__).partition("-")[0]  # the rest names a build


def build(
    model: bytes | Path, path: Path, *, threads: int = 1, precision: str | None = None
) -> Path:
    """Write an ONNX model as compiled for this processor, whole or not at all."""
    if path.suffix != ENGINE:
        raise NasctlError(f"an engine's name must end in {ENGINE}", where=str(path))
    session = load(model, threads=threads, precision=precision)
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        whole = Path(folder) / path.name
        whole.write_bytes(session.inner.export_model().getvalue())
        os.replace(whole, path)
    return path


def representation(model: Path, path: Path) -> Path:
    """Write the library's own description of an ONNX file, which belongs to no processor: `path`
    (.xml) and its weights in the .bin beside it."""
    name, library = where(model), _library()
    try:
        # weights stay as they are: halved ones would be another network
        library.save_model(library.Core().read_model(model), path, compress_to_fp16=False)
    except RuntimeError as error:
        raise NasctlError(f"OpenVINO cannot convert it ({short(error)})", where=name) from error
    return path


def load(model: bytes | Path, *, threads: int = 1, precision: str | None = None) -> Session:
    """A session over an ONNX file, an OpenVINO one (.xml with its .bin beside it) or an engine."""
    offered(precision, PRECISIONS, "OpenVINO")
    name, core = where(model), _library().Core()
    settings = {
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_NUM_THREADS": threads,
        "NUM_STREAMS": 1,
        "ENABLE_CPU_PINNING": False,  # who measures pins the process
        "INFERENCE_PRECISION_HINT": HINTS[precision],
    }
    try:
        if isinstance(model, Path) and model.suffix == ENGINE:
            compiled = core.import_model(model.read_bytes(), "CPU", settings)
        else:
            compiled = core.compile_model(core.read_model(model), "CPU", settings)
    except RuntimeError as error:
        raise NasctlError(
            f"OpenVINO cannot load it ({short(error)})",
            where=name,
            next="The file is damaged or uses operators this version lacks: export it again.",
        ) from error
    session = Session(
        compiled,
        name,
        {port.any_name: _shape(port) for port in compiled.inputs},
        tuple(port.any_name for port in compiled.outputs),
        {port.any_name: port.element_type.to_dtype().name for port in compiled.inputs},
    )
    obeyed(precision, observed_precision(session), name)
    return session


def run(session: Session, feeds: Feeds) -> list[np.ndarray]:
    """The outputs, in the file's order."""
    fitting(session.inputs, feeds, session.where)  # a missing input would be taken as zeros
    request = session.inner.create_infer_request()
    found = _infer(request, dict(feeds), session.where)
    return [found[at] for at in range(len(session.outputs))]


def timed(session: Session, feeds: Feeds) -> Callable[[], float]:
    fitting(session.inputs, feeds, session.where)
    request = session.inner.create_infer_request()
    _infer(request, dict(feeds), session.where)  # the inputs stay in the request from now on
    return wall(lambda: request.infer(share_outputs=True))


def observed_precision(session: Session) -> str:
    """What each multiplying layer runs in, by the compiled model's own description."""
    counts: Counter[str] = Counter()
    for layer in session.inner.get_runtime_model().get_ordered_ops():
        told = layer.get_rt_info()
        if str(told["layerType"].value) in MULTIPLY:
            said = str(told["runtimePrecision"].value)
            counts[NAMES.get(said, said)] += 1
    return summary(counts)


def _infer(request: Any, feeds: Feeds, name: str) -> Any:
    try:
        return request.infer(feeds)
    except (RuntimeError, TypeError) as error:
        raise NasctlError(f"OpenVINO cannot run it ({short(error)})", where=name) from error


def _shape(port: Any) -> Shape:
    return tuple(dim.get_length() if dim.is_static else "?" for dim in port.partial_shape)


def _library() -> Any:
    if missing := unavailable():
        raise NasctlError(missing, where="runtime openvino")
    import openvino

    return openvino
