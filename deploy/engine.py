"""Engines: files in a runtime's own format, each with a side-car that says what it is.

An engine belongs to a processor or GPU, a driver and a library version, and most kinds are native
code that runs when it is loaded. So `load` first reads the side-car: an engine of another machine
or version, or one that is not the file the side-car was written for, is refused with what it needs,
before any of it is touched. TensorRT's may be built to run in later versions or on other GPUs; then
that alone is not refused. What an engine computes in is observed, not believed: asked for one
precision and found in another, it is not written.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from hw_profiles import engines, runtimes
from hw_profiles.engines import Facts
from hw_profiles.engines import beside as beside
from hw_profiles.engines import machine as machine
from hw_profiles.runtimes import Options, Session
from nas import file
from nas.errors import NasctlError

#: of a machine, what an engine that is compatible with other GPUs does not depend on
AROUND_GPU = {"gpu", "sm", "processor", "design", "instructions"}
AMPERE = (8, 0)


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
    inputs: dict[str, list[int | str]]  # that it was run and timed at
    outputs: list[str]
    machine: dict[str, str]
    compatible: list[str] = []  # TensorRT's: "version", "hardware"
    #: TensorRT's: smallest, usual and largest shape, of inputs with a free dimension
    shapes: dict[str, list[list[int]]] = {}
    device: str | None = None  # that it was built for, by name
    latency: dict[str, Any] | None = None  # measured after it was built


def build(
    model: Path,
    path: Path,
    *,
    runtime: str,
    precision: str | None = None,
    threads: int = 1,
    options: Options | None = None,
) -> SideCar:
    """Build the engine of an ONNX file at `path` and its side-car beside it, the engine first and
    each whole or not at all: an engine without a side-car is none. `options` are TensorRT's.

    Raises NasctlError where the runtime is not here or cannot build it, and where the engine
    computes in another precision than asked for.
    """
    beside(path).unlink(missing_ok=True)
    path.parent.mkdir(parents=True, exist_ok=True)
    facts = engines.built(model, path, runtime, precision, threads, options)
    car = described(facts, model, path)
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
    differs = differences(car)
    borne = _borne(car, differs)
    refused = [
        f"{name} {there!r}, here {here!r}"
        for name, (there, here) in differs.items()
        if name not in borne
    ]
    if refused:
        raise NasctlError(
            f"was built for {'; '.join(refused)}",
            where=str(path),
            next="Build it again on this machine: nasctl build.",
        )
    if not path.is_file() or file.sha256(path) != car.sha256:
        raise NasctlError(
            "is not the engine that its side-car describes",
            where=str(path),
            next="It is native code: do not load it, build it again.",
        )


def differences(car: SideCar) -> dict[str, tuple[str, str]]:
    """What of the machine and of the library's version is not as it was where the engine was built:
    there and here, "?" where it is not known."""
    version = f"{car.runtime} version"
    here = {**machine(car.runtime), version: runtimes.compiled(car.runtime).version()}
    there = {**car.machine, version: car.version}
    return {
        name: (there.get(name, "?"), here.get(name, "?"))
        for name in {**there, **here}
        if there.get(name) != here.get(name)
    }


def _borne(car: SideCar, differs: dict[str, tuple[str, str]]) -> set[str]:
    """Those differences that an engine was built to bear: a later version of TensorRT, of the same
    major one or 11 for 10; any GPU from Ampere on, in any computer of its architecture."""
    found: set[str] = set()
    if car.runtime != "tensorrt":
        return found
    version = "tensorrt version"
    if "version" in car.compatible and version in differs:
        there, here = (_numbers(text) for text in differs[version])
        majors = there[:1], here[:1]
        if () < there <= here and (majors[0] == majors[1] or majors == ((10,), (11,))):
            found.add(version)
    if "hardware" in car.compatible:
        _, here_sm = differs.get("sm", ("", car.machine.get("sm", "?")))
        if _numbers(here_sm) >= AMPERE:
            found |= AROUND_GPU
    return found


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split(".") if part.isdigit())


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
