"""A search whose strategy trains the supernet itself, with a distribution to propose from."""

from __future__ import annotations

import functools
import time
from collections.abc import Generator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from cli import training
from cli.stages import Job, staged
from cli.training import STATE, SUPERNET
from hw_profiles.latency import LatencyTable
from nas import checkpoint, differentiable
from nas import run as runs
from nas.differentiable.learning import Goal, Learned, Searched, learn
from nas.differentiable.policy import free, latency_of
from nas.errors import UsageError
from nas.gradients import Course
from nas.recipe import Recipe
from nas.search import Problem

POLICY = "policy.json"  # gene -> the logit of each option
TIMED = 4  # steps of an estimate, after the first


def check(given: Mapping[str, Any]) -> None:
    """What goes with no such strategy; raises UsageError naming the flag."""
    for name in ("alone", "supernet", "storage"):
        if given.get(name):
            raise UsageError(
                f"--strategy {given['strategy']} trains a supernet of its own, in one process",
                where=f"--{name}",
            )
    if given.get("latency_ms") is None:
        raise UsageError(
            f"--strategy {given['strategy']} learns inside a latency budget", where="--latency"
        )


def check_space(job: Job) -> None:
    """Before anything is measured; raises NasctlError if there are no operators to choose."""
    _searched(job)


def learned(job: Job, table: LatencyTable) -> None:
    """Train supernet and distribution into the run; goes on where it was interrupted."""
    assert job.spec.latency_ms is not None  # `check` saw to it
    goal = Goal(latency_of(job.space, job.spec.space, table), job.spec.latency_ms)
    key = runs.digest([job.train_key, job.spec.strategy, goal.fingerprint])
    staged(job, "train", key, [SUPERNET, POLICY], functools.partial(_learn, job, goal))
    job.run.path(STATE).unlink(missing_ok=True)


def with_policy(job: Job, problem: Problem) -> Problem:
    """The problem with the distribution of the run."""
    found = job.run.read_json(POLICY)
    logits = np.full((len(job.space.genes), int(job.space.sizes.max())), -np.inf)
    for at, gene in enumerate(job.space.genes):
        logits[at, : len(gene.options)] = found[gene.name]
    return replace(problem, policy=logits)


def step_seconds(job: Job) -> tuple[float, nn.Module]:
    """Seconds per step, of the distribution's too, and the supernet that was trained a little."""
    searched, goal = _searched(job), Goal(free(job.space), 1.0)
    steps = _steps(job, searched, goal, replace(job.recipe, steps=TIMED + 1))
    next(steps)
    began = time.monotonic()
    for _ in steps:
        pass
    return (time.monotonic() - began) / TIMED, searched.net


def _searched(job: Job) -> Searched:
    return Searched(training.fresh(job), job.space)


def _steps(
    job: Job, searched: Searched, goal: Goal, recipe: Recipe, state: Path | None = None
) -> Generator[Learned, None, None]:
    method = differentiable.load(job.spec.strategy)
    return learn(searched, Course(job.task, recipe), method=method, goal=goal, resume=state)


def _learn(job: Job, goal: Goal) -> None:
    searched, recipe = _searched(job), job.recipe
    steps = _steps(job, searched, goal, recipe, job.run.path(STATE))
    training.follow(steps, recipe.steps, f"learning by {job.spec.strategy}")
    said = {**job.description, "processes": 1, "accumulate": recipe.accumulate}
    checkpoint.write_described(job.run.path(SUPERNET), searched.net, said)
    logits = searched.policy.logits
    rows = {
        gene.name: row[: len(gene.options)].tolist()
        for gene, row in zip(job.space.genes, logits, strict=True)
    }
    job.run.write_json(POLICY, rows)
