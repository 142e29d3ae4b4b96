"""What `nasctl verify` does."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
from torch import nn

from cli import building, bundling, console, judging, quantizing, several
from cli.bundling import Feeds
from cli.judging import Judge, Run
from cli.prune import parse_drops
from deploy import bundle as bundles
from deploy import chain
from deploy import engine as engines
from deploy import onnx as files
from deploy import verify as deployed
from deploy.bundle import Bundle
from deploy.chain import Link, Outputs
from hw_profiles import device, half, processes, runtimes
from hw_profiles.device import Device
from hw_profiles.measure import Plan, Setting
from nas import checkpoint, file
from nas.data.examples import Examples
from nas.errors import NasctlError, UsageError
from nas.outputs import named as outputs_of
from nas.run import Run as RunFolder

WEIGHTS = "model.safetensors"
MEASURING = Plan(rounds=10, time_limit_s=10.0)
PLAIN = "onnxruntime"
Scores = dict[str, dict[str, float]]  # by task
COMPARED = "network = ONNX: it was compared when the file was written"


@dataclass(frozen=True)
class Asked:
    """What was typed."""

    board: Device
    engine: str | None
    latency_ms: float | None
    memory_bytes: float | None
    data: str | None
    split: str


@dataclass(frozen=True)
class Delivered:
    """The file that is judged and measured: the bundle's model, or the engine that was named."""

    path: Path
    runtime: str
    precision: str | None
    threads: int

    def runner(self) -> Run:
        return judging.runner(
            self.path, self.runtime, threads=self.threads, precision=self.precision
        )


@dataclass
class Compared:
    """The chain from the network to what is delivered."""

    delivered: Delivered
    links: list[Link]
    notes: list[str]  # links that were not compared, and why
    why: str = ""  # the delivered file cannot be run here; empty where it can


@dataclass(frozen=True)
class Promised:
    """The bound that `nasctl quantize` held."""

    drops: dict[str, float]  # relative, by task
    seed: int  # of the images that it held it on
    board: str  # the device that it held it for


def verify(bundle: Bundle, named: Path, asked: Asked) -> dict[str, Any]:
    """Everything that was found; nothing is raised for what it finds, see `verdict.require`."""
    if asked.split not in ("val", "test"):
        raise UsageError(f"unknown split '{asked.split}'", where="--split", allowed="val, test")
    inputs = _inputs(bundle)
    compared = _compared(bundle, named, asked, inputs)
    delivered = compared.delivered
    scores: Scores | None = None
    bound: Scores = {}
    measured = None
    if compared.why:
        missing = [f"metric, latency and memory: {compared.why}"]
    else:
        scores, bound, missing = _scores(bundle, delivered, asked)
        measured = _measured(delivered, asked, inputs)
        if measured is None:
            missing.append(f"latency and memory: {asked.board.name} is not this machine")
    budget_ms, elsewhere = _budget(bundle, asked)
    return {
        "nasctl": bundle.manifest.nasctl,
        "bundle": bundles.identity(bundle),
        "file": {**file.record(delivered.path), "runtime": delivered.runtime},
        "chain": [
            {**asdict(one), "tolerance": one.tolerance, "holds": one.holds}
            for one in compared.links
        ],
        "metric": scores,
        "bound": bound,
        "split": asked.split,
        "measured": measured,
        "budget": {"latency_ms": budget_ms, "memory_bytes": asked.memory_bytes},
        "device": asked.board.name,
        "not_measured": [*compared.notes, *missing, *elsewhere],
        "environment": deployed.environment(),
    }


def _compared(bundle: Bundle, named: Path, asked: Asked, inputs: Feeds) -> Compared:
    """Every link: before the float file, to the delivered one, to the engine that was named."""
    plain = bundle.path(bundling.FLOAT)
    expected = judging.runner(plain, PLAIN)(inputs)
    links, notes = _before(bundle, named, asked.data, inputs, expected)
    delivered = Delivered(bundle.model, PLAIN, None, 1)
    why = _unloadable(delivered)
    if why:
        notes.append(f"float file = delivered file: {why}")
    elif bundle.model != plain:
        lower = _lower(delivered.path)
        links.append(_link("float file = delivered file", delivered, inputs, expected, lower))
    found = Compared(delivered, links, notes, why)
    if asked.engine is not None:
        _to_engine(bundle, asked.engine, inputs, found)
    return found


