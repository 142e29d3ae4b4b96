"""What `nasctl build` does."""

from __future__ import annotations

import shlex
import tempfile
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import numpy as np

from cli import bundling, console, measuring
from deploy import bundle as bundles
from deploy import engine as engines
from deploy import external, layouts, recipes, verify
from deploy import onnx as files
from deploy.bundle import Bundle
from deploy.engine import SideCar
from deploy.sizes import Sizes
from hw_profiles import runtimes
from hw_profiles.device import Device
from hw_profiles.measure import Plan, Setting, reference_model
from hw_profiles.remote import build as remote
from hw_profiles.remote import ssh
from hw_profiles.runtimes import Options
from nas.errors import NasctlError, UsageError, unknown

FOLDER = "engines"
MEASURING = Plan(rounds=10, time_limit_s=10.0)
#: what `--compatible` takes
MEANS = {"version": "later versions of TensorRT", "hardware": "other GPUs from Ampere on"}
PLACES = "local, ssh://[user@]host[:port]"


@dataclass(frozen=True)
class Asked:
    """What was typed."""

    board: Device
    engine: str | None = None
    member: str | None = None
    precision: str | None = None
    threads: int = 1
    on: str = measuring.LOCAL
    compatible: tuple[str, ...] = ()  # TensorRT's alone, as what follows
    sizes: Sizes = field(default_factory=dict)


def parse_compatible(text: str | None) -> tuple[str, ...]:
    found = tuple(word.strip() for word in text.split(",")) if text is not None else ()
    for word in found:
        if word not in MEANS:
            raise unknown("compatibility", word, MEANS, where="--compatible")
    return tuple(dict.fromkeys(found))


def build(bundle: Bundle, asked: Asked) -> SideCar:
    """The engine of one of the bundle's ONNX files, in the bundle, measured where it was built.

    Raises UsageError for an engine that the device has none of, and for another place than the
    device's.
    """
    board = asked.board
    runtime = runtime_of(board, asked.engine)
    if asked.on != measuring.LOCAL:
        if measuring.files(asked.on) is not None:
            raise UsageError("engines are built over ssh or here", where="--on", allowed=PLACES)
        measuring.here_or_there(board, asked.on)
    elif not board.local and board.kind == "cpu":
        raise UsageError(
            f"{board.name} is not this machine",
            where="--hw",
            next=f"Engines are built where they run: --on ssh://…, or copy the bundle to "
            f"{board.name}.",
        )
    asked = replace(asked, precision=precision_of(bundle, asked))
    source = bundle.onnx(asked.member or bundle.manifest.model)
    options = _options(bundle, source, runtime, asked)
    module = runtimes.compiled(runtime)
    name = f"{FOLDER}/{source.stem}.{board.name}.{runtime}{module.ENGINE}"
    with tempfile.TemporaryDirectory(dir=bundle.folder.parent) as folder:
        made = Path(folder) / Path(name).name
        make = _built_here if asked.on == measuring.LOCAL else _built_there
        car = make(source, made, runtime, asked, options)
        car = car.model_copy(update={"device": board.name})
        engines.write(car, made)
        found: dict[str, tuple[bundles.Role, bytes | Path]] = {
            name: ("engine", made),
            f"{name}.json": ("sidecar", engines.beside(made)),
        }
        bundles.add(bundle, found)
    return car


def precision_of(bundle: Bundle, asked: Asked) -> str | None:
    """What the engine computes in: what was typed, else of the float file what the device's
    latencies are of. None, as the file is, of any other file and where that is float32."""
    member = asked.member or bundle.manifest.model
    if asked.precision is not None or member != bundling.FLOAT or asked.board.precision == "fp32":
        return asked.precision
    return asked.board.precision


def _options(bundle: Bundle, source: Path, runtime: str, asked: Asked) -> Options | None:
    """What TensorRT alone is asked for besides; None for any other runtime.

    Raises UsageError for what is TensorRT's and asked of another, and where the smallest of a size
    is not that of the bundle's own inputs: at the smallest an engine is timed and verified on them.
    """
    if runtime != "tensorrt":
        if asked.compatible or asked.sizes:
            raise UsageError(
                f"{runtime} has no such engines",
                where="--compatible" if asked.compatible else "--sizes",
                allowed="--engine tensorrt",
            )
        _check_free(source, runtime)
        return None
    sample = bundling.sample_of(bundle)
    shapes = bundling.free_shapes(source, sample, asked.sizes)
    for name, (low, _, _) in shapes.items():
        own = (1, *sample[name].shape[1:])
        if tuple(low) != own:
            told = ("x".join(map(str, shape)) for shape in (low, own))
            raise UsageError(
                f"{name} is {next(told)} at the smallest",
                where="--sizes",
                allowed=f"{next(told)}, as the bundle's own inputs",
                next="The engine is timed and verified on them. trtexec is not (--commands).",
            )
    beside = bool(external.beside(source))
    return Options(asked.compatible, shapes, measuring.cache() / "tensorrt", beside)


