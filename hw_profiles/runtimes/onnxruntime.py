"""ONNX Runtime on the CPU: load a model, run it.

One thread setting and one optimisation level for profiling and for deployment, so that what a
latency table was measured with is what the deployed file runs with.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nas.errors import NasctlError

if TYPE_CHECKING:
    import numpy as np

PROVIDER = "CPUExecutionProvider"


@dataclass(frozen=True)  # slots are newer than the Python of some boards
class Session:
    """A loaded model: the names and shapes of its inputs, the names of its outputs."""

    inner: Any  # onnxruntime.InferenceSession; the library is imported only when needed
    where: str
    inputs: dict[str, tuple[int | str, ...]]
    outputs: tuple[str, ...]


def version() -> str:
    return str(_library().__version__)


def load(model: bytes | Path, *, threads: int = 1) -> Session:
    """A session over a file or serialised model, with a fixed number of threads."""
    library = _library()
    where = str(model) if isinstance(model, Path) else "model in memory"
    if isinstance(model, Path) and not model.is_file():
        raise NasctlError("no such file", where=where)
    options = library.SessionOptions()
    # the top level is up to 3x faster than none on small networks; it is also the default
    options.graph_optimization_level = library.GraphOptimizationLevel.ORT_ENABLE_ALL
    options.execution_mode = library.ExecutionMode.ORT_SEQUENTIAL
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    if threads > 1:  # waiting threads that spin take the core from whoever else needs it
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    options.log_severity_level = 4  # failures arrive as exceptions; do not also print them
    source = str(model) if isinstance(model, Path) else model
    try:
        inner = library.InferenceSession(source, options, providers=[PROVIDER])
    except _failures() as error:
        raise NasctlError(
            f"ONNX Runtime cannot load it ({_short(error)})",
            where=where,
            next="The file is damaged or uses operators this version lacks: export it again.",
        ) from error
    return Session(
        inner,
        where,
        {value.name: tuple(value.shape) for value in inner.get_inputs()},
        tuple(value.name for value in inner.get_outputs()),
    )


def run(session: Session, feeds: Mapping[str, np.ndarray]) -> list[np.ndarray]:
    """The outputs, in the file's order."""
    failures: tuple[type[Exception], ...] = (
        ValueError,
        *_failures(),
    )  # ValueError: a feed is missing
    try:
        return list(session.inner.run(None, dict(feeds)))
    except failures as error:
        raise NasctlError(
            f"ONNX Runtime cannot run it ({_short(error)})",
            where=session.where,
            allowed=(f"{name} {list(shape)}" for name, shape in session.inputs.items()),
        ) from error


def _library() -> Any:
    try:
        import onnxruntime
    except ImportError as error:
        raise NasctlError(
            "ONNX Runtime is not installed", next="Install it: pip install onnxruntime"
        ) from error
    return onnxruntime


def _failures() -> tuple[type[Exception], ...]:
    """The library's own exceptions: siblings below Exception, without a common root."""
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
    )


def _short(error: Exception) -> str:
    """The library's message on one line without the part about where in its source it arose."""
    text = " ".join(str(error).split())
    return text if len(text) <= 200 else text[:197] + "..."
