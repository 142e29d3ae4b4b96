"""What is sent to a board: models, the plan, and the code that measures them, with checksums."""

from __future__ import annotations

import ast
import hashlib
import json
import random
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

from hw_profiles.protocol import Plan
from hw_profiles.runtimes import load_module
from nas.errors import NasctlError

ROOT = Path(__file__).parents[2]


@dataclass(frozen=True)
class Parcel:
    """Models to be measured on a board under one plan.

    `plan.time_limit_s` is for all models together. Raises NasctlError for what no board can do.
    """

    models: Mapping[str, bytes]  # name -> serialised ONNX
    reference: bytes  # serialised ONNX; `measure.reference_model()`
    plan: Plan = Plan()
    threads: int = 1
    cores: tuple[int, ...] = ()  # of the board, to keep the process on; empty: any
    group: int = 24  # models that are in memory and in turn at once; at most this is ever repeated
    runtime: str = "onnxruntime"  # a file of hw_profiles/runtimes/
    precision: str | None = None  # demanded of the runtime; None: as the models are written
    seed: int = 0

    def __post_init__(self) -> None:
        if not self.models:
            raise NasctlError("nothing to measure", where="models")
        if self.threads < 1 or self.group < 1:
            raise NasctlError("must be 1 or more", where="threads, group")
        offered = load_module(self.runtime).PRECISIONS
        if self.precision not in (None, *offered):
            raise NasctlError(
                f"{self.runtime} offers no {self.precision}", where="precision", allowed=offered
            )

    @cached_property
    def manifest(self) -> bytes:
        """Everything that decides the results, as JSON; its SHA-256 is the parcel's identity."""
        files = self.code | self.data
        value = {
            "runtime": self.runtime,
            "precision": self.precision,
            "threads": self.threads,
            "cores": list(self.cores),
            "seed": self.seed,
            "plan": self._plan_of_a_group().to_json(),
            "reference": "reference.onnx",
            "groups": self._groups(),
            "files": {name: hashlib.sha256(files[name]).hexdigest() for name in sorted(files)},
        }
        return json.dumps(value, sort_keys=True).encode()

    @property
    def identity(self) -> str:
        return hashlib.sha256(self.manifest).hexdigest()

    @cached_property
    def code(self) -> dict[str, bytes]:
        """The runner, the runtime and what of ours they import, by path."""
        return code("hw_profiles.remote.runner", f"hw_profiles.runtimes.{self.runtime}")

    @cached_property
    def data(self) -> dict[str, bytes]:
        """The models by path, without the manifest."""
        models = {self._file(number): model for number, model in enumerate(self.models.values())}
        return {"reference.onnx": self.reference, **models}

    def _groups(self) -> list[list[dict[str, str]]]:
        """Drawn at random, so that what drifts from group to group is not what differs in them."""
        models = [
            {"name": name, "file": self._file(number)} for number, name in enumerate(self.models)
        ]
        random.Random(self.seed).shuffle(models)
        return [models[at : at + self.group] for at in range(0, len(models), self.group)]

    def _plan_of_a_group(self) -> Plan:
        return replace(self.plan, time_limit_s=self.plan.time_limit_s / len(self._groups()))

    @staticmethod
    def _file(number: int) -> str:
        return f"models/{number:05d}.onnx"


def code(*modules: str) -> dict[str, bytes]:
    """These modules and, transitively, what of ours they import anywhere in their text."""
    found: dict[str, bytes] = {}
    waiting = list(modules)
    while waiting:
        module = waiting.pop()
        path = _path(module)
        if path is None or (name := str(path.relative_to(ROOT))) in found:
            continue
        found[name] = path.read_bytes()
        waiting += [module.rpartition(".")[0], *_imported(found[name])]
    return found


def _path(module: str) -> Path | None:
    """The file of one of our modules; None for anybody else's."""
    base = ROOT.joinpath(*module.split(".")) if module.startswith(("nas", "hw_profiles")) else None
    if base is None:
        return None
    places = (base.with_suffix(".py"), base / "__init__.py")
    return next((path for path in places if path.is_file()), None)


def _imported(code: bytes) -> Iterator[str]:
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
