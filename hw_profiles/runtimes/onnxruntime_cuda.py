"""ONNX Runtime on an NVIDIA GPU: the CUDA provider, with everything bound on the GPU.

The library falls back to the processor without a word when its CUDA libraries are missing or an
operator has no kernel; both are refused here. Precision is that of the file; fp16 turns a float32
file into float16.
"""

from __future__ import annotations

import importlib.util
import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hw_profiles.runtimes import Session, _cuda, _ort, fitting, obeyed, offered, where
from nas.errors import NasctlError

if TYPE_CHECKING:
    import numpy as np

    from hw_profiles.runtimes import Feeds

PRECISIONS = ("fp32", "fp16")
SUFFIX = ".onnx"
TIMED = (
    "GPU time of one replayed CUDA graph between two events, launch gap included, inputs and "
    "outputs on the GPU"
)
PROVIDER = "CUDAExecutionProvider"
DEVICE = "cuda"
HINT = "pip uninstall onnxruntime; pip install onnxruntime-gpu"
WARM_UP = 3  # runs before timing: the library captures its graph in the second
NO_GRAPH = -1
NO_FALLBACK = {"session.disable_cpu_ep_fallback": "1"}


@dataclass(frozen=True)
class Loaded:
    session: Any  # onnxruntime.InferenceSession
    model: bytes | Path
    graphs: Iterator[int]  # numbers for captured graphs: each belongs to one set of buffers


def unavailable() -> str:
    if importlib.util.find_spec("onnxruntime") is None:
        return f"ONNX Runtime is not installed: {HINT.partition('; ')[2]}"
    if missing := _cuda.unavailable():
        return missing
    if PROVIDER not in _ort.library().get_available_providers():
        return f"this ONNX Runtime has no CUDA provider: {HINT}"
    return ""


def version() -> str:
    return str(_ort.library(HINT).__version__)


def load(model: bytes | Path, *, threads: int = 1, precision: str | None = None) -> Session:
    offered(precision, PRECISIONS, "ONNX Runtime on GPUs")
    if missing := unavailable():
        raise NasctlError(missing, where="runtime onnxruntime_cuda")
    name = where(model)
    if precision == "fp16":
        from hw_profiles.half import half_file

        model = half_file(model, name)
    settings = _ort.options(threads)
    for key, value in NO_FALLBACK.items():
        settings.add_session_config_entry(key, value)
    found = _ort.inference_session(model, settings, _providers())
    if found.get_providers()[0] != PROVIDER:
        raise NasctlError(
            f"ONNX Runtime fell back to {found.get_providers()[0]}",
            where=name,
            next="Its CUDA or cuDNN libraries are missing or of another version.",
        )
    session = _ort.described(Loaded(found, model, itertools.count()), found, name)
    if precision is not None:
        obeyed(precision, observed_precision(session), name)
    return session


def run(session: Session, feeds: Feeds) -> list[np.ndarray]:
    binding, _ = _bound(session, feeds)
    _enqueue(session, binding, NO_GRAPH)
    return list(binding.copy_outputs_to_cpu())


@dataclass(frozen=True)
class Replay:
    """One inference on bound buffers; keeps them, because a graph knows them by address."""

    session: Session
    binding: Any
    graph: int
    buffers: tuple[Any, ...]

    def __call__(self) -> float:
        return _cuda.gpu().seconds(self.enqueue)

    def enqueue(self) -> None:
        _enqueue(self.session, self.binding, self.graph)


def timed(session: Session, feeds: Feeds) -> Callable[[], float]:
    binding, inputs = _bound(session, feeds)
    _enqueue(session, binding, NO_GRAPH)
    outputs = binding.get_outputs()
    for name, value in zip(session.outputs, outputs):
        binding.bind_ortvalue_output(name, value)  # from now on where the graph will write
    replay = Replay(session, binding, next(session.inner.graphs), (*inputs, *outputs))
    for _ in range(WARM_UP):
        replay.enqueue()
    return replay


def observed_precision(session: Session) -> str:
    return _ort.observed(session.inner.model, _providers())


def _providers() -> _ort.Providers:
    settings = {
        "device_id": "0",
        "user_compute_stream": str(_cuda.gpu().stream),
        "enable_cuda_graph": "1",
        "use_tf32": "0",
    }
    return ((PROVIDER, settings),)


def _bound(session: Session, feeds: Feeds) -> tuple[Any, list[Any]]:
    """An IO binding with the feeds on the GPU and outputs that the library places there; the
    inputs, to be kept alive."""
    import numpy as np

    fitting(session.inputs, feeds, session.where)
    ort, binding = _ort.library(), session.inner.session.io_binding()
    kept = []
    for name, value in feeds.items():
        kept.append(ort.OrtValue.ortvalue_from_numpy(np.ascontiguousarray(value), DEVICE, 0))
        binding.bind_ortvalue_input(name, kept[-1])
    for name in session.outputs:
        binding.bind_output(name, DEVICE, 0)
    return binding, kept


def _enqueue(session: Session, binding: Any, graph: int) -> None:
    options = _ort.library().RunOptions()
    options.add_run_config_entry("gpu_graph_id", str(graph))
    try:
        session.inner.session.run_with_iobinding(binding, options)
    except _ort.failures(RuntimeError) as error:  # RuntimeError: what the binding itself raises
        raise _ort.cannot_run(session, error) from error
