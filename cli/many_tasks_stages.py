"""The stages of a search for several tasks: one supernet, then a network, a training and a file for
each task. What the manifest knows as finished is skipped; every stage goes on where it was stopped.
"""

from __future__ import annotations

import functools
import shutil
import time
from collections.abc import Callable, Generator
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from importlib import metadata
from typing import Any

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict, Field

from cli import accelerator, console, stages
from deploy import verify
from hw_profiles import latency as latencies
from hw_profiles.device import Device
from hw_profiles.latency import LatencyTable
from nas import checkpoint
from nas import multitask_together as together
from nas import run as runs
from nas.data import module
from nas.errors import UsageError
from nas.multitask import MultiTask
from nas.multitask_outcome import Finalist, judged, outcomes
from nas.multitask_search import Search, Shared, learn, space_for
from nas.multitask_training import Schedule
from nas.run import LONGEST_LICENCE, Run
from nas.search import GENERATION, Limit, Problem
from nas.search_spaces.fbnetv5 import Space

STATE, SHARED, FINALISTS = "training.safetensors", "shared.safetensors", "finalists.json"
TABLE, REPORT = stages.TABLE, "report.json"
#: in a part's folder
OWN_STATE, WEIGHTS, BUNDLE = "finetune.safetensors", "model.safetensors", "bundle"
RESULT, PICK = "result.json", "pick.json"
PROFILED = 64  # networks timed for a table of this machine, of all tasks together


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
    trainer: str | None = None  # what does that instead: my_pkg.my_mod:train
    together: bool = False  # one network that answers all tasks, instead of one for each
    batch: int = Field(64, ge=2)
    lr: float = Field(0.1, gt=0)
    seed: int = Field(0, ge=0)
    threads: int = Field(..., ge=1)
    train_on: str = "cpu"
    licence: str = Field("", max_length=LONGEST_LICENCE)


@dataclass(frozen=True)
class Part:
    """A network that is delivered: the folder of its files in the run, and what it answers."""

    folder: str
    tasks: tuple[str, ...]

    @property
    def title(self) -> str:
        return ", ".join(self.tasks)


@dataclass(frozen=True, eq=False)
class Job:
    """The resolved inputs of such a search."""

    spec: TasksSpec
    run: Run
    task: MultiTask  # with the goals that are searched for
    device: Device

    @cached_property
    def space(self) -> Space:
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

    @cached_property
    def accelerator(self) -> torch.device:
        """Where networks are trained and judged; raises UsageError where it is not there."""
        return accelerator.named(self.spec.train_on)

    @cached_property
    def trainer(self) -> Callable[..., object] | None:
        """The user's own training of a task's network, `train(net, task)`, in place; None: ours."""
        named = self.spec.trainer
        if named is None:
            return None
        if not module.is_reference(named):
            raise UsageError(f"'{named}'", where="--trainer", allowed="my_pkg.my_mod:train")
        found: Callable[..., object] = module.attribute(named, "--trainer")
        return found

    @property
    def parts(self) -> tuple[Part, ...]:
        """One per task, in a folder of its name; of one network for all, the run itself."""
        names = self.spec.tasks
        if self.spec.together:
            return (Part(".", tuple(names)),)
        return tuple(Part(name, (name,)) for name in names)

    def own(self, part: Part) -> Run:
        """Where its files are."""
        return Run(self.run.path(part.folder))

    def answering(self, name: str) -> Space:
        """The space of the networks that a task's budget is for."""
        return self.space.only(*(self.spec.tasks if self.spec.together else [name]))

    def budget_ms(self, part: Part) -> float | None:
        return self.spec.latency_ms.get(part.tasks[0])


def forget(job: Job) -> None:
    """Remove what a search keeps in order to go on, and the networks that it delivered."""
    for name in job.spec.tasks:
        shutil.rmtree(job.run.path(name), ignore_errors=True)
    shutil.rmtree(job.run.path(BUNDLE), ignore_errors=True)
    for name in (PICK, WEIGHTS, RESULT):
        job.run.path(name).unlink(missing_ok=True)


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
    what = [job.spec.seed, job.task.shape, str(job.space.tasks), job.spec.width]
    key = runs.digest([*what, job.spec.together, here])
    staged(job.run, "profile", key, [TABLE], functools.partial(_profile, job))
    return LatencyTable.load(job.run.path(TABLE))


