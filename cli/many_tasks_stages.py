"""The stages of a search for several tasks: one supernet, then a network, a training and a file for
each task. What the manifest knows as finished is skipped; every stage goes on where it was stopped.
"""

from __future__ import annotations

import functools
import json
import math
import shutil
import statistics
import time
from collections.abc import Callable, Generator, Mapping
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from torch import nn

from cli import console, stages
from deploy import onnx, verify
from hw_profiles import latency as latencies
from hw_profiles import measure, op
from hw_profiles.device import Device
from hw_profiles.latency import LatencyTable
from nas import checkpoint, file, multitask, multitask_training
from nas import run as runs
from nas.errors import BudgetMissed, UsageError
from nas.multitask import MultiTask
from nas.multitask_outcome import Finalist, child, judged, outcomes
from nas.multitask_search import Search, Shared, learn, space_for
from nas.multitask_training import Schedule
from nas.outputs import ONLY
from nas.run import Run
from nas.search import Limit, Problem
from nas.space import arch_to_dict

STATE, SHARED, FINALISTS = "training.safetensors", "shared.safetensors", "finalists.json"
TABLE, REPORT = stages.TABLE, "report.json"
#: in a task's own folder
OWN_STATE, WEIGHTS, MODEL = "finetune.safetensors", "model.safetensors", "bundle/model.onnx"
RESULT, PICK = "result.json", "pick.json"
PROFILED = 64  # networks timed for a table of this machine, of all tasks together
ATTEMPTS = 5  # files timed before a budget on this machine is given up
MARGIN = 1.02  # as in `cli.deliver`


class TasksSpec(BaseModel):
    """What a search for several tasks is asked for: long flags of `nasctl search`, with units."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    data: str
    tasks: list[str] = Field(..., min_length=1)  # as JSON has it: a manifest is compared with this
    size: int | None = Field(None, ge=8, le=1024)
    space: str
    width: float | None = Field(None, gt=0, le=4)
    hw: str = "cpu"
    latency_ms: dict[str, float] = {}  # by task
    macs: dict[str, float] = {}
    epochs: float = Field(..., gt=0)  # of the supernet
    finetune: float = Field(..., ge=0)  # of each task's network, alone
    batch: int = Field(64, ge=2)
    lr: float = Field(0.1, gt=0)
    seed: int = Field(0, ge=0)
    threads: int = Field(..., ge=1)


def make_spec(fields: Mapping[str, Any]) -> TasksSpec:
    """Validated; raises UsageError naming the flag that is wrong and what it may be."""
    try:
        return TasksSpec(**fields)
    except ValidationError as error:
        first = error.errors()[0]
        flag = "--" + str(first["loc"][0]).removesuffix("_ms").replace("_", "-")
        raise UsageError(f"{first['msg']} (got {first['input']!r})", where=flag) from error


@dataclass(frozen=True, eq=False)
class Job:
    """The resolved inputs of such a search."""

    spec: TasksSpec
    run: Run
    task: MultiTask  # with the goals that are searched for
    device: Device

    @cached_property
    def space(self) -> Any:
        return space_for(self.task, self.spec.width)

    @property
    def schedule(self) -> Schedule:
        return self._schedule(self.spec.epochs)

    @property
    def own_schedule(self) -> Schedule:
        return self._schedule(self.spec.finetune)

    def _schedule(self, epochs: float) -> Schedule:
        spec = self.spec
        steps = round(epochs * len(self.task.train) / spec.batch)
        return Schedule(steps=max(1, steps), batch=spec.batch, lr=spec.lr, seed=spec.seed)

    def own(self, name: str) -> Run:
        """A task's folder."""
        return Run(self.run.path(name))


def forget(job: Job) -> None:
    """Remove what a search keeps in order to go on."""
    for name in job.spec.tasks:
        shutil.rmtree(job.own(name).folder, ignore_errors=True)


def staged(run: Run, stage: str, key: str, files: list[str], work: Callable[[], None]) -> None:
    if run.done(stage, key):
        return
    began = time.monotonic()
    work()
    run.finish(stage, key, time.monotonic() - began, files)


# ---- latency and budgets -------------------------------------------------------------------------


def latency_table(job: Job) -> LatencyTable:
    """The device's table; for this machine one measured now, on networks of every task."""
    torch.set_num_threads(job.spec.threads)
    if not job.device.local:
        return latencies.table(job.device)
    here = [verify.environment(), job.device.model_dump(mode="json")]
    key = runs.digest([job.spec.seed, job.task.shape, str(job.space.tasks), job.spec.width, here])
    staged(job.run, "profile", key, [TABLE], functools.partial(_profile, job))
    return LatencyTable.load(job.run.path(TABLE))


