"""AOTInductor on an NVIDIA GPU: a package of Triton kernels, replayed as one CUDA graph."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from hw_profiles.runtimes import Session, offered, torch_cuda
from nas.errors import NasctlError

if TYPE_CHECKING:
    import numpy as np

    from hw_profiles.runtimes import Feeds

PRECISIONS = ("fp32", "bf16", "fp16")
SUFFIX = ".pt2"
ENGINE = SUFFIX
TIMED = torch_cuda.TIMED
DEVICE = torch_cuda.DEVICE


def unavailable() -> str:
    return torch_cuda.unavailable()


def version() -> str:
    return f"torch {torch_cuda.version()}"


def build(
    model: bytes | Path, path: Path, *, threads: int = 1, precision: str | None = None
) -> Path:
    """Write the package (.pt2) of an ONNX model for this machine's kind of GPU."""
    _require(precision)
    from hw_profiles.runtimes import _aoti

    with torch_cuda.settings():
        return _aoti.build(model, path, device=DEVICE, threads=threads, precision=precision)


def load(model: bytes | Path, *, threads: int = 1, precision: str | None = None) -> Session:
    """A session over a package, or over an ONNX model, which is then compiled first."""
    _require(precision)
    from hw_profiles.runtimes import _aoti

    with torch_cuda.settings():
        return _aoti.load(model, device=DEVICE, threads=threads, precision=precision)


def run(session: Session, feeds: Feeds) -> list[np.ndarray]:
    """The outputs as float32, without a graph."""
    from hw_profiles.runtimes import _aoti

    inputs = _aoti.inputs_of(session, feeds, DEVICE)
    with torch_cuda.settings():
        return [out.float().cpu().numpy() for out in session.inner(*inputs)]


def timed(session: Session, feeds: Feeds) -> Callable[[], float]:
    from hw_profiles.runtimes import _aoti

    inputs = _aoti.inputs_of(session, feeds, DEVICE)
    with torch_cuda.settings():
        return torch_cuda.replay(session.inner, inputs)


def observed_precision(session: Session) -> str:
    """That of the weights when the package was built: torch multiplies in it."""
    return str(session.inner.precision)


def _require(precision: str | None) -> None:
    offered(precision, PRECISIONS, "AOTInductor on GPUs")
    if missing := unavailable():
        raise NasctlError(missing, where="runtime aoti_cuda")
