"""Spec: the validated inputs of a run with every default filled in. Run: its directory.

A run directory holds files and `run.json`, the manifest: the spec and, per finished stage, a key
(the digest of what went in), the seconds it took and the sha256 of each file that came out. A stage
whose key and files are unchanged is skipped; anything else is state of the stage itself.

Imports without torch.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import shutil
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from nas import file
from nas.errors import NasctlError, UsageError
from nas.recipe import Recipe

MANIFEST = "run.json"
LONGEST_LICENCE = 500
#: what stages keep in order to go on: removed when a run starts over
STATES = ("training.safetensors", "finetune.safetensors", "study.journal", "scores.jsonl")
TRAINED = "trained"  # folder of the networks that a search trained alone, likewise
#: what of a recipe can be asked for (see there), besides its length
HOW = (
    *("batch", "lr", "seed", "floor", "policy", "loss"),
    *("dropout", "drop_connect", "operations", "cutout", "ema"),
)
#: the fields of a spec that a supernet's training reads: all that `nasctl train` has
TRAINING = ("data", "space", "width", "size", "epochs", "threads", *HOW)


Fields = TypeVar("Fields", bound=BaseModel)


class Spec(BaseModel):
    """What a search is asked for. Fields are the long flags of `nasctl search`, with their unit."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    data: str = "digits"
    size: int | None = Field(None, ge=4, le=1024)  # px; None: the images' own
    space: str = "resnet"
    width: float | None = Field(None, gt=0, le=4)  # None: the space's own default
    hw: str = "cpu"
    latency_ms: float | None = Field(None, gt=0)  # no budget at all: the knee of the front
    macs: float | None = Field(None, gt=0)
    params: float | None = Field(None, gt=0)
    memory_bytes: float | None = Field(None, gt=0)  # of activations at the peak, batch 1
    energy_mj: float | None = Field(None, gt=0)  # per call
    strategy: str = "predictor"
    epochs: float = Field(..., gt=0)
    batch: int = Field(128, ge=2)
    lr: float = Field(0.2, gt=0)
    floor: float | None = None  # from here on as in Recipe
    policy: str = "uniform"
    loss: str = "mixed"
    dropout: float = 0.0
    drop_connect: float = 0.0
    operations: int = 0
    cutout: float = 0.0
    ema: float = 0.0
    alone: bool = False  # networks are judged by a short training each, not by a supernet
    evaluations: int = Field(64, ge=1)
    finetune: float = Field(0.0, ge=0)  # epochs of the chosen network alone; 0: as extracted
    seed: int = Field(0, ge=0)
    threads: int = Field(..., ge=1)
    train_on: str = "cpu"  # torch's name of what trains; `hw` is what is searched for
    supernet: str | None = None  # a finished run whose supernet is searched instead of a new one
    storage: str | None = None
    study_name: str = "nasctl"
    licence: str = Field("", max_length=LONGEST_LICENCE)  # of the weights

    def recipe(self, n_train: int) -> Recipe:
        """For a supernet, on `n_train` images; raises UsageError naming the flag that is wrong."""
        steps = max(1, round(self.epochs * n_train / self.batch))
        return Recipe(steps=steps, **self.model_dump(include=set(HOW)))

    def digest(self, *fields: str) -> str:
        """sha256 of the given fields (all, if none is named)."""
        return digest(self.model_dump(include=set(fields)) if fields else stated(self))


def stated(spec: BaseModel) -> dict[str, Any]:
    """All fields that name a run; those that change no figure only where they are not the usual."""
    fields = spec.model_dump()
    usual = {"licence": "", "train_on": "cpu", "together": False}
    return {k: v for k, v in fields.items() if k not in usual or v != usual[k]}


def digest(value: Any) -> str:
    """sha256 of a JSON value, independent of the order of keys."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def make_spec(fields: Mapping[str, Any]) -> Spec:
    """Validated, as by `validated`."""
    return validated(Spec, fields)


def validated(kind: type[Fields], fields: Mapping[str, Any]) -> Fields:
    """The inputs of a run of that kind, whose fields are long flags with their unit; raises
    UsageError naming the flag or field that is wrong and what it may be."""
    try:
        return kind(**fields)
    except ValidationError as error:
        first = error.errors()[0]
        name = str(first["loc"][0]) if first["loc"] else "spec"
        flag = "--" + name.removesuffix("_ms").removesuffix("_bytes").removesuffix("_mj").replace(
            "_", "-"
        )
        allowed = ", ".join(sorted(kind.model_fields)) if first["type"] == "extra_forbidden" else ""
        raise UsageError(
            f"{first['msg']} (got {first['input']!r})", where=flag, allowed=allowed
        ) from error


def given_fields(flags: Mapping[str, Any], path: Path | None) -> dict[str, Any]:
    """A TOML spec's fields, overridden by the flags that were given (not None); not validated."""
    given = {name: value for name, value in flags.items() if value is not None}
    if path is None:
        return given
    try:
        return {**tomllib.loads(path.read_text()), **given}
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise UsageError(f"cannot read the spec ({error})", where=str(path)) from error


