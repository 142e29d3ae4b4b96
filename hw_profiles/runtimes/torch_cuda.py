"""torch on an NVIDIA GPU: eager kernels replayed as one CUDA graph.

A graph, because eager torch at batch 1 mostly measures Python: what is timed is what the GPU does
with the kernels that torch chose. cuDNN may try its algorithms on the inputs' sizes first.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING

from hw_profiles.runtimes import Session, _cuda, offered, summary, where
from nas.errors import NasctlError

if TYPE_CHECKING:
    import numpy as np
    import torch

    from hw_profiles.runtimes import Feeds

    Tensors = tuple[torch.Tensor, ...]

PRECISIONS = ("fp32", "bf16", "fp16")
SUFFIX = ".onnx"
TIMED = "GPU time of one replayed CUDA graph between two events, inputs and outputs on the GPU"
DEVICE = "cuda"
WARM_UP = 3  # eager runs before capture: libraries allocate and choose their algorithms


def unavailable() -> str:
    if importlib.util.find_spec("torch") is None:
        return "torch is not installed: pip install torch"
    if missing := _cuda.unavailable():  # before torch, whose import takes a second or two
        return missing
    import torch

    if torch.version.cuda is None:
        return "this torch was built without CUDA: install a CUDA build from pytorch.org"
    return "" if torch.cuda.is_available() else "torch cannot use this NVIDIA driver: update it"


def version() -> str:
    try:
        return metadata.version("torch")
    except metadata.PackageNotFoundError as error:
        raise NasctlError("torch is not installed", next="Install it: pip install torch") from error


def load(model: bytes | Path, *, threads: int = 1, precision: str | None = None) -> Session:
    offered(precision, PRECISIONS, "torch")
    if missing := unavailable():
        raise NasctlError(missing, where="runtime torch_cuda")
    from hw_profiles.runtimes import _torch_graph

    net = _torch_graph.read(model, precision).to(DEVICE)
    return Session(net, where(model), net.inputs, net.outputs)


def run(session: Session, feeds: Feeds) -> list[np.ndarray]:
    """The outputs as float32, without a graph."""
    from hw_profiles.runtimes import _torch_graph

    inputs = _torch_graph.example(session.inner, feeds, DEVICE)
    with settings():
        return [out.float().cpu().numpy() for out in session.inner(*inputs)]


@dataclass(frozen=True)
class Replay:
    """One replay of a captured graph; keeps what the graph knows by address."""

    graph: torch.cuda.CUDAGraph
    stream: torch.cuda.Stream
    events: tuple[torch.cuda.Event, torch.cuda.Event]
    net: Callable[..., Tensors]
    tensors: Tensors  # inputs and outputs

    def __call__(self) -> float:
        import torch

        start, end = self.events
        with torch.cuda.stream(self.stream):
            self.graph.replay()  # keeps the GPU busy while the host enqueues what is timed
            start.record()
            self.graph.replay()
            end.record()
            end.synchronize()
        return start.elapsed_time(end) / 1e3


def timed(session: Session, feeds: Feeds) -> Callable[[], float]:
    from hw_profiles.runtimes import _torch_graph

    inputs = _torch_graph.example(session.inner, feeds, DEVICE)
    with settings():
        return replay(session.inner, inputs)


def replay(net: Callable[..., Tensors], inputs: Tensors) -> Replay:
    """`net(*inputs)` captured as a CUDA graph, for inputs that are on the GPU."""
    import torch

    graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream()
    events = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(WARM_UP):
            net(*inputs)
    with torch.cuda.graph(graph, stream=stream):
        outputs = net(*inputs)
    return Replay(graph, stream, events, net, (*inputs, *outputs))


def observed_precision(session: Session) -> str:
    """That of the weights: torch multiplies in it, TF32 being off."""
    return summary(session.inner.precisions())


@contextmanager
def settings() -> Iterator[None]:
    """cuDNN's fastest algorithm for the sizes at hand, and no TF32 in what is called fp32."""
    import torch

    with torch.backends.cudnn.flags(enabled=True, benchmark=True, allow_tf32=False):
        yield
