"""The stages of the main job, each a function from values to values and files in the run.

profile -> train -> search -> deliver. A stage that the manifest knows as finished for the same
inputs is skipped; every stage goes on where it was interrupted.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from cli import budgets, console, training
from cli.training import STATE, SUPERNET, Training
from deploy import verify
from hw_profiles import latency as latencies
from hw_profiles import measure, op
from hw_profiles.device import Device
from hw_profiles.latency import LatencyTable
from hw_profiles.models import calibrate
from hw_profiles.op import Op
from nas import checkpoint, search, space, strategies
from nas import run as runs
from nas import study as studies
from nas.elastic import Network
from nas.errors import NasctlError, UsageError
from nas.search import Candidate, Problem
from nas.space import Genes, SearchSpace

PROFILED = 64  # networks measured to fit a local device's table
CLEAN = 24  # of them beyond doubt are enough

TABLE, JOURNAL, FRONT = "latency.json", "study.journal", "pareto.json"


@dataclass(frozen=True)
class Job(Training):
    """The resolved inputs of a run: everything that a stage needs and nothing it produces."""

    device: Device


def staged(
    job: Job, stage: str, key: str, files: list[str], work: Callable[[], None]
) -> float | None:
    """Do `work` unless it is done; return the seconds it took, or None if it was skipped."""
    if job.run.done(stage, key):
        return None
    began = time.monotonic()
    work()
    seconds = time.monotonic() - began
    job.run.finish(stage, key, seconds, files)
    return seconds


# ---- latency -------------------------------------------------------------------------------------


def latency_table(job: Job) -> LatencyTable:
    """The device's table; for this machine the one that `nasctl profile` made here, or else one
    measured now, on networks of the very space."""
    if not job.device.local:
        return latencies.table(job.device)
    if (stored := latencies.stored(job.device)) is not None:
        wanted = _made_for(job)
        said = {"width": 0.0, **stored.provenance}  # nothing is said of a space's own width
        differs = [name for name in wanted if said.get(name) != wanted[name]]
        if not differs:
            console.say(f"  {stored.origin}, {stored.provenance.get('created', 'undated')}")
            job.run.write_text(TABLE, stored.model_dump_json(indent=1) + "\n")
            return stored
        console.say(f"  the stored table is of another {', '.join(differs)}: measuring anew")
    images = [job.task.channels, job.task.size, job.task.n_classes]
    here = [verify.environment(), job.device.model_dump(mode="json")]
    key = runs.digest([job.spec.digest("space", "width", "seed"), images, here])
    seconds = staged(job, "profile", key, [TABLE], lambda: _profile(job))
    table = LatencyTable.load(job.run.path(TABLE))
    if seconds is not None:
        same = table.intervals["same"]
        console.say(
            f"  {table.includes}; 90 % of unseen networks within x{same.low:.2f} to "
            f"x{same.high:.2f} of the estimate"
        )
    return table


def _made_for(job: Job) -> dict[str, str | int | float]:
    """What `nasctl profile` must have said of a table of this machine for it to serve this run."""
    task, spec = job.task, job.spec
    images = {"size": task.size, "channels": task.channels, "classes": task.n_classes}
    width = 0.0 if spec.width is None else spec.width
    return {**verify.runs_in(), "threads": 1, "space": spec.space, "width": width, **images}


def _profile(job: Job) -> None:
    rng = np.random.default_rng((job.spec.seed, 5))
    networks = drawn(job.space, rng, PROFILED)
    table = measured_here(networks, job.device, job.spec.space, rng)
    job.run.write_text(TABLE, table.model_dump_json(indent=1) + "\n")


def drawn(space_: SearchSpace, rng: np.random.Generator, n: int) -> list[list[Op]]:
    """The smallest network of a space, its largest, and others at random."""
    ends = np.stack([space_.smallest, space_.largest])
    rows = np.concatenate([ends, space_.sample(rng, n - 2)])
    return [space_.ops(space_.decode(row)) for row in rows]


def measured_here(
    networks: list[list[Op]], device: Device, name: str, rng: np.random.Generator
) -> LatencyTable:
    """A table of this machine from networks of the space `name`, timed now."""
    pace = measure.Pace()
    with console.bar(f"measuring {device.name}", 1.0) as update:
        timings = measure.measure_ops(
            networks,
            rng=rng,
            plan=measure.Plan(time_limit_s=60),
            pace=pace,
            progress=lambda share: update(share, ""),
        )
    both = list(zip(networks, timings, strict=True))
    clean = [(ops, timing.median_ms) for ops, timing in both if not timing.noisy]
    few = len(clean) < len(networks)
    doubt = "; the machine was busy and the others are in doubt" if few else ""
    if len(clean) < CLEAN:  # better a doubtful table, which says so, than none
        doubt = f"; the machine was busy and {len(networks) - len(clean)} of them are in doubt"
        clean = [(ops, timing.median_ms) for ops, timing in both]
    origin = f"{len(clean)} random networks of the space, run in ONNX Runtime on this machine"
    table = calibrate.fit(clean, device, space=name, source_text=origin)
    said = {"includes": f"{len(clean)} whole networks measured{doubt}"}
    return table.model_copy(update={**said, "provenance": {"pace_ms": pace.ms}})


def make_problem(job: Job, table: LatencyTable, evaluate: Callable[[Genes], Any]) -> Problem:
    """The search problem; raises BudgetInfeasible (before any training) if no network fits."""
    columns = job.space.fold(table.columns)

    def latency(genes: Genes) -> tuple[Any, Any]:
        value, _, high = table.combine(columns(genes), job.spec.space)
        return value, high

    spec, limits = job.spec, budgets.limits(job)
    problem = Problem(job.space, latency, evaluate, spec.latency_ms, spec.seed, limits)
    budgets.check(job, table, problem)
    return problem


# ---- supernet ------------------------------------------------------------------------------------


def trained_supernet(job: Job) -> Network:
    """The space's supernet, trained in this run (unless its strategy does that: `cli.learning`) or
    taken from the run it names."""
    if job.spec.supernet is None and not strategies.learns(job.spec.strategy):
        console.say(f"{job.spec.space}, {job.space.count():.3g} networks", "supernet")
        work = functools.partial(training.train_supernet, job, job.recipe)
        staged(job, "train", job.train_key, [SUPERNET], work)
        job.run.path(STATE).unlink(missing_ok=True)
    return training.finished_supernet(job)


def check_inputs(job: Job) -> None:
    """What the spec alone cannot tell: before any work."""
    spec, device = job.spec, job.device
    if device.local and (device.runtime, device.precision) != ("onnxruntime", "fp32"):
        raise NasctlError(
            f"{device.name} is this machine, where only onnxruntime in fp32 can be measured",
            where="--hw",
        )
    if device.local and spec.storage:
        raise UsageError(
            "machines that share a search must agree on latencies, and each would measure its own",
            where="--storage",
            next="Share the search of a device with a table.",
        )
    if spec.supernet is None:
        return
    path = job.supernet_path
    if not path.exists():
        raise NasctlError("no trained supernet there", where=f"--supernet {spec.supernet}")
    _, meta = checkpoint.read(path)
    training.require_same(job, meta, path)


# ---- search --------------------------------------------------------------------------------------


def search_key(job: Job, table: LatencyTable) -> str:
    """What a search's results depend on: weights, data, latencies, budget and seed."""
    limits = ("latency_ms", "macs", "params", "memory_bytes", "energy_mj")
    settings = job.spec.digest("space", "width", "seed", "strategy", *limits)
    measured = table.model_dump(mode="json")
    return runs.digest([job.weights_key, job.task.fingerprint, measured, settings])


