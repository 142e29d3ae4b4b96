"""ONNX Runtime on the CPU: load a model, run it.

One thread setting and one optimisation level for profiling and for deployment, so that what a
latency table was measured with is what the deployed file runs with. float16 is not offered: the
library has few such kernels for processors and computes the rest in float32 between casts.
"""

from __future__ import annotations

import importlib.util
import os
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Callable

from hw_profiles.runtimes import Session, _ort, obeyed, offered, wall, where
from nas.errors import NasctlError

if TYPE_CHECKING:
    import numpy as np

    from hw_profiles.runtimes import Feeds

PRECISIONS = ("fp32", "int8")
SUFFIX = ".onnx"
ENGINE = ".ort"  # the graph as optimised for this processor; loads without optimising again
TIMED = "one call from Python, arrays in and out in the machine's memory"
PROVIDERS: _ort.Providers = (("CPUExecutionProvider", {}),)


def unavailable() -> str:
    if importlib.util.find_spec("onnxruntime") is None:
        return "ONNX Runtime is not installed: pip install onnxruntime"
    return ""


def version() -> str:
    return str(_ort.library().__version__)


def build(
    model: bytes | Path, path: Path, *, threads: int = 1, precision: str | None = None
) -> Path:
    """Write an ONNX model in ONNX Runtime's own format, whole or not at all."""
    if path.suffix != ENGINE:
        raise NasctlError(f"an engine's name must end in {ENGINE}", where=str(path))
    load(model, threads=threads, precision=precision)  # refuses what does not compute as asked
    with tempfile.TemporaryDirectory(dir=str(path.parent)) as folder:
        whole = Path(folder) / path.name
        settings = _ort.options(threads)
        settings.add_session_config_entry("session.save_model_format", "ORT")
        settings.optimized_model_filepath = str(whole)
        _ort.inference_session(model, settings, PROVIDERS)
        os.replace(str(whole), str(path))
    return path


def portable(model: Path, path: Path) -> Path:
    """Write an ONNX file in ONNX Runtime's own format for any processor: what depends on the
    processor is noted in it and done where it is loaded."""
    settings = _ort.options(threads=1)
    settings.graph_optimization_level = _ort.library().GraphOptimizationLevel.ORT_ENABLE_EXTENDED
    settings.add_session_config_entry("session.save_model_format", "ORT")
    settings.add_session_config_entry("optimization.minimal_build_optimizations", "save")
    settings.optimized_model_filepath = str(path)
    _ort.inference_session(model, settings, PROVIDERS)
    return path


def load(model: bytes | Path, *, threads: int = 1, precision: str | None = None) -> Session:
    """A session over a file or serialised model, with a fixed number of threads."""
    offered(precision, PRECISIONS, "ONNX Runtime on CPUs")
    found = _ort.inference_session(model, _ort.options(threads), PROVIDERS)
    session = _ort.described((found, model), found, where(model))
    if precision is not None:
        obeyed(precision, observed_precision(session), session.where)
    return session


def run(session: Session, feeds: Feeds) -> list[np.ndarray]:
    """The outputs, in the file's order."""
    found, _ = session.inner
    try:
        return list(found.run(None, dict(feeds)))
    except _ort.failures(ValueError) as error:  # ValueError: a feed is missing
        raise _ort.cannot_run(session, error) from error


def timed(session: Session, feeds: Feeds) -> Callable[[], float]:
    return wall(lambda: run(session, feeds))


def observed_precision(session: Session) -> str:
    _, model = session.inner
    return _ort.observed(model, PROVIDERS)