class Run:
    """Paths and the manifest of one run directory; holds the directory's lock while in use."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def path(self, name: str) -> Path:
        return self.folder / name

    @contextlib.contextmanager
    def locked(
        self, spec: BaseModel | None = None, *, fields: Sequence[str] = (), force: bool = False
    ) -> Iterator[Run]:
        """Make the directory if need be, take its lock and check that it belongs to `spec`: to
        those `fields` of it, where some are named, so that a search can go on in the directory of
        a training.

        Raises NasctlError if another process works in it or it holds another spec's run; `force`
        starts over in it, whatever it holds.
        """
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            handle = (self.folder / ".lock").open("w")
        except OSError as error:
            raise NasctlError(f"cannot use the run directory ({error})", where="--run") from error
        with handle:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                raise NasctlError(
                    "another process is at work in this run directory", where=str(self.folder)
                ) from error
            if spec is not None:
                self._claim(spec.model_dump(include=set(fields) or None), force)
            yield self

    def _claim(self, now: dict[str, Any], force: bool) -> None:
        if force:
            for name in (MANIFEST, *STATES):
                self.path(name).unlink(missing_ok=True)
            shutil.rmtree(self.path(TRAINED), ignore_errors=True)
        manifest = self.manifest()
        before = manifest.get("spec", {})
        changed = [
            f"{k} {before[k]!r} there, {now[k]!r} here"
            for k in now.keys() & before.keys()
            if before[k] != now[k] and k != "train_on"  # what was begun here goes on there
        ]
        if changed:
            raise UsageError(
                f"{self.folder} holds a run with another spec: {'; '.join(sorted(changed))}",
                where="--run",
                next="Use another --run (--supernet keeps this one's), or --force to start over.",
            )
        merged = {**before, **now}
        if before != merged:
            self.write_json(MANIFEST, {"stages": {}, **manifest, "spec": merged})

    def manifest(self) -> dict[str, Any]:
        """`run.json`, or nothing if there is none yet; raises NasctlError if it is damaged."""
        path = self.path(MANIFEST)
        if not path.exists():
            return {}
        manifest = self.read_json(MANIFEST)
        if not isinstance(manifest, dict) or not all(
            isinstance(manifest.get(name), dict) for name in ("spec", "stages")
        ):
            raise NasctlError("not a run's manifest", where=str(path))
        return manifest

    def done(self, stage: str, key: str) -> bool:
        """Is the stage finished for these inputs, its files present and unchanged?"""
        record = self.manifest().get("stages", {}).get(stage)
        if record is None or record["key"] != key:
            return False
        return all(
            self.path(name).is_file() and file.sha256(self.path(name)) == digest_
            for name, digest_ in record["files"].items()
        )

    def unchanged(self, stage: str) -> bool:
        """Is the stage finished, its files still as it wrote them?"""
        record = self.manifest().get("stages", {}).get(stage)
        return record is not None and self.done(stage, record["key"])

    def finish(self, stage: str, key: str, seconds: float, files: Sequence[str]) -> None:
        """Record a stage's outputs."""
        manifest = self.manifest()
        manifest["stages"][stage] = {
            "key": key,
            "seconds": round(seconds, 2),
            "files": {name: file.sha256(self.path(name)) for name in files},
        }
        self.write_json(MANIFEST, manifest)

    def read_json(self, name: str) -> Any:
        path = self.path(name)
        try:
            return json.loads(path.read_text())
        except (OSError, ValueError) as error:
            raise NasctlError(
                f"missing or damaged ({error})",
                where=str(path),
                next="Delete the file (or pass --force) to redo the stage that writes it.",
            ) from error

    def write_json(self, name: str, value: Any) -> None:
        self.write_text(name, json.dumps(value, indent=1) + "\n")

    def write_text(self, name: str, text: str) -> None:
        """Atomically: a reader sees the old file or the new one, and a full disk harms neither."""
        file.write(self.path(name), text.encode())