def _to_engine(bundle: Bundle, engine: str, inputs: Feeds, found: Compared) -> None:
    """Go on to an engine, which is then what is delivered. Raises NasctlError for one that does not
    belong to this machine or this bundle."""
    path = building.named(bundle, engine)
    _, car = engines.load(path)  # which checks that it belongs here
    source = Delivered(bundle.path(car.model), PLAIN, None, 1)
    if bundle.manifest.members[car.model].sha256 != car.model_sha256:
        raise NasctlError(
            f"was built from another {car.model}",
            where=str(path),
            next="Build it again: nasctl build.",
        )
    loads = None if car.runtime == PLAIN else car.requested
    found.delivered, found.why = Delivered(path, car.runtime, loads, car.threads), ""
    name = f"{car.model} = engine"
    if unread := _unloadable(source):
        found.notes.append(f"{name}: {unread}")
    else:
        expected = source.runner()(inputs)
        found.links.append(_link(name, found.delivered, inputs, expected, car.observed))


def _inputs(bundle: Bundle) -> Feeds:
    """What all forms are compared on. Raises NasctlError for values that compare nothing."""
    found = bundling.sample_of(bundle)
    for name, values in found.items():
        if values.dtype.kind == "f" and not np.isfinite(values).all():
            raise NasctlError(
                f"input '{name}' of its examples holds values that are not finite",
                where=str(bundle.folder),
                next="Export it again: nothing can be compared on such inputs.",
            )
    return found


def _lower(path: Path) -> str | None:
    """The half precision that an ONNX file says it computes in, by the types of its weights: ONNX
    Runtime on processors casts, and is seen to compute in float32. None of any other file."""
    if path.name not in quantizing.HALVES.values():
        return None
    kinds = {tensor.data_type for tensor in files.read(path).graph.initializer}
    return next((name for name, code in half.CODES.items() if code in kinds), None)


def _unloadable(file: Delivered) -> str:
    """Why a half-precision file cannot be run here, as bfloat16 in ONNX Runtime; else empty."""
    if _lower(file.path) is None:
        return ""
    try:
        file.runner()
    except NasctlError as error:
        return str(error)
    return ""


def _link(
    name: str, after: Delivered, inputs: Feeds, before: Outputs, observed: str | None = None
) -> Link:
    """One link of the chain, at batch 1 as engines are built for."""
    run = after.runner()
    parts = [run(one) for one in judging.singly(inputs)]
    found = {key: np.concatenate([part[key] for part in parts]) for key in parts[0]}
    if observed is None:
        module = runtimes.load_module(after.runtime)
        observed = module.observed_precision(module.load(after.path, threads=after.threads))
    return chain.link(name, chain.coarsest(observed), before, found)


def _before(
    bundle: Bundle, named: Path, data: str | None, inputs: Feeds, expected: Outputs
) -> tuple[list[Link], list[str]]:
    """The links before the ONNX file, where the run with its weights and its data are at hand."""
    weights = named / WEIGHTS
    if not named.is_dir() or not weights.is_file():
        theirs = bundling.ARCH in bundle.manifest.members and "model" in _arch(bundle)
        return [], [COMPARED if theirs else "supernet = extracted = ONNX: the run is not here"]
    _, meta = checkpoint.read(weights)
    if several.described(meta, weights):
        try:
            net = several.read(weights, data).net
        except NasctlError as error:
            if data is not None:
                raise
            return [], [f"network = ONNX: {error}"]
        return [_exported(net, inputs, expected)], []
    if not meta or "network" not in checkpoint.description(meta, weights):
        return [], [COMPARED]
    from cli import child, training

    try:
        opened, genes, net = child.read(weights, data)
    except NasctlError as error:
        if data is not None:
            raise
        return [], [f"supernet = extracted = ONNX: {error}"]
    links = [_exported(net, inputs, expected)]
    run = RunFolder(named)
    spec = run.manifest().get("spec", {})
    if spec.get("alone") or spec.get("supernet") or not run.unchanged("train"):
        return links, ["supernet = extracted: there is no supernet in this run, or another by now"]
    _, apart = child.extracted(opened, training.finished_supernet(opened), genes)
    return [Link("supernet = extracted", "fp32", apart), *links], []


def _arch(bundle: Bundle) -> dict[str, Any]:
    found: dict[str, Any] = deployed.read(bundle.path(bundling.ARCH))
    return found


def _exported(net: nn.Module, inputs: Feeds, expected: Outputs) -> Link:
    with torch.no_grad():
        outputs = outputs_of(net(*map(torch.from_numpy, inputs.values())))
    found = {name: tensor.numpy() for name, tensor in outputs.items()}
    return chain.link("network = float file", "fp32", found, expected)


