"""TensorRT engines, 10.x and 11.x. Never run here: see docs/methods/runtimes.md.

Only names that both versions have are used, which a test checks against both versions' bindings.
Networks are strongly typed, the one kind that 11 knows: the precision is that of the ONNX file.
`build` therefore lowers a float32 file when fp16 or bf16 is asked for, and reads back from the
engine what its layers compute in. An engine belongs to the GPU model and the TensorRT version that
built it, unless it was asked to be compatible, and it is native code: load only those you built.
One that takes several sizes is run and timed at the smallest. Where nothing is said, free sizes
become 1.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import json
import os
import tempfile
from collections import Counter, deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hw_profiles.engines import beside
from hw_profiles.runtimes import Options, Session, _cuda, fitting, obeyed, offered, summary, where
from nas.errors import NasctlError

if TYPE_CHECKING:
    import numpy as np

    from hw_profiles.runtimes import Feeds, Ranges

PRECISIONS = ("fp32", "bf16", "fp16", "int8")
SUFFIX = ".engine"
ENGINE = SUFFIX
TIMED = "GPU time of one replayed CUDA graph between two events, inputs and outputs on the GPU"
WORKSPACE_MB = 1024

#: an engine's words for its tensors, the more specific first
WORDS = {
    "bf16": ("bfloat16", "bf16"),
    "fp16": ("half", "fp16", "float16"),
    "int8": ("int8",),
    "fp8": ("fp8",),
    "fp32": ("float", "fp32"),
}
MULTIPLY = ("conv", "gemm", "matmul", "matrix")  # in the names of multiplying layers' types


@dataclass(frozen=True)
class Loaded:
    """An engine, the context that runs it, and a buffer on the GPU for each of its tensors."""

    engine: Any
    context: Any
    buffers: Mapping[str, _cuda.Buffer]
    arrays: Mapping[str, np.ndarray]  # of each tensor's shape and type: where copies start and end

    def enqueue(self) -> None:
        if not self.context.execute_async_v3(_cuda.gpu().stream):
            raise NasctlError(f"TensorRT cannot run it ({_said()})")


@dataclass(frozen=True)
class Replay:
    """One replay of a captured graph; keeps what the graph knows by address."""

    loaded: Loaded
    launch: _cuda.Call

    def __call__(self) -> float:
        return _cuda.gpu().seconds(self.launch, ahead=self.launch)


def unavailable() -> str:
    if importlib.util.find_spec("tensorrt") is None:
        return (
            "TensorRT is not installed: JetPack brings it; elsewhere pip install -e '.[tensorrt]'"
        )
    return _cuda.unavailable()


def version() -> str:
    return str(_library().__version__)


def build(
    model: bytes | Path,
    path: Path,
    *,
    threads: int = 1,
    precision: str | None = None,
    options: Options = Options(),
) -> Path:
    """Write the engine of an ONNX model for this machine's GPU to `path`; minutes, not seconds.

    With a folder of timing caches a second build of similar layers is fast and chooses the same
    kernels. Of a version-compatible engine `load` wants to read so in the side-car.
    """
    _write(path, _plan(model, threads, precision, options))
    return path


def load(model: bytes | Path, *, threads: int = 1, precision: str | None = None) -> Session:
    """A session over an engine file, or over an ONNX model, whose engine is then built first."""
    offered(precision, PRECISIONS, "TensorRT")
    name = where(model)
    if isinstance(model, Path) and model.suffix == SUFFIX:
        plan = model.read_bytes()
    else:
        plan = _plan(model, threads, precision, Options())
    trt = _library()  # after this line there is a GPU: without one, TensorRT crashes on bad files
    runtime = trt.Runtime(_logger())
    runtime.engine_host_code_allowed = isinstance(model, Path) and _brings_code(model)
    engine = runtime.deserialize_cuda_engine(plan)
    if engine is None:
        raise NasctlError(
            f"TensorRT cannot load it ({_said()})",
            where=name,
            next=f"Engines belong to one GPU and one version: build it again, with {version()}.",
        )
    session = _session(trt, engine, name)
    obeyed(precision, observed_precision(session), name)
    return session


def run(session: Session, feeds: Feeds) -> list[np.ndarray]:
    loaded, gpu = session.inner, _cuda.gpu()
    _upload(session, feeds)
    loaded.enqueue()
    for name in session.outputs:
        gpu.download(loaded.buffers[name], loaded.arrays[name])
    return [loaded.arrays[name].copy() for name in session.outputs]


def timed(session: Session, feeds: Feeds) -> Callable[[], float]:
    loaded, gpu = session.inner, _cuda.gpu()
    _upload(session, feeds)
    loaded.enqueue()  # the first run allocates, which a capture must not
    gpu.synchronize()
    return Replay(loaded, gpu.captured(loaded.enqueue))


def observed_precision(session: Session) -> str:
    """Types of the tensors that the engine's multiplying layers read, by its own inspector."""
    trt = _library()
    inspector = session.inner.engine.create_engine_inspector()
    text = inspector.get_engine_information(trt.LayerInformationFormat.JSON)
    return precisions_of(text)


