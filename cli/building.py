"""What `nasctl build` does."""

from __future__ import annotations

import shlex
import tempfile
from dataclasses import asdict
from pathlib import Path

import numpy as np

from cli import bundling
from deploy import bundle as bundles
from deploy import engine as engines
from deploy import recipes, verify
from deploy.bundle import Bundle
from deploy.engine import SideCar
from hw_profiles import runtimes
from hw_profiles.device import Device
from hw_profiles.measure import Plan, Setting
from nas.errors import NasctlError, UsageError, unknown

FOLDER = "engines"
MEASURING = Plan(rounds=10, time_limit_s=10.0)


def build(
    bundle: Bundle,
    board: Device,
    engine: str | None,
    member: str | None,
    precision: str | None,
    threads: int,
) -> SideCar:
    """The engine of one of the bundle's ONNX files, in the bundle, measured.

    Raises UsageError for an engine that the device has none of.
    """
    runtime = runtime_of(board, engine)
    if not board.local and board.kind == "cpu":
        raise UsageError(
            f"{board.name} is not this machine",
            where="--hw",
            next=f"Engines are built where they run: copy the bundle to {board.name}.",
        )
    source = bundle.path(member or bundle.manifest.model)
    module = runtimes.compiled(runtime)
    name = f"{FOLDER}/{source.stem}.{board.name}.{runtime}{module.ENGINE}"
    with tempfile.TemporaryDirectory(dir=bundle.folder.parent) as folder:
        made = Path(folder) / Path(name).name
        car = engines.build(source, made, runtime=runtime, precision=precision, threads=threads)
        # float32 weights inside say nothing of what ONNX Runtime's own format computes in
        timing = verify.latency(
            made,
            rng=np.random.default_rng(0),
            setting=Setting(runtime, None, threads),
            plan=MEASURING,
        )
        car = car.model_copy(update={"latency": asdict(timing)})
        engines.write(car, made)
        found: dict[str, tuple[bundles.Role, bytes | Path]] = {
            name: ("engine", made),
            f"{name}.json": ("sidecar", engines.beside(made)),
        }
        bundles.add(bundle, found)
    return car


def runtime_of(board: Device, engine: str | None) -> str:
    """The runtime that builds this kind of engine for a device."""
    if engine is None:
        if not hasattr(runtimes.load_module(board.runtime), "build"):
            raise UsageError(
                f"{board.runtime} has no engines", where="--engine", allowed=recipes.ENGINES
            )
        return board.runtime
    if engine not in recipes.ENGINES:
        raise unknown("engine", engine, recipes.ENGINES, where="--engine")
    kinds = recipes.ENGINES[engine]
    if board.kind not in kinds:
        fitting = [name for name, kinds in recipes.ENGINES.items() if board.kind in kinds]
        raise UsageError(
            f"no {engine} for a {board.kind}", where="--engine", allowed=", ".join(fitting)
        )
    return kinds[board.kind]


def trtexec(bundle: Bundle, member: str | None) -> str:
    """The command lines that build the engine with TensorRT's own tool, of 10 and of 11."""
    source = bundle.path(member or bundle.manifest.model)
    shapes = {name: values.shape[1:] for name, values in bundling.sample_of(bundle).items()}
    lines = []
    for major in (10, 11):
        words = recipes.trtexec(source, source.with_suffix(".engine"), shapes, major=major)
        lines.append(f"# TensorRT {major}\n{shlex.join(words)}")
    return "\n".join(lines)


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
