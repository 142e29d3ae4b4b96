"""What `nasctl export my_pkg.my_mod:build` does: a user's own network as a sealed bundle.

With data the network is fed, calibrated and judged as `nasctl prune` does it. Without, `--input`
says what goes in: the file is compared with the network on made-up values and can be built and
verified, but not quantized.
"""

from __future__ import annotations

import json
import re
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from cli import bundling, properties, subject
from cli.bundling import Feeds
from cli.subject import Subject
from deploy import onnx, verify
from deploy.bundle import Bundle
from deploy.interface import Interface
from deploy.onnx import Free
from hw_profiles.device import Device
from hw_profiles.runtimes import SIZES
from nas import checkpoint, multitask
from nas.errors import NasctlError, UsageError
from nas.outputs import named

BATCH = "batch"
EXAMPLES = 8  # made-up ones, where there are no data
FORMS = "NAME:batch,3,64,64 or, with free sizes and a type, ids:batch,length=16:int64"
TYPES = {"float32": torch.float32, "int64": torch.int64}
_DIMENSION = re.compile(r"(?:([A-Za-z_]\w*)(?:=([1-9]\d*))?|([1-9]\d*))")


@dataclass(frozen=True)
class Port:
    """One input as it was typed."""

    name: str
    sizes: tuple[int, ...]  # of one example: without the batch
    free: tuple[str, ...]  # per dimension, with the batch: its name, or "" where it is fixed
    type: str

    @property
    def dimensions(self) -> list[str | int]:
        """With the batch; a free one by its name."""
        return [name or size for name, size in zip(self.free, (1, *self.sizes), strict=True)]

    @property
    def axes(self) -> dict[int, Free]:
        return {axis: name for axis, name in enumerate(self.free) if name}


@dataclass(frozen=True)
class Asked:
    """What was typed."""

    model: str
    weights: Path | None
    data: str | None
    size: int | None
    tasks: Sequence[str]
    inputs: Sequence[str]
    licence: str
    board: Device


@dataclass(frozen=True, eq=False)
class Job:
    """A network, what goes into it, and values of that."""

    net: nn.Module
    origin: dict[str, Any]
    ports: tuple[Port, ...]
    sample: Feeds
    interface: Interface | None
    asked: Asked
    validation: Mapping[str, float]  # metrics by task; none without data


# ---- what was typed ------------------------------------------------------------------------------


def parse_input(text: str) -> Port:
    """'image:batch,3,height=64,width=64' and the like. The batch comes first, of any size or 1."""
    name, _, rest = text.partition(":")
    shape, _, kind = rest.partition(":")
    found = [_DIMENSION.fullmatch(part.strip()) for part in shape.split(",")]
    if not name.isidentifier() or not all(found):
        raise UsageError(f"'{text}'", where="--input", allowed=FORMS)
    kind = kind or "float32"
    if kind not in TYPES:
        raise UsageError(f"type '{kind}'", where=f"--input {name}", allowed=TYPES)
    words = [match.groups() for match in found if match]
    first, others = words[0], words[1:]
    if first not in ((BATCH, None, None), (None, None, "1")):
        raise UsageError(
            "does not begin with the batch", where=f"--input {name}", allowed=f"{BATCH}, or 1"
        )
    for word, size, _ in others:
        if word and (not size or word == BATCH):
            raise UsageError(
                f"'{word}' needs a size to try it with",
                where=f"--input {name}",
                allowed=f"{word}=64, another word than {BATCH}",
            )
    sizes = tuple(int(size or number) for _, size, number in others)
    return Port(name, sizes, tuple(word or "" for word, _, _ in words), kind)


def parse_inputs(texts: Sequence[str]) -> tuple[Port, ...]:
    """All of them: named apart, a free size the same wherever it is named."""
    ports = tuple(map(parse_input, texts))
    if len({port.name for port in ports}) < len(ports):
        raise UsageError("two inputs have the same name", where="--input")
    if len({port.free[0] for port in ports}) > 1:
        raise UsageError("the batch is free for some, 1 for others", where="--input")
    known: dict[str, int] = {}
    for port in ports:
        for name, size in zip(port.free[1:], port.sizes, strict=True):
            if name and known.setdefault(name, size) != size:
                raise UsageError(
                    f"'{name}' is {known[name]} and {size}", where=f"--input {port.name}"
                )
    return ports