def _check_free(source: Path, runtime: str) -> None:
    """Refuse what would be built, or timed, at 1 wherever a dimension besides the batch is free:
    ONNX Runtime alone reads the sizes that a file states."""
    free = [
        f"{name} {list(shape)}"
        for name, shape in files.inputs(source).items()
        if any(isinstance(size, str) for size in shape[1:])
    ]
    if free and runtime != "onnxruntime":
        raise NasctlError(
            f"{runtime} takes 1 for a size that is free: {', '.join(free)}",
            where=str(source),
            next="Build it for ONNX Runtime (--engine ort), or export it at fixed sizes.",
        )


def _built_here(
    source: Path, made: Path, runtime: str, asked: Asked, options: Options | None
) -> SideCar:
    car = engines.build(
        source,
        made,
        runtime=runtime,
        precision=asked.precision,
        threads=asked.threads,
        options=options,
    )
    # float32 weights inside say nothing of what ONNX Runtime's own format computes in
    setting = Setting(runtime, None, asked.threads)
    timing = verify.latency(made, rng=np.random.default_rng(0), setting=setting, plan=MEASURING)
    return car.model_copy(update={"latency": asdict(timing)})


def _built_there(
    source: Path, made: Path, runtime: str, asked: Asked, options: Options | None
) -> SideCar:
    if held := external.beside(source):
        raise NasctlError(
            f"its weights are in {held[0].name}, and one file alone goes to a board",
            where=str(source),
            next="Copy the bundle to the board, and build it there.",
        )
    request = remote.Request(
        source.read_bytes(),
        reference_model(),
        runtime,
        asked.precision,
        asked.threads,
        MEASURING,
        options=options,
    )
    found = remote.build(ssh.parse(asked.on), request)
    if found.left:
        console.say(f"{found.left}, with the model, is still on the board: remove it", "note")
    made.write_bytes(found.content)
    car = engines.described(found.facts, source, made)
    return car.model_copy(update={"latency": dict(found.latency)})


def runtime_of(board: Device, engine: str | None) -> str:
    """The runtime that builds this kind of engine for a device."""
    fitting = [name for name, kinds in recipes.ENGINES.items() if board.kind in kinds]
    if engine is None:
        known = board.runtime in runtimes.names()
        if not known or not hasattr(runtimes.load_module(board.runtime), "build"):
            raise UsageError(f"{board.runtime} has no engines", where="--engine", allowed=fitting)
        return board.runtime
    if engine not in recipes.ENGINES:
        raise unknown("engine", engine, recipes.ENGINES, where="--engine")
    kinds = recipes.ENGINES[engine]
    if board.kind not in kinds:
        raise UsageError(
            f"no {engine} for a {board.kind}", where="--engine", allowed=", ".join(fitting)
        )
    return kinds[board.kind]


def trtexec(bundle: Bundle, asked: Asked) -> str:
    """The command lines that build the engine with TensorRT's own tool, of 10 and of 11, into
    the folder that one is in: it stays outside the bundle, which lists all of its files.

    Raises NasctlError for a precision that no file of the bundle is in: the tool builds what the
    file says.
    """
    member, precision = asked.member or bundle.manifest.model, precision_of(bundle, asked)
    if precision is not None:
        runtimes.offered(precision, runtimes.load_module("tensorrt").PRECISIONS, "TensorRT")
        if asked.member not in (None, bundling.FLOAT):
            raise UsageError(
                "trtexec builds what a file says", where="--precision", next="Leave it out."
            )
        member = recipes.FILES[precision]
        if member not in bundle.manifest.members:
            first = recipes.lowering(str(bundle.folder), asked.board.name, precision)
            raise NasctlError(
                f"trtexec builds what a file says, and none is in {precision}",
                where=str(bundle.folder),
                next=f"{first} writes {member}; --precision fp32 takes {bundling.FLOAT}.",
            )
    source = bundle.onnx(member)
    shapes = bundling.free_shapes(source, bundling.sample_of(bundle), asked.sizes)
    within = Path.cwd().is_relative_to(bundle.folder.resolve())
    engine = (bundle.folder.resolve().parent if within else Path()) / f"{source.stem}.engine"
    lines = []
    for major in (10, 11):
        words = recipes.trtexec(source, engine, shapes, compatible=asked.compatible, major=major)
        lines.append(f"# TensorRT {major}, precision as {member} is written\n{shlex.join(words)}")
    return "\n".join(lines)


def laid_out(bundle: Bundle, member: str | None, layout: str, folder: Path) -> list[str]:
    """The files of a layout of one of the bundle's ONNX files, in a new folder."""
    source = bundle.onnx(member or bundle.manifest.model)
    interface = bundling.interface_of(bundle) if bundle.of("task") else None  # exported without
    paths = layouts.written(layout, source, interface, folder)
    return [str(path) for path in paths]


def named(bundle: Bundle, text: str) -> Path:
    """The engine in the bundle that somebody named. Raises NasctlError naming those there are."""
    every = bundle.of("engine")
    found = [name for name in every if text in (name, Path(name).name)]
    if not found:
        raise NasctlError(
            f"has no engine '{text}'",
            where=str(bundle.folder),
            allowed=every or "none is built",
            next="nasctl build makes one.",
        )
    return bundle.folder / found[0]
