"""The last stage of the main job: pick, extract, export, verify and report."""

from __future__ import annotations

import math
import statistics
import time
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import torch

from cli import budgets, bundling, child, console, stages, training
from cli.judges import Judge
from cli.stages import Job
from cli.training import ARCH
from deploy import interface, onnx, report, verify
from hw_profiles import energy, measure, op
from hw_profiles.latency import LatencyTable
from hw_profiles.runtimes import onnxruntime
from nas import checkpoint, file, search, supernet
from nas.elastic import Network, resize
from nas.errors import BudgetInfeasible, BudgetMissed, UsageError
from nas.outputs import ONLY
from nas.predictors import held_out
from nas.run import digest
from nas.search import Candidate
from nas.space import arch_to_dict

MODEL, WEIGHTS, REPORT, PAGE = (
    "bundle/model.onnx",
    "model.safetensors",
    "report.json",
    "report.html",
)
MEASURED, FINETUNE = "measured.json", "finetune.safetensors"
FINETUNE_LR = 0.5  # of the supernet's peak learning rate, where the network comes from one
STAGES = ("profile", "train", "search")  # before this one; what it does itself is in its own time
MARGIN = 1.02  # a file is measured twice, each time to about 2 %
ATTEMPTS = 5  # networks exported and measured before a local budget is given up


def deliver(
    job: Job, table: LatencyTable, judge: Judge, candidates: list[Candidate]
) -> dict[str, Any]:
    """Choose a network, train it on if asked, export it, run the file and write the report."""
    if job.run.done("deliver", _key(job, table)):
        content = verify.read(job.run.path(REPORT))
        _check_budget(job, content)
        return content
    began = time.monotonic()
    measured = _measured(job, table, candidates)
    extracted = candidate = _chosen(job, table, judge, candidates, measured)
    net = judge.child(np.array(candidate.genes))
    if job.spec.finetune:
        net, candidate = _finetuned(job, judge, net, candidate)
    delivery = _export(job, net, candidate, job.run.path(MODEL))
    described = child.describe(job, np.array(candidate.genes))
    checkpoint.write_described(job.run.path(WEIGHTS), net, described)
    seconds = time.monotonic() - began
    found = replace(
        _report(job, table, delivery, extracted, seconds),
        predictor=_predictor(job, candidates),
        front=[_row(job, table, c, measured) for c in search.front(candidates)],
        evaluated=[(c.latency_ms, c.cross_entropy, c.accuracy) for c in candidates],
    )
    found.write(job.run.path(REPORT))
    content = found.to_dict()
    report.write(content, job.run.path(PAGE))
    bundling.seal(job.run.path(bundling.FOLDER), _contents(job, table, delivery, content))
    job.run.finish("deliver", _key(job, table), seconds, [MODEL, WEIGHTS, REPORT, PAGE])
    job.run.path(FINETUNE).unlink(missing_ok=True)
    _check_budget(job, content)
    return content


def _check_budget(job: Job, content: dict[str, Any]) -> None:
    """The measurement of the final file has the last word; the report is kept either way."""
    budget, measured = job.spec.latency_ms, content["chosen"]["latency"]["measured"]
    if budget is not None and measured and measured["median_ms"] > budget:
        raise BudgetMissed(
            f"the final file took {console.format_ms(measured['median_ms'])}, the budget is "
            f"{console.format_ms(budget)} {measured['noisy'] and '(' + measured['noisy'] + ')'}",
            where=str(job.run.path(REPORT)),
            next="Run `nasctl export` with a smaller --latency for another network of this run.",
        )


def _key(job: Job, table: LatencyTable) -> str:
    after = job.spec.digest("evaluations", "finetune", "lr", "batch", "threads")
    return digest([stages.search_key(job, table), after])


def _measured(job: Job, table: LatencyTable, candidates: list[Candidate]) -> dict[int, float]:
    """slot -> measured median in ms, on a local device, of the front and of all that may fit.

    Timed as the networks of their op lists with random weights; the chosen network is timed again
    as the exported file. Kept in the run, so that a run that goes on chooses the same network.
    """
    if not job.device.local:
        return {}
    stages.staged(job, "measure", _key(job, table), [MEASURED], lambda: _measure(job, candidates))
    return {int(slot): ms for slot, ms in job.run.read_json(MEASURED).items()}