def searched(job: Job, problem: Problem, table: LatencyTable) -> list[Candidate]:
    """Every evaluated network; the front is in pareto.json."""
    spec, key = job.spec, search_key(job, table)
    study = studies.open_study(
        job.run.path(JOURNAL), key, storage=spec.storage, name=spec.study_name
    )
    propose, size = strategies.load(spec.strategy), strategies.generation(spec.strategy)
    found: list[Candidate] = []

    def work() -> None:
        where = spec.storage or str(job.run.path(JOURNAL))
        with console.bar("searching", spec.evaluations) as update, studies.reachable(where):
            for candidate in search.search(problem, study, spec.evaluations, propose, size):
                found.append(candidate)
                best = min(found, key=lambda c: c.cross_entropy)
                update(len(found), f"best cross-entropy {best.cross_entropy:.4f}")
        every = studies.candidates(study)  # other workers' too
        front = [search.as_dict(c, job.space) for c in search.front(every)]
        job.run.write_json(FRONT, front)

    staged(job, "search", runs.digest([key, spec.evaluations]), [FRONT], work)
    return studies.candidates(study)


def cost(job: Job, candidate: Candidate) -> tuple[int, int]:
    """(MACs, parameters) of a candidate."""
    ops = job.space.ops(job.space.decode(np.array(candidate.genes)))
    return op.macs(ops), op.params(ops)


def describe_arch(arch: Any) -> str:
    """An architecture on one line."""
    return ", ".join(f"{k} {v}" for k, v in space.arch_to_dict(arch).items())