def _profile(job: Job) -> None:
    rng = np.random.default_rng((job.spec.seed, 5))
    each = max(2, PROFILED // len(job.parts))
    spaces = [job.space.only(*part.tasks) for part in job.parts]
    networks = [ops for space in spaces for ops in stages.drawn(space, rng, each)]
    table = stages.measured_here(networks, job.device, job.spec.space, rng)
    job.run.write_text(TABLE, table.model_dump_json(indent=1) + "\n")


def asked(job: Job, table: LatencyTable) -> Search:
    """The search; raises NasctlError for an operator without a latency, BudgetInfeasible (before
    any training) where a task's budget is below its smallest network."""
    problems = {name: _problem(job, table, name) for name in job.spec.tasks}
    return Search(job.space, job.task, job.schedule, problems)


def _problem(job: Job, table: LatencyTable, name: str) -> Problem:
    own, spec = job.answering(name), job.spec
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
    shared, run = _fresh(job, search), job.run

    def work() -> None:
        steps = learn(shared, search, resume=run.path(STATE))
        follow(steps, search.schedule.steps, "one supernet for all tasks")
        checkpoint.write(run.path(SHARED), shared.state_dict(), {})

    staged(run, "train", search.fingerprint, [SHARED], work)
    run.path(STATE).unlink(missing_ok=True)
    checkpoint.fill(shared, checkpoint.read(run.path(SHARED))[0], run.path(SHARED))
    shared.eval()
    return shared


def _fresh(job: Job, search: Search) -> Shared:
    """The network where it is trained; distributions stay on the processor."""
    shared = Shared(search)
    shared.net.to(job.accelerator)
    return shared


def follow(steps: Generator[Any, None, None], total: int, title: str) -> None:
    """Under a bar; Ctrl-C stops between two steps, where the state is saved."""
    with console.bar(title, total) as update, console.deferred_interrupt() as stop:
        for step in steps:
            update(step.step, " ".join(f"{k} {v:.3f}" for k, v in step.losses.items()))
            if stop() and step.step < step.steps:
                steps.close()
                raise KeyboardInterrupt


def chosen(job: Job, search: Search, shared: Shared) -> list[list[Finalist]]:
    """Of each part the networks inside its budget, best first on validation images."""

    def work() -> None:
        found = {part.folder: _ranked(search, shared, part) for part in job.parts}
        job.run.write_json(FINALISTS, found)

    key = runs.digest([search.fingerprint, *(part.folder for part in job.parts)])
    staged(job.run, "search", key, [FINALISTS], work)
    found = job.run.read_json(FINALISTS)
    return [
        [Finalist(tuple(row["genes"]), row["loss"], row["score"]) for row in found[part.folder]]
        for part in job.parts
    ]


def _ranked(search: Search, shared: Shared, part: Part) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    alone = len(part.tasks) == 1
    with console.bar(f"networks of {part.title}", GENERATION) as update:
        for finalist in (
            judged(shared, search, part.tasks[0]) if alone else together.judged(shared, search)
        ):
            rows.append(asdict(finalist))
            update(len(rows), f"best loss {min(row['loss'] for row in rows):.4f}")
    return sorted(rows, key=lambda row: float(np.nan_to_num(row["loss"], nan=np.inf)))


def step_seconds(job: Job) -> float:
    """Of the supernet, the share of the distributions' steps included; from two steps."""

    def anything(genes: Any) -> Any:
        return np.zeros(len(genes)), np.zeros(len(genes))

    problems = {
        name: Problem(job.answering(name), anything, lambda genes: (0.0, 0.0))
        for name in job.spec.tasks
    }
    search = Search(job.space, job.task, replace(job.schedule, steps=3), problems)
    steps = learn(_fresh(job, search), search)
    next(steps)
    began = time.monotonic()
    next(steps)  # with a step of the distributions, which comes at every fourth
    next(steps)
    return (time.monotonic() - began) / 2


# ---- report --------------------------------------------------------------------------------------


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