def _measure(job: Job, candidates: list[Candidate]) -> None:
    budget = job.spec.latency_ms
    near = [c for c in candidates if budget is not None and c.latency_ms <= budget * 1.5]
    wanted = {c.slot: c for c in [*search.front(candidates), *near]}
    networks = [job.space.ops(job.space.decode(np.array(c.genes))) for c in wanted.values()]
    with console.bar("measuring the front", 1.0) as update:
        timings = measure.measure_ops(
            networks,
            rng=np.random.default_rng((job.spec.seed, 6)),
            plan=measure.Plan(time_limit_s=30),
            pace=_pace(job),
            progress=lambda share: update(share, ""),
        )
    found = {slot: timing.median_ms for slot, timing in zip(wanted, timings, strict=True)}
    job.run.write_json(MEASURED, found)


def _chosen(
    job: Job,
    table: LatencyTable,
    judge: Judge,
    candidates: list[Candidate],
    measured: dict[int, float],
) -> Candidate:
    """The best inside the budget; its architecture is in arch.json.

    On this machine the exported file is timed, and if it misses the budget the next best is tried.
    Raises BudgetMissed after ATTEMPTS of them.
    """

    def work() -> None:
        candidate = _first_inside(job, judge, _order(job, candidates, measured), measured)
        job.run.write_json(ARCH, search.as_dict(candidate, job.space))

    stages.staged(job, "choose", _key(job, table), [ARCH], work)
    slot = job.run.read_json(ARCH)["slot"]
    return next(c for c in candidates if c.slot == slot)


def _order(job: Job, candidates: list[Candidate], measured: dict[int, float]) -> list[Candidate]:
    """Best first. A measured median replaces an estimate: then it, not an interval, must fit."""
    budget = job.spec.latency_ms
    if budget is None or not measured:
        return search.ranked(candidates, budget, limited=budgets.stated(job.spec) is not None)
    fits = [c for c in candidates if measured.get(c.slot, np.inf) * MARGIN <= budget]
    return sorted(fits, key=lambda c: (c.cross_entropy, c.latency_ms))


def _first_inside(
    job: Job, judge: Judge, order: list[Candidate], measured: dict[int, float]
) -> Candidate:
    budget = job.spec.latency_ms
    if order and (budget is None or not job.device.local):
        return order[0]
    found: list[float] = []
    ratio = 1.0  # how much slower a file is, call by call, than its graph was at its fastest
    for candidate in order:
        assert budget is not None
        if measured[candidate.slot] * ratio * MARGIN > budget or len(found) == ATTEMPTS:
            continue
        net = judge.child(np.array(candidate.genes))
        delivery = _export(job, net, candidate, job.run.path(MODEL))
        assert delivery.measured is not None
        found.append(delivery.measured.timing.median_ms)
        if found[-1] * MARGIN <= budget:
            return candidate
        ratio = max(ratio, found[-1] / measured[candidate.slot])
    detail = f"; the files took {', '.join(map(console.format_ms, found))}" if found else ""
    keeping = "" if job.spec.alone else f", with --supernet {job.run.folder} to keep it"
    raise BudgetMissed(
        f"no evaluated network was measured inside {budget:g} ms{detail}",
        where="--latency",
        next=f"Raise the budget or --evaluations{keeping}.",
    )


def _finetuned(
    job: Job, judge: Judge, net: Network, candidate: Candidate
) -> tuple[Network, Candidate]:
    """The chosen network trained on alone from the weights it was judged by, and its new validation
    score. It goes on where it was interrupted."""
    recipe = job.recipe
    steps = max(1, round(job.spec.finetune * len(job.task.train) / recipe.batch))
    start = digest([candidate.genes, job.weights_key])
    rate, seed = recipe.lr * (1 if job.spec.alone else FINETUNE_LR), recipe.seed + 1
    recipe = replace(recipe, steps=steps, lr=rate, seed=seed, start=start)
    state = job.run.path(FINETUNE)
    steps_of = supernet.train(net, supernet.alone(net), job.task, recipe, resume=state)
    training.follow(steps_of, steps, "fine-tuning the chosen one")
    supernet.calibrate(net, judge.calibration, net.arch.resolution)
    score = judge.score(net, net.arch.resolution)
    if score.cross_entropy > candidate.cross_entropy:
        console.say("fine-tuning made it worse on validation: what it began with is kept")
        return judge.child(np.array(candidate.genes)), candidate
    return net, replace(candidate, cross_entropy=score.cross_entropy, accuracy=score.accuracy)