def prepare(asked: Asked) -> Job:
    """Everything validated and loaded: names before data, data before any work."""
    ports = parse_inputs(asked.inputs)
    if asked.data is not None:
        found = subject.load(asked.model, asked.weights, asked.data, asked.size, asked.tasks)
        return _with_data(asked, found, ports)
    for flag, value in (("--size", asked.size), ("--tasks", asked.tasks)):
        if value:
            raise UsageError("is about data, and there are none", where=flag, next="Give --data.")
    if not ports:
        raise UsageError(
            "nobody says what goes into the network",
            where="--data or --input",
            allowed=f"the model's data, or {FORMS}",
        )
    net, origin = subject.built(asked.model, asked.weights)
    sample = {port.name: _made_up(port, at) for at, port in enumerate(ports)}
    _try(net, sample, asked.model)
    return Job(net, origin, ports, sample, None, asked, {})


def _with_data(asked: Asked, found: Subject, ports: Sequence[Port]) -> Job:
    shape = found.task.shape
    port = ports[0] if ports else Port("input", shape, (BATCH, "", "", ""), "float32")
    if len(ports) > 1 or (port.sizes, port.type) != (shape, "float32"):
        raise UsageError(
            f"the data give one input of {','.join(map(str, shape))}, float32",
            where="--input",
            next="Leave it out, or say the same with names for free sizes.",
        )
    said = found.interface.model_copy(update={"input": port.name})
    sample = bundling.sample(said, found.task.train.images)
    task = found.task
    scores = multitask.scores(task, multitask.evidence(found.net, task, task.val))
    return Job(found.net, found.origin, (port,), sample, said, asked, scores)


def _made_up(port: Port, seed: int) -> np.ndarray:
    """Normal noise; of whole numbers 0 and 1, which are inside most tables and masks, 1 first."""
    rng = np.random.default_rng(seed)
    if port.type == "float32":
        return rng.standard_normal((EXAMPLES, *port.sizes)).astype(np.float32)
    found = rng.integers(0, 2, (EXAMPLES, *port.sizes))
    found[..., :1] = 1
    return found


@torch.no_grad()
def _try(net: nn.Module, sample: Feeds, model: str) -> None:
    try:
        outputs = named(net(*(torch.from_numpy(values[:1]) for values in sample.values())))
    except (RuntimeError, TypeError, ValueError, IndexError, KeyError, AttributeError) as error:
        said = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise NasctlError(
            f"it does not run on those inputs ({said})",
            where=model,
            next="Name them in the order of its forward call, in sizes that it takes.",
        ) from error
    if not outputs:
        raise NasctlError("it gives no tensors", where=model)


# ---- what is done --------------------------------------------------------------------------------


def export(job: Job, folder: Path) -> tuple[Bundle, float]:
    """Write a new bundle, whole or not at all; also the largest difference between its file and
    the network.

    Raises ParityFailed where they differ by more than rounding.
    """
    if folder.exists():
        raise UsageError("exists already", where=f"--out {folder}", next="Name a new folder.")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        made = tempfile.TemporaryDirectory(dir=folder.parent, prefix=".export-")
    except OSError as error:
        raise NasctlError(f"cannot write: {error.strerror}", where=f"--out {folder}") from error
    with made:
        whole = Path(made.name) / "bundle"
        whole.mkdir()
        error_found = _written(job, whole / bundling.FLOAT)
        sealed = bundling.seal(whole, _contents(job, error_found))
        whole.rename(folder)
    return Bundle(folder, sealed.manifest), error_found


def _written(job: Job, path: Path) -> float:
    """The file, and how far it is from the network."""
    examples = {port.name: _example(port) for port in job.ports}
    free = {port.name: port.axes for port in job.ports}
    onnx.export_inputs(job.net, path, examples, free, metadata=_metadata(job))
    sizes = (1, 3, EXAMPLES) if job.ports[0].free[0] else (1,)
    return verify.parity_inputs(job.net, path, job.sample, batch_sizes=sizes)


def _contents(job: Job, error: float) -> bundling.Contents:
    report = {
        "nasctl": metadata.version("nasctl"),
        "origin": job.origin,
        "params": sum(parameter.numel() for parameter in job.net.parameters()),
        "parity": error,
        "environment": verify.environment(),
    }
    asked, sample = job.asked, job.sample
    return bundling.Contents(
        job.interface, job.origin, report, sample, asked.board, licence=asked.licence
    )


def _example(port: Port) -> Tensor:
    """To trace with. Batch 2: 1 would be taken as a constant."""
    batch = 2 if port.free[0] else 1
    return torch.ones(batch, *port.sizes, dtype=TYPES[port.type])


def _metadata(job: Job) -> dict[str, str]:
    sizes = {
        name: size
        for port in job.ports
        for name, size in zip(port.free[1:], port.sizes, strict=True)
        if name
    }
    asked, fed = job.asked, job.interface
    found = properties.of(
        {"model": asked.model, "weights_sha256": checkpoint.digest(job.net)},
        arch=job.origin,
        fed=fed,
        validation=job.validation,
        licence=asked.licence,
    )
    return {**found, SIZES: json.dumps(sizes)} if sizes else found