def _scores(
    bundle: Bundle, delivered: Delivered, asked: Asked
) -> tuple[Scores | None, Scores, list[str]]:
    """Each task's metric, of the float file and of what is delivered; the same on the images that
    the bound of `nasctl quantize` was held on, where there is one; and what is not told."""
    try:
        judge = judging.judge(bundling.interface_of(bundle), asked.data)
    except NasctlError as error:
        if asked.data is not None:
            raise
        return None, {}, [f"metric: {error}"]
    runs = Delivered(bundle.path(bundling.FLOAT), PLAIN, None, 1).runner(), delivered.runner()
    found = _scored(judge, runs, judge.task.splits[asked.split])
    names = [goal.name for goal in judge.task.goals]
    notes = [f"metric: no {asked.split} image has a label of {n}" for n in names if n not in found]
    held, why = _held(bundle, delivered, judge, asked.board)
    return found, held, [*notes, *why, *_undefined("metric", found), *_undefined("bound", held)]


def _held(
    bundle: Bundle, delivered: Delivered, judge: Judge, board: Device
) -> tuple[Scores, list[str]]:
    """Scores on the images that the bound of `nasctl quantize` was held on, in the runtime that it
    was held in, where there is one; an engine stays in its own. And why there are none."""
    promised = _promised(bundle, [goal.name for goal in judge.task.goals])
    if promised is None:
        return {}, []
    try:
        runtime = quantizing.judging_runtime(
            board if promised.board == board.name else device.load(promised.board)
        )
        if missing := runtimes.load_module(runtime).unavailable():
            return {}, [f"bound: {promised.board} runs {runtime}: {missing}"]
    except NasctlError as error:
        return {}, [f"bound: {error}"]
    plain = Delivered(bundle.path(bundling.FLOAT), runtime, None, 1)
    if delivered.path == bundle.model:
        delivered = replace(delivered, runtime=runtime)
    runs = plain.runner(), delivered.runner()
    deciding = _scored(judge, runs, judge.halves(promised.seed)[0])
    return {name: {**each, "max_drop": promised.drops[name]} for name, each in deciding.items()}, []


def _undefined(what: str, found: Scores) -> list[str]:
    """Metrics that are no number even of the float file: they say nothing of what is delivered."""
    return [
        f"{what}: {name} of the float file is {both['float']} on these images"
        for name, both in found.items()
        if not math.isfinite(both["float"])
    ]


def _scored(judge: Judge, runs: tuple[Run, Run], images: Examples) -> Scores:
    """Of the float file and the delivered one, of the tasks that any image is labelled for."""
    plain, delivered = (judge.scores(run, images) for run in runs)
    return {
        goal.name: {
            "float": plain[goal.name],
            "delivered": delivered[goal.name],
            "images": len(images),
        }
        for goal in judge.task.goals
        if goal.labelled is None or goal.labelled(images.targets).any()
    }


def _promised(bundle: Bundle, names: list[str]) -> Promised | None:
    if quantizing.REPORT not in bundle.manifest.members:
        return None
    path = bundle.path(quantizing.REPORT)
    said = deployed.read(path)
    drops, seed, board = said.get("max_drop"), said.get("seed"), said.get("board")
    if not isinstance(drops, str) or not isinstance(seed, int) or not isinstance(board, str):
        raise NasctlError("says no bound, no seed or no board", where=str(path))
    return Promised(parse_drops(drops, names), seed, board)


def _measured(delivered: Delivered, asked: Asked, inputs: Feeds) -> dict[str, Any] | None:
    if not asked.board.local:
        return None
    timing = deployed.latency(
        delivered.path,
        rng=np.random.default_rng(0),
        setting=Setting(delivered.runtime, delivered.precision, delivered.threads),
        plan=MEASURING,
    )
    return {**asdict(timing), "memory_bytes": memory(delivered, next(judging.singly(inputs)))}


def memory(delivered: Delivered, inputs: Feeds) -> int:
    """Bytes by which a fresh process that has the libraries grows for this model."""
    with processes.fresh() as pool:
        return pool.submit(_grown, delivered, inputs).result()


def _grown(delivered: Delivered, inputs: Feeds) -> int:
    runtimes.load_module(delivered.runtime).version()  # imports the library
    process = psutil.Process()
    before = process.memory_info().rss
    run = delivered.runner()
    run(inputs)
    return int(process.memory_info().rss - before)


def _budget(bundle: Bundle, asked: Asked) -> tuple[float | None, list[str]]:
    """What was typed, else what the bundle's run was asked for if that was of this device; and
    what is not held to."""
    if asked.latency_ms is not None or bundling.REPORT not in bundle.manifest.members:
        return asked.latency_ms, []
    report = deployed.read(bundle.path(bundling.REPORT))
    found = (report.get("budget") or {}).get("latency_ms")
    device = (report.get("device") or {}).get("name")
    if found is None or device == asked.board.name:
        return None if found is None else float(found), []
    return None, [f"the run's budget of {console.format_ms(found)}: it is for {device}"]