def export_one(
    job: Job, judge: Judge, candidates: list[Candidate], out: Path, slot: int | None
) -> dict[str, Any]:
    """Export the network of `slot`, or the best inside the spec's budget; returns what is known.

    Its accuracy is the search's own, on validation images: comparing several exports on test would
    make a validation set of it.
    """
    if slot is not None:
        order = [c for c in candidates if c.slot == slot]
        if not order:
            allowed = ", ".join(str(c.slot) for c in search.front(candidates))
            raise UsageError(f"no network {slot} in the run", where="--slot", allowed=allowed)
    else:
        order = search.ranked(candidates, job.spec.latency_ms)
        if not order:
            least = min((c.high_ms for c in candidates), default=np.inf)
            raise BudgetInfeasible(
                f"no evaluated network fits; the fastest needs {console.format_ms(least)}",
                where="--latency",
            )
    delivery = _export(job, judge.child(np.array(order[0].genes)), order[0], out)
    measured, budget = delivery.measured, job.spec.latency_ms
    if slot is None and measured and budget and measured.timing.median_ms > budget:
        raise BudgetMissed(
            f"{out} was written and took {console.format_ms(measured.timing.median_ms)}",
            where="--latency",
            next="Ask for a little less, or name another network with --slot.",
        )
    return {
        "path": str(out),
        **search.as_dict(order[0], job.space),
        "parity_error": delivery.parity_error,
        "measured": None if delivery.measured is None else asdict(delivery.measured),
    }


@dataclass(frozen=True)
class Delivery:
    """A network as a file: what was found when the file was run."""

    candidate: Candidate
    net: Network
    measured: verify.Measured | None
    parity_error: float


def _export(job: Job, net: Network, candidate: Candidate, path: Path) -> Delivery:
    arch, net = net.arch, net.cpu()  # which from here on is what the file computes
    shape = (job.task.channels, arch.resolution, arch.resolution)
    said = child.said(job, np.array(candidate.genes), {"accuracy": candidate.accuracy})
    onnx.export(net, path, input_shape=shape, metadata=said)
    images = _inputs(job, job.task.val.images[:64], arch.resolution)
    error = verify.parity(net, path, images)
    return Delivery(candidate, net, _time(job, path), error)


def _pace(job: Job) -> measure.Pace:
    """How fast this machine was when the run's table was made: what counts as quiet now."""
    path = job.run.path(stages.TABLE)
    said = LatencyTable.load(path).provenance if path.exists() else {}
    return measure.Pace(float(said.get("pace_ms", math.inf)))


def _time(job: Job, path: Path) -> verify.Measured | None:
    """Latency of the file, where the device is this machine."""
    if not job.device.local:
        return None
    # Medians of calls in a row, not the fastest: what a user's own loop over the file will show.
    # (The first calls after other work are slower, up to twice on 0.1 ms networks; p95 has them.)
    plan = measure.Plan(inner=50, per_round=statistics.median, rounds=10, time_limit_s=10)
    rng = np.random.default_rng((job.spec.seed, 7))
    timing = verify.latency(path, rng=rng, plan=plan, pace=_pace(job))
    runtime = f"ONNX Runtime {onnxruntime.version()}, 1 thread, batch 1"
    return verify.Measured(timing, job.device.name, runtime)


def _inputs(job: Job, images: torch.Tensor, resolution: int) -> np.ndarray:
    return resize(job.task.normalise(images), resolution).numpy()