def _profile(job: Job) -> None:
    rng = np.random.default_rng((job.spec.seed, 5))
    each = max(2, PROFILED // len(job.spec.tasks))
    networks = [
        ops for name in job.spec.tasks for ops in stages.drawn(job.space.only(name), rng, each)
    ]
    table = stages.measured_here(networks, job.device, job.spec.space, rng)
    job.run.write_text(TABLE, table.model_dump_json(indent=1) + "\n")


def asked(job: Job, table: LatencyTable) -> Search:
    """The search; raises NasctlError for an operator without a latency, BudgetInfeasible (before
    any training) where a task's budget is below its smallest network."""
    problems = {name: _problem(job, table, name) for name in job.spec.tasks}
    return Search(job.space, job.task, job.schedule, problems)


def _problem(job: Job, table: LatencyTable, name: str) -> Problem:
    own, spec = job.space.only(name), job.spec
    columns = own.fold(table.columns)

    def latency(genes: Any) -> tuple[Any, Any]:
        value, _, high = table.combine(columns(genes), spec.space)
        return value, high

    def macs(genes: Any) -> Any:
        return own.costs(genes)[:, 0]

    limits = (Limit("macs", spec.macs[name], macs),) if name in spec.macs else ()
    nothing = (0.0, 0.0)  # networks are judged by `nas.multitask_outcome`
    most = spec.latency_ms.get(name)
    return Problem(own, latency, lambda genes: nothing, most, spec.seed, limits)


# ---- search --------------------------------------------------------------------------------------


def learned(job: Job, search: Search) -> Shared:
    """Supernet and distributions, trained into the run; goes on where it was interrupted."""
    shared, run = Shared(search), job.run

    def work() -> None:
        steps = learn(shared, search, resume=run.path(STATE))
        _follow(steps, search.schedule.steps, "one supernet for all tasks")
        checkpoint.write(run.path(SHARED), shared.state_dict(), {})

    staged(run, "train", search.fingerprint, [SHARED], work)
    run.path(STATE).unlink(missing_ok=True)
    checkpoint.fill(shared, checkpoint.read(run.path(SHARED))[0], run.path(SHARED))
    shared.eval()
    return shared


def _follow(steps: Generator[Any, None, None], total: int, title: str) -> None:
    """Under a bar; Ctrl-C stops between two steps, where the state is saved."""
    with console.bar(title, total) as update, console.deferred_interrupt() as stop:
        for step in steps:
            update(step.step, " ".join(f"{k} {v:.3f}" for k, v in step.losses.items()))
            if stop() and step.step < step.steps:
                steps.close()
                raise KeyboardInterrupt


def chosen(job: Job, search: Search, shared: Shared) -> dict[str, list[Finalist]]:
    """Each task's networks inside its budget, best first on validation images."""

    def work() -> None:
        found = {}
        for name in job.spec.tasks:
            with console.bar(f"networks of {name}", 16) as update:
                rows = []
                for finalist in judged(shared, search, name):
                    rows.append(asdict(finalist))
                    update(len(rows), f"best loss {min(row['loss'] for row in rows):.4f}")
            found[name] = sorted(rows, key=lambda row: float(row["loss"]))
        job.run.write_json(FINALISTS, found)

    staged(job.run, "search", search.fingerprint, [FINALISTS], work)
    found = job.run.read_json(FINALISTS)
    return {
        name: [Finalist(tuple(row["genes"]), row["loss"], row["score"]) for row in found[name]]
        for name in job.spec.tasks
    }


def step_seconds(job: Job) -> float:
    """Of the supernet, the share of the distributions' steps included; from two steps."""

    def anything(genes: Any) -> Any:
        return np.zeros(len(genes)), np.zeros(len(genes))

    problems = {
        name: Problem(job.space.only(name), anything, lambda genes: (0.0, 0.0))
        for name in job.spec.tasks
    }
    search = Search(job.space, job.task, replace(job.schedule, steps=3), problems)
    steps = learn(Shared(search), search)
    next(steps)
    began = time.monotonic()
    next(steps)  # with a step of the distributions, which comes at every fourth
    next(steps)
    return (time.monotonic() - began) / 2


# ---- each task's own network ---------------------------------------------------------------------


def delivered(
    job: Job,
    table: LatencyTable,
    search: Search,
    shared: Shared,
    finalists: list[Finalist],
    name: str,
) -> dict[str, Any]:
    """The task's network trained alone, exported, run and judged; test images are read here, once.
    Its files are in the folder of the task's name."""
    own = job.own(name)
    own.path("bundle").mkdir(parents=True, exist_ok=True)
    key = runs.digest([search.fingerprint, job.spec.model_dump(), verify.environment()])

    def work() -> None:
        finalist = _pick(job, search, shared, finalists, name)
        net = child(shared, search, name, np.array(finalist.genes))
        task = job.task.only([name])
        if job.spec.finetune:
            steps = multitask_training.train(
                net, task, job.own_schedule, resume=own.path(OWN_STATE)
            )
            _follow(steps, job.own_schedule.steps, f"training {name} alone")
        checkpoint.write(own.path(WEIGHTS), net.state_dict(), {})
        row = _row(job, table, net, finalist, task)
        own.write_json(RESULT, row)

    files = [f"{name}/{part}" for part in (MODEL, WEIGHTS, RESULT)]
    staged(job.run, f"deliver {name}", key, files, work)
    own.path(OWN_STATE).unlink(missing_ok=True)
    found: dict[str, Any] = own.read_json(RESULT)
    return found


def _pick(
    job: Job, search: Search, shared: Shared, finalists: list[Finalist], name: str
) -> Finalist:
    """The best; on this machine the best whose exported file was timed inside the budget. On
    record, so that a run that goes on trains the same network on."""
    budget, own = job.spec.latency_ms.get(name), job.own(name)
    if budget is None or not job.device.local:
        return finalists[0]
    if own.path(PICK).exists():
        return finalists[int(own.read_json(PICK))]
    took = []
    for at, finalist in enumerate(finalists[:ATTEMPTS]):
        net = child(shared, search, name, np.array(finalist.genes))
        onnx.export(net, own.path(MODEL), input_shape=job.task.shape)
        took.append(_timed(job, own.path(MODEL)).median_ms)
        if took[-1] * MARGIN <= budget:
            own.write_json(PICK, at)
            return finalist
    raise BudgetMissed(
        f"no file was measured inside {budget:g} ms; they took "
        f"{', '.join(map(console.format_ms, took))}",
        where=f"task '{name}'",
        next="Raise its budget, or leave the machine to itself.",
    )


def _timed(job: Job, path: Path) -> measure.Timing:
    plan = measure.Plan(inner=50, per_round=statistics.median, rounds=10, time_limit_s=10)
    rng = np.random.default_rng((job.spec.seed, 7))
    said = LatencyTable.load(job.run.path(TABLE)).provenance
    pace = measure.Pace(float(said.get("pace_ms", math.inf)))
    return verify.latency(path, rng=rng, plan=plan, pace=pace)


def _row(
    job: Job, table: LatencyTable, net: nn.Module, finalist: Finalist, task: MultiTask
) -> dict[str, Any]:
    """What is known of a task's delivered file."""
    (goal,) = task.goals
    own, path = job.space.only(goal.name), job.own(goal.name).path(MODEL)
    arch = own.decode(np.array(finalist.genes))
    ops = own.ops(arch)
    described = _described(job, goal.name, finalist, arch_to_dict(arch))
    onnx.export(net, path, input_shape=task.shape, metadata=described)
    parity = verify.parity(net, path, next(task.batches(task.val, 64))[0].numpy())
    timing = _timed(job, path) if job.device.local else None
    images = torch.cat([x for x, _ in task.batches(task.test)]).numpy()
    outputs = {goal.name: torch.from_numpy(verify.outputs(path, images, batch=64)[ONLY])}
    seen = multitask.evidence(net, task, task.val)
    budgets = {"latency": job.spec.latency_ms, "macs": job.spec.macs}
    limit = [{"name": n, "most": m[goal.name]} for n, m in budgets.items() if goal.name in m]
    late = timing is not None and timing.median_ms > job.spec.latency_ms.get(goal.name, math.inf)
    return {
        "genes": list(finalist.genes),
        "arch": arch_to_dict(arch),
        "macs": op.macs(ops),
        "params": op.params(ops),
        "budget": limit[0] if limit else None,
        "predicted": asdict(table.estimate(ops, job.spec.space)),
        "measured": None if timing is None else asdict(timing),
        "missed": late,
        "inherited_val": finalist.score,
        "val": multitask.scores(task, seen)[goal.name],
        "test": goal.score(goal.evidence(outputs, task.test.targets)),
        "parity_error": parity,
        "file": {**file.record(path), "path": f"{goal.name}/{MODEL}"},
    }


def _described(job: Job, name: str, finalist: Finalist, arch: Mapping[str, Any]) -> dict[str, str]:
    """What the file says of itself."""
    task = job.task
    return {
        "nasctl": metadata.version("nasctl"),
        "space": job.spec.space,
        "task": name,
        "genes": json.dumps(finalist.genes),
        "arch": json.dumps(arch),
        "input": f"float32 N x {' x '.join(map(str, task.shape))}, (pixel / 255 - mean) / std",
        "mean": json.dumps(list(task.moments[0])),
        "std": json.dumps(list(task.moments[1])),
        "data_sha256": task.fingerprint,
        "run": job.run.folder.name,
    }


def reported(
    job: Job,
    table: LatencyTable,
    search: Search,
    shared: Shared,
    rows: dict[str, Any],
    seconds: float,
) -> dict[str, Any]:
    """The content of report.json, written."""
    told = {
        name: {**asdict(outcome), "collapsed": outcome.collapsed}
        for name, outcome in outcomes(shared, search).items()
    }
    done = job.run.manifest()["stages"]
    notes = [] if job.device.local else [f"latency of the files on {job.device.name}"]
    content = {
        "nasctl": metadata.version("nasctl"),
        "spec": job.spec.model_dump(mode="json"),
        "device": {**job.device.model_dump(mode="json"), "table_origin": table.origin},
        "tasks": rows,
        "convergence": told,
        "not_measured": notes,
        "stages": {name: record["seconds"] for name, record in done.items()},
        "seconds": round(seconds, 1),
        "environment": verify.environment(),
    }
    job.run.write_json(REPORT, content)
    return content
