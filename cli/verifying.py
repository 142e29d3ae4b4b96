"""What `nasctl verify` does."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
from torch import nn

from cli import building, bundling, console, judging, several
from cli.bundling import Feeds
from cli.judging import Run
from cli.quantizing import HALVES
from deploy import bundle as bundles
from deploy import chain
from deploy import engine as engines
from deploy import onnx as files
from deploy import verify as deployed
from deploy.bundle import Bundle
from deploy.chain import Link, Outputs
from hw_profiles import half, processes, runtimes
from hw_profiles.device import Device
from hw_profiles.measure import Plan, Setting
from nas import checkpoint, file
from nas.errors import BudgetMissed, NasctlError, UsageError
from nas.outputs import named as outputs_of
from nas.run import Run as RunFolder

WEIGHTS = "model.safetensors"
MEASURING = Plan(rounds=10, time_limit_s=10.0)
PLAIN = "onnxruntime"
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


def verify(bundle: Bundle, named: Path, asked: Asked) -> dict[str, Any]:
    """Everything that was found; nothing is raised for what it finds, see `require`."""
    if asked.split not in ("val", "test"):
        raise UsageError(f"unknown split '{asked.split}'", where="--split", allowed="val, test")
    inputs = bundling.sample_of(bundle)
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
    if asked.engine is not None:
        path = building.named(bundle, asked.engine)
        _, car = engines.load(path)  # which checks that it belongs here
        source = Delivered(bundle.path(car.model), PLAIN, None, 1)
        if bundle.manifest.members[car.model].sha256 != car.model_sha256:
            raise NasctlError(
                f"was built from another {car.model}",
                where=str(path),
                next="Build it again: nasctl build.",
            )
        loads = None if car.runtime == PLAIN else car.requested
        delivered = Delivered(path, car.runtime, loads, car.threads)
        name = f"{car.model} = engine"
        if unread := _unloadable(source):
            notes.append(f"{name}: {unread}")
        else:
            expected = source.runner()(inputs)
            links.append(_link(name, delivered, inputs, expected, car.observed))
        why = ""
    if why:
        scores, missing, measured = None, [f"metric, latency and memory: {why}"], None
    else:
        scores, missing = _scores(bundle, delivered, asked)
        measured = _measured(delivered, asked, inputs)
    if measured is None and not why:
        missing.append(f"latency and memory: {asked.board.name} is not this machine")
    budget_ms, elsewhere = _budget(bundle, asked)
    return {
        "nasctl": bundle.manifest.nasctl,
        "bundle": bundles.identity(bundle),
        "file": {**file.record(delivered.path), "runtime": delivered.runtime},
        "chain": [{**asdict(one), "tolerance": one.tolerance, "holds": one.holds} for one in links],
        "metric": scores,
        "split": asked.split,
        "measured": measured,
        "budget": {"latency_ms": budget_ms, "memory_bytes": asked.memory_bytes},
        "device": asked.board.name,
        "not_measured": [*notes, *missing, *elsewhere],
        "environment": deployed.environment(),
    }


def _lower(path: Path) -> str | None:
    """The half precision that an ONNX file says it computes in, by the types of its weights: ONNX
    Runtime on processors casts, and is seen to compute in float32. None of any other file."""
    if path.name not in HALVES.values():
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
) -> tuple[dict[str, Any] | None, list[str]]:
    """Each task's metric, of the float file and of what is delivered."""
    try:
        judge = judging.judge(bundling.interface_of(bundle), asked.data)
    except NasctlError as error:
        if asked.data is not None:
            raise
        return None, [f"metric: {error}"]
    images = judge.task.splits[asked.split]
    plain = Delivered(bundle.path(bundling.FLOAT), PLAIN, None, 1)
    both = [judge.scores(each.runner(), images) for each in (plain, delivered)]
    return {
        name: {"float": both[0][name], "delivered": both[1][name], "images": len(images)}
        for name in both[0]
    }, []


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


# ---- the outcome ---------------------------------------------------------------------------------


def beside(named: Path) -> Path:
    """Where the report goes: never into the bundle, which it would change."""
    named = named.resolve()
    folder = named if (named / bundling.FOLDER).is_dir() else named.parent
    return folder / ("verify.json" if folder == named else f"{named.stem}.verify.json")


def write(content: Mapping[str, Any], path: Path) -> None:
    file.write(path, (json.dumps(content, indent=1) + "\n").encode())


def say_outcome(content: Mapping[str, Any], path: Path) -> None:
    for one in content["chain"]:
        sign = "holds" if one["holds"] else "DOES NOT HOLD"
        console.say(
            f"{one['name']}: {one['error']:.1e} of the outputs' size, up to "
            f"{one['tolerance']:g} in {one['precision']}: {sign}",
            "chain",
        )
    for name, both in (content["metric"] or {}).items():
        console.say(
            f"{name} {both['delivered']:.4f} on {both['images']} {content['split']} images "
            f"(float file {both['float']:.4f})",
            "metric",
        )
    if (found := content["measured"]) is not None:
        budget = content["budget"]["latency_ms"]
        against = f", budget {console.format_ms(budget)}" if budget else ""
        console.say(
            f"median {console.format_ms(found['median_ms'])}, p95 "
            f"{console.format_ms(found['p95_ms'])}{against}",
            "latency",
        )
        console.say(f"{found['memory_bytes'] / 1e6:.1f} MB more than the library alone", "memory")
    for note in content["not_measured"]:
        console.say(f"not verified: {note}")
    console.say(str(path), "report")


def require(content: Mapping[str, Any], where: str) -> None:
    """Raises ParityFailed for a broken chain, then BudgetMissed for a budget missed."""
    chain.require([Link(one["name"], one["precision"], one["error"]) for one in content["chain"]])
    found, budget = content["measured"], content["budget"]
    if found is None:
        return
    limit, memory = budget["latency_ms"], budget["memory_bytes"]
    if limit is not None and found["median_ms"] > limit:
        raise BudgetMissed(
            f"took {console.format_ms(found['median_ms'])}, the budget is "
            f"{console.format_ms(limit)}",
            where=where,
        )
    if memory is not None and found["memory_bytes"] > memory:
        raise BudgetMissed(
            f"needs {found['memory_bytes'] / 1e6:.1f} MB, the budget is {memory / 1e6:.1f} MB",
            where=where,
        )
