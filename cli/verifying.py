"""What `nasctl verify` does."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import psutil

from cli import building, bundling, console, judging, origins, quantizing
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
from nas import file
from nas.data.examples import Examples
from nas.errors import NasctlError, UsageError

MEASURING = Plan(rounds=10, time_limit_s=10.0)
PLAIN = "onnxruntime"
Scores = dict[str, dict[str, Any]]  # by task


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
    built_for: str | None = None  # the device that this machine is, as the engine's side-car says


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
        if asked.board.local or asked.board.name == compared.built_for:
            measured = _measured(delivered, inputs)
        else:
            missing.append(f"latency and memory: {_elsewhere(asked)}")
    budget_ms, elsewhere = _budget(bundle, asked)
    return {
        "nasctl": bundle.manifest.nasctl,
        "bundle": bundles.identity(bundle),
        "file": {**file.record(delivered.path), "runtime": delivered.runtime},
        "chain": [_told(one) for one in compared.links],
        "metric": scores,
        "bound": bound,
        "split": asked.split,
        "measured": measured,
        "budget": {"latency_ms": budget_ms, "memory_bytes": asked.memory_bytes},
        "device": asked.board.name,
        "not_measured": [*compared.notes, *missing, *elsewhere],
        "environment": deployed.environment(),
    }


def _told(one: Link) -> dict[str, Any]:
    measured = {"error": one.error, "gain": one.gain}
    allowed = {"tolerance": one.tolerance, "holds": one.holds}
    return {"name": one.name, "precision": one.precision, **measured, **allowed}


def _compared(bundle: Bundle, named: Path, asked: Asked, inputs: Feeds) -> Compared:
    """Every link: before the float file, to the delivered one, to the engine that was named."""
    plain = bundle.onnx(bundling.FLOAT)
    expected = judging.runner(plain, PLAIN)(inputs)
    links, notes = origins.links(bundle, named, asked.data, inputs, expected)
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
    session, car = engines.load(path)  # which checks that it belongs here
    source = Delivered(bundle.onnx(car.model), PLAIN, None, 1)
    if bundle.manifest.members[car.model].sha256 != car.model_sha256:
        raise NasctlError(
            f"was built from another {car.model}",
            where=str(path),
            next="Build it again: nasctl build.",
        )
    loads = None if car.runtime == PLAIN else car.requested
    found.delivered, found.why = Delivered(path, car.runtime, loads, car.threads), ""
    if not engines.differences(car):  # a compatible engine may be loaded on other machines too
        found.built_for = car.device
    name = f"{car.model} = engine"
    if unread := _unloadable(source):
        found.notes.append(f"{name}: {unread}")
        return
    expected, limit = source.runner()(inputs), math.inf
    if _lower(source.path) == "int8":  # both sides are the same quantized network
        plain = judging.runner(bundle.onnx(bundling.FLOAT), PLAIN)(inputs)
        from_float = chain.link(f"{bundling.FLOAT} = {car.model}", "int8", plain, expected).error
        limit, observed = chain.built(from_float), "int8"
    else:
        # ONNX Runtime's own format cannot be looked into, so it is the same graph that is asked
        seen = session if car.runtime != PLAIN else runtimes.load_module(PLAIN).load(source.path)
        observed = runtimes.load_module(car.runtime).observed_precision(seen)
    found.links.append(_link(name, found.delivered, inputs, expected, observed, limit))


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
    """The lower precision that an ONNX file says it computes in, which ONNX Runtime on processors
    may compute in float32 all the same: int8 by its Q/DQ pairs, a half of our making by the types
    of its weights. None of any other file."""
    graph = files.read(path).graph
    if any(node.op_type == "QuantizeLinear" for node in graph.node):
        return "int8"
    if path.name not in quantizing.HALVES.values():
        return None
    kinds = {tensor.data_type for tensor in graph.initializer}
    return next((name for name, code in half.CODES.items() if code in kinds), None)


def _unloadable(file: Delivered) -> str:
    """Why a half-precision file cannot be run here, as bfloat16 in ONNX Runtime; else empty."""
    if _lower(file.path) not in half.CODES:
        return ""
    try:
        file.runner()
    except NasctlError as error:
        return str(error)
    return ""


def _link(
    name: str,
    after: Delivered,
    inputs: Feeds,
    before: Outputs,
    observed: str | None = None,
    limit: float = math.inf,
) -> Link:
    """One link of the chain, at batch 1 as engines are built for."""
    run = after.runner()
    parts = [run(one) for one in judging.singly(inputs)]
    found = {key: np.concatenate([part[key] for part in parts]) for key in parts[0]}
    if observed is None:
        module = runtimes.load_module(after.runtime)
        observed = module.observed_precision(module.load(after.path, threads=after.threads))
    return chain.link(name, chain.coarsest(observed), before, found, limit)


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
    runs = Delivered(bundle.onnx(bundling.FLOAT), PLAIN, None, 1).runner(), delivered.runner()
    found = _scored(judge, runs, judge.task.splits[asked.split])
    names = [goal.name for goal in judge.task.goals]
    notes = [f"metric: no {asked.split} image has a label of {n}" for n in names if n not in found]
    held, why = _held(bundle, delivered, judge, asked.board)
    return found, held, [*notes, *why, *_undefined("metric", found), *_undefined("bound", held)]


def _held(
    bundle: Bundle, delivered: Delivered, judge: Judge, board: Device
) -> tuple[Scores, list[str]]:
    """Scores on the images that the bound of `nasctl quantize` was held on, in the runtime that it
    was held in, where there is one, and on the others ("told"), which decided nothing; an engine
    stays in its own. And why there are none."""
    promised = _promised(bundle, [goal.name for goal in judge.task.goals])
    if promised is None:
        return {}, []
    try:
        typed = promised.board == board.name
        runtime = quantizing.judging_runtime(board if typed else device.named(promised.board))
        module = runtimes.load_module(runtime)
        if missing := module.unavailable():
            return {}, [f"bound: {promised.board} runs {runtime}: {missing}"]
        if not typed and module.SUFFIX != bundles.ONNX:
            return {}, [f"bound: {promised.board} runs {runtime}, native code: name it with --hw"]
    except NasctlError as error:
        return {}, [f"bound: {error}"]
    plain = Delivered(bundle.onnx(bundling.FLOAT), runtime, None, 1)
    if delivered.path == bundle.model:
        delivered = replace(delivered, runtime=runtime)
    runs = plain.runner(), delivered.runner()
    deciding, told = (_scored(judge, runs, half) for half in judge.halves(promised.seed))
    found = {
        name: {**each, "max_drop": promised.drops[name], "told": told.get(name)}
        for name, each in deciding.items()
    }
    return found, []


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


def _elsewhere(asked: Asked) -> str:
    name = asked.board.name
    if asked.engine is None:
        return f"{name} is not this machine"
    return f"the engine was not built on this machine for {name} (--hw)"


def _measured(delivered: Delivered, inputs: Feeds) -> dict[str, Any]:
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
