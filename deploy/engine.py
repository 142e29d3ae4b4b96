"""Engines: files in a runtime's own format, each with a side-car that says what it is.

An engine belongs to a processor or GPU, a driver and a library version, and most kinds are native
code that runs when it is loaded. So `load` first reads the side-car: an engine of another machine
or version, or one that is not the file the side-car was written for, is refused with what it needs,
before any of it is touched. What an engine computes in is observed, not believed: asked for one
precision and found in another, it is not written.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from hw_profiles import engines, runtimes
from hw_profiles.engines import Facts, machine
from hw_profiles.runtimes import Session
from nas import file
from nas.errors import NasctlError


class SideCar(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")

    runtime: str
    version: str  # of the library that built it
    sha256: str  # of the engine
    bytes: int
    model: str  # name of the ONNX file it was built from
    model_sha256: str
    requested: str | None  # precision; None: as the file is written
    observed: str
    threads: int
    inputs: dict[str, list[int | str]]
    outputs: list[str]
    machine: dict[str, str]
    latency: dict[str, Any] | None = None  # measured after it was built


def build(
    model: Path,
    path: Path,
    *,
    runtime: str,
    precision: str | None = None,
    threads: int = 1,
) -> SideCar:
    """Build the engine of an ONNX file at `path` and its side-car beside it, the engine first and
    each whole or not at all: an engine without a side-car is none.

    Raises NasctlError where the runtime is not here or cannot build it, and where the engine
    computes in another precision than asked for.
    """
    beside(path).unlink(missing_ok=True)
    path.parent.mkdir(parents=True, exist_ok=True)
    car = described(engines.built(model, path, runtime, precision, threads), model, path)
    write(car, path)
    return car


def described(facts: Facts, model: Path, path: Path) -> SideCar:
    """The side-car of the engine at `path`, from what was said of it where it was built."""
    return SideCar(
        sha256=file.sha256(path),
        bytes=path.stat().st_size,
        model=model.name,
        model_sha256=file.sha256(model),
        **facts,
    )


def load(path: Path) -> tuple[Session, SideCar]:
    """A session over an engine built here. Raises NasctlError, before the file is opened, for one
    of another machine or version, and for one that was changed or has no side-car."""
    car = read(path)
    check(car, path)
    module = runtimes.compiled(car.runtime)
    asked = None if car.runtime == "onnxruntime" else car.requested
    return module.load(path, threads=car.threads, precision=asked), car


def check(car: SideCar, path: Path) -> None:
    """What `load` refuses, without loading."""
    module = runtimes.compiled(car.runtime)
    if missing := module.unavailable():
        raise NasctlError(missing, where=str(path))
    here = {**machine(car.runtime), f"{car.runtime} version": module.version()}
    there = {**car.machine, f"{car.runtime} version": car.version}
    differs = [
        f"{name} {there.get(name, '?')!r}, here {here.get(name, '?')!r}"
        for name in {**there, **here}
        if there.get(name) != here.get(name)
    ]
    if differs:
        raise NasctlError(
            f"was built for {'; '.join(differs)}",
            where=str(path),
            next="Build it again on this machine: nasctl build.",
        )
    if not path.is_file() or file.sha256(path) != car.sha256:
        raise NasctlError(
            "is not the engine that its side-car describes",
            where=str(path),
            next="It is native code: do not load it, build it again.",
        )


def beside(path: Path) -> Path:
    """The side-car's place."""
    return path.with_name(f"{path.name}.json")


def read(path: Path) -> SideCar:
    """The side-car of the engine at `path`."""
    car = beside(path)
    try:
        return SideCar.model_validate_json(car.read_bytes())
    except OSError as error:
        raise NasctlError(
            f"has no side-car ({error.strerror})",
            where=str(path),
            next="Build it again: without one nobody knows what it runs on.",
        ) from error
    except ValidationError as error:
        raise NasctlError(f"is no side-car ({error.errors()[0]['msg']})", where=str(car)) from error


def write(car: SideCar, path: Path) -> None:
    file.write(beside(path), (json.dumps(car.model_dump(), indent=1) + "\n").encode())
