"""AOTInductor on the processor: torch's own ahead-of-time compiler and file format."""

from __future__ import annotations

import importlib.util
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from hw_profiles.runtimes import Session, offered, torch_cuda, wall
from nas.errors import NasctlError

if TYPE_CHECKING:
    import numpy as np

    from hw_profiles.runtimes import Feeds

PRECISIONS = ("fp32", "bf16")
SUFFIX = ".pt2"
ENGINE = SUFFIX
TIMED = "one call from Python, tensors in and out in the machine's memory"
DEVICE = "cpu"


def unavailable() -> str:
    if importlib.util.find_spec("torch") is None:
        return "torch is not installed: pip install torch"
    compiler = os.environ.get("CXX", "g++")  # as torch looks for it
    if shutil.which(compiler) is None:
        return f"AOTInductor compiles C++ and there is no {compiler}: apt-get install g++"
    return ""


def version() -> str:
    return f"torch {torch_cuda.version()}"


def build(
    model: bytes | Path, path: Path, *, threads: int = 1, precision: str | None = None
) -> Path:
    """Write the package (.pt2) of an ONNX model for this many threads; tens of seconds."""
    _require(precision)
    from hw_profiles.runtimes import _aoti

    return _aoti.build(model, path, device=DEVICE, threads=threads, precision=precision)


def load(model: bytes | Path, *, threads: int = 1, precision: str | None = None) -> Session:
    """A session over a package, or over an ONNX model, which is then compiled first."""
    _require(precision)
    from hw_profiles.runtimes import _aoti

    return _aoti.load(model, device=DEVICE, threads=threads, precision=precision)


def run(session: Session, feeds: Feeds) -> list[np.ndarray]:
    """The outputs as float32."""
    from hw_profiles.runtimes import _aoti

    inputs = _aoti.inputs_of(session, feeds, DEVICE)
    with _threads(session.inner.threads):
        return [out.float().numpy() for out in session.inner(*inputs)]


def timed(session: Session, feeds: Feeds) -> Callable[[], float]:
    from hw_profiles.runtimes import _aoti

    package, inputs = session.inner, _aoti.inputs_of(session, feeds, DEVICE)
    call = wall(lambda: package(*inputs))

    def seconds() -> float:
        with _threads(package.threads):
            return call()

    return seconds


def observed_precision(session: Session) -> str:
    """That of the weights when the package was built: torch multiplies in it."""
    return str(session.inner.precision)


def _require(precision: str | None) -> None:
    offered(precision, PRECISIONS, "AOTInductor on CPUs")
    if missing := unavailable():
        raise NasctlError(missing, where="runtime aoti")


@contextmanager
def _threads(wanted: int) -> Iterator[None]:
    """torch's number of threads, which belongs to the process, for the length of a call."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(wanted)
    try:
        yield
    finally:
        torch.set_num_threads(before)