def precisions_of(text: str) -> str:
    """Precisions of the multiplying layers in an engine inspector's JSON; "?" where it has none.

    10.x writes a tensor's type into "Format/Datatype", 11.x into "DataType".
    """
    try:
        layers = json.loads(text).get("Layers", [])
    except ValueError:
        return "?"
    counts: Counter[str] = Counter()
    for layer in layers:  # a plain string where the engine was built without details
        if not isinstance(layer, dict) or not layer.get("Inputs"):
            continue
        kind = f"{layer.get('LayerType', '')} {layer.get('ParameterType', '')}".lower()
        if any(word in kind for word in MULTIPLY):
            first = layer["Inputs"][0]
            said = str(first.get("DataType") or first.get("Format/Datatype", "")).lower()
            known = (name for name, words in WORDS.items() if any(word in said for word in words))
            counts[next(known, "?")] += 1
    return summary(counts)


# ---- building ------------------------------------------------------------------------------------


def _plan(model: bytes | Path, threads: int, precision: str | None, options: Options) -> bytes:
    """The serialised engine of an ONNX model."""
    offered(precision, PRECISIONS, "TensorRT")
    name, trt = where(model), _library()
    builder = trt.Builder(_logger())
    builder.max_threads = threads
    # 11 ignores the flag, its networks are always strongly typed
    flags = 1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED)
    network = builder.create_network(flags)
    parser = trt.OnnxParser(network, _logger())
    # with its path the parser also reads the files beside it that hold weights
    path = (name,) if options.beside else ()
    if not parser.parse(_onnx(model, precision, name, options.beside), *path):
        said = "; ".join(parser.get_error(at).desc() for at in range(parser.num_errors))
        raise NasctlError(f"TensorRT cannot read it ({said or _said()})", where=name)
    config = builder.create_builder_config()
    config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, WORKSPACE_MB << 20)
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED  # or layers have no types
    config.clear_flag(trt.BuilderFlag.TF32)  # fp32 is fp32
    config.add_optimization_profile(_profile(builder, network, options.shapes))
    if "version" in options.compatible:
        config.set_flag(trt.BuilderFlag.VERSION_COMPATIBLE)
    if "hardware" in options.compatible:
        config.hardware_compatibility_level = trt.HardwareCompatibilityLevel.AMPERE_PLUS
    known = _timing_cache(options)
    if known:
        _use(known, config)
    plan = builder.build_serialized_network(network, config)
    if plan is None:
        raise NasctlError(f"TensorRT cannot build it ({_said()})", where=name)
    if known:
        # the engine is there, after minutes; without the cache the next one takes as long
        with contextlib.suppress(OSError):
            _write(known, config.get_timing_cache().serialize())
    return bytes(plan)


def _onnx(model: bytes | Path, precision: str | None, name: str, beside: bool = False) -> bytes:
    """The file to parse: as it is, or its twin in half precision."""
    if precision in ("fp16", "bf16"):
        if beside:
            raise NasctlError(
                f"its weights are in another file, and only one file is lowered to {precision}",
                where=name,
                next="--precision fp32 builds it as it is.",
            )
        from hw_profiles.half import half_file

        return half_file(model, name, to=precision)
    return model.read_bytes() if isinstance(model, Path) else model