def _report(
    job: Job, table: LatencyTable, delivery: Delivery, extracted: Candidate, seconds: float
) -> verify.Report:
    """Test accuracy is read here, once, for the chosen network."""
    candidate = delivery.candidate
    arch = job.space.decode(np.array(candidate.genes))
    ops = job.space.ops(arch)
    task, test = job.task, job.task.test
    path = job.run.path(MODEL)
    macs, params = stages.cost(job, candidate)
    own = supernet.evaluate(delivery.net, job.task, test, arch.resolution)
    inputs = _inputs(job, test.images, arch.resolution)
    logits = verify.outputs(path, inputs, threads=job.spec.threads)[ONLY]
    joules = energy.stored(job.device)
    chosen = verify.Chosen(
        arch=arch_to_dict(arch),
        genes=candidate.genes,
        macs=macs,
        params=params,
        activation_bytes=op.peak_activation_bytes(ops, job.device.itemsize),
        val_ce=candidate.cross_entropy,
        val_accuracy=candidate.accuracy,
        extracted_val_accuracy=extracted.accuracy,
        torch_test_accuracy=own.accuracy,
        test_accuracy=float(task.metric(torch.from_numpy(logits), test.labels)),
        predicted=table.estimate(ops, job.spec.space),
        energy=joules.estimate(ops, job.spec.space) if joules else None,
        measured=delivery.measured,
        file={**file.record(path), "path": MODEL},
        parity_error=delivery.parity_error,
    )
    done = job.run.manifest()["stages"]
    spent = [verify.Stage(name, record["seconds"]) for name, record in done.items()]
    return verify.Report(
        nasctl=metadata.version("nasctl"),
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        spec=job.spec.model_dump(),
        device={**job.device.model_dump(mode="json"), "table_origin": table.origin},
        chosen=chosen,
        budget=budgets.stated(job.spec),
        stages=[*(s for s in spent if s.name in STAGES), verify.Stage("deliver", seconds)],
        notes=_notes(job, table),
        environment=verify.environment(),
    )


def _contents(
    job: Job, table: LatencyTable, delivery: Delivery, content: dict[str, Any]
) -> bundling.Contents:
    found = interface.of_task(job.task, job.spec.data, job.spec.size, delivery.net.arch.resolution)
    arch = search.as_dict(delivery.candidate, job.space)
    key = digest(table.model_dump(mode="json"))
    sample = bundling.sample(found, job.task.train.images)
    licence = job.spec.licence
    return bundling.Contents(found, arch, content, sample, job.device, key, licence)


def _predictor(job: Job, candidates: list[Candidate]) -> dict[str, Any] | None:
    """How well the accuracy predictor did, if the search used one."""
    if job.spec.strategy != "predictor":
        return None
    return held_out.record(job.space, candidates, job.spec.seed)


def _notes(job: Job, table: LatencyTable) -> list[str]:
    """What a reader might take for better founded than it is."""
    interval = table.interval(job.spec.space)
    notes = []
    if interval.coverage is not None:
        covered = f"covered {interval.coverage:.0%} of {interval.n} held-out measurements"
        notes.append(f"the latency interval: {interval.how}; it {covered}")
    if joules := energy.stored(job.device):
        notes.append(f"energy: predicted, not measured; {joules.interval(job.spec.space).how}")
    if job.device.local:
        notes.append(
            "latencies in the front's table: measured as graphs of the same operators with random "
            "weights; only the chosen network was timed as its exported file"
        )
    return notes


def _row(
    job: Job, table: LatencyTable, candidate: Candidate, measured: dict[int, float]
) -> dict[str, Any]:
    arch = job.space.decode(np.array(candidate.genes))
    estimate = table.estimate(job.space.ops(arch), job.spec.space)
    macs, params = stages.cost(job, candidate)
    return {
        "slot": candidate.slot,
        "genes": list(candidate.genes),
        "arch": arch_to_dict(arch),
        "arch_text": stages.describe_arch(arch),
        "macs": macs,
        "params": params,
        "val_ce": candidate.cross_entropy,
        "val_accuracy": candidate.accuracy,
        "latency_ms": estimate.value_ms,
        "low_ms": estimate.low_ms,
        "high_ms": estimate.high_ms,
        "source": estimate.source,
        "measured_ms": measured.get(candidate.slot),
    }