def _profile(builder: Any, network: Any, shapes: Ranges) -> Any:
    """The shapes that were asked for; every other free dimension is 1."""
    profile = builder.create_optimization_profile()
    for at in range(network.num_inputs):
        tensor = network.get_input(at)
        one = tuple(1 if size == -1 else size for size in tensor.shape)
        low, usual, high = (tuple(each) for each in shapes.get(tensor.name, (one, one, one)))
        profile.set_shape(tensor.name, low, usual, high)
    return profile


def _timing_cache(options: Options) -> Path | None:
    """The file for this GPU, driver, version and kind of engine: a cache is refused or wrong for
    any other."""
    if options.cache is None:
        return None
    gpu = _cuda.gpu()
    key = (gpu.name, f"sm{gpu.capability}", f"cuda{gpu.driver_version // 1000}", version())
    parts = (*key, *sorted(options.compatible))
    return options.cache / ("-".join(parts).replace(" ", "_").replace("/", "_") + ".cache")


def _use(known: Path, config: Any) -> None:
    """Build with what is in a timing cache, which may not be there yet."""
    timings = config.create_timing_cache(known.read_bytes() if known.exists() else b"")
    if timings is None or not config.set_timing_cache(timings, False):
        raise NasctlError(
            "TensorRT refuses this timing cache", where=str(known), next="Delete the file."
        )


def _write(path: Path, content: Any) -> None:
    """Whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        whole = Path(folder) / path.name
        whole.write_bytes(content)
        os.replace(whole, path)


# ---- running -------------------------------------------------------------------------------------


def _brings_code(path: Path) -> bool:
    """Whether the engine's side-car says that it is version-compatible: such a one brings native
    code for the processor too, which TensorRT runs only if it is told to."""
    with contextlib.suppress(OSError, ValueError):
        said = json.loads(beside(path).read_text(encoding="utf-8"))
        return isinstance(said, dict) and "version" in said.get("compatible", ())
    return False


def _session(trt: Any, engine: Any, name: str) -> Session:
    import numpy as np

    context, gpu = engine.create_execution_context(), _cuda.gpu()
    tensors = [engine.get_tensor_name(at) for at in range(engine.num_io_tensors)]
    inputs = [t for t in tensors if engine.get_tensor_mode(t) == trt.TensorIOMode.INPUT]
    for tensor in inputs:
        shape = tuple(engine.get_tensor_shape(tensor))
        if -1 in shape:
            smallest, _, _ = engine.get_tensor_profile_shape(tensor, 0)
            shape = tuple(smallest)
        context.set_input_shape(tensor, shape)
    buffers, arrays = {}, {}
    for tensor in tensors:
        shape = tuple(context.get_tensor_shape(tensor))  # an output's is known only now
        arrays[tensor] = np.zeros(shape, trt.nptype(engine.get_tensor_dtype(tensor)))
        buffers[tensor] = _cuda.Buffer(gpu, arrays[tensor].nbytes)
        context.set_tensor_address(tensor, buffers[tensor].pointer)
    return Session(
        Loaded(engine, context, buffers, arrays),
        name,
        {tensor: tuple(arrays[tensor].shape) for tensor in inputs},
        tuple(tensor for tensor in tensors if tensor not in inputs),
        {tensor: str(arrays[tensor].dtype) for tensor in inputs},
    )


def _upload(session: Session, feeds: Feeds) -> None:
    loaded, gpu = session.inner, _cuda.gpu()
    fitting(session.inputs, feeds, session.where)
    for name, value in feeds.items():
        loaded.arrays[name][...] = value
        gpu.upload(loaded.arrays[name], loaded.buffers[name])


# ---- the library ---------------------------------------------------------------------------------


def _library() -> Any:
    if missing := unavailable():
        raise NasctlError(missing, where="runtime tensorrt")
    import tensorrt

    return tensorrt


@functools.lru_cache(maxsize=None)
def _logger() -> Any:
    """One for the process, as TensorRT wants; keeps errors for our messages and prints nothing."""
    trt = _library()

    class Log(trt.ILogger):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            super().__init__()
            self.errors: deque[str] = deque(maxlen=5)

        def log(self, severity: Any, message: str) -> None:
            if severity in (trt.ILogger.INTERNAL_ERROR, trt.ILogger.ERROR):
                self.errors.append(message)

    return Log()


def _said() -> str:
    """TensorRT's last errors, which are then forgotten."""
    log = _logger()
    text = "; ".join(log.errors) or "it gave no reason"
    log.errors.clear()
    return text
