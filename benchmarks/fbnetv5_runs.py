"""Runs of the multi-task search on tables, and of what it is held against.

A run is kept as the moments at which a task's best network got better: (query, network), so that
its quality after any number of queries can be read off. A query is one distinct network trained;
a network that is asked for again costs nothing, and neither does one that the space does not have
(that is known without training and counts as the worst so far).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from benchmarks import contract
from benchmarks.multitask_tables import Table
from nas import fbnetv5
from nas.mixture import Array
from nas.space import Genes

REPEATS = 4  # steps a plan has beyond those that new networks would fill
TASK_SEED = 100_000  # apart, so that no two searches of a seed share their draws
Improvements = list[list[tuple[int, int]]]  # per task


@dataclass
class Asked:
    """The networks that a search has asked for, at most `budget`, and what it may know of them."""

    table: Table
    tasks: list[int]
    budget: int

    def __post_init__(self) -> None:
        self.networks: dict[int, Genes] = {}  # row in the table -> genes

    def losses(self, genes: Genes) -> Array:
        """[M, T]: minus the values; NaN beyond the budget, the worst so far outside the space."""
        rows = self.table.rows(genes)
        for row, gene in zip(rows.tolist(), genes, strict=True):
            if row >= 0 and len(self.networks) < self.budget:
                self.networks.setdefault(row, gene)
        known = -self.table.values[list(self.networks)][:, self.tasks]
        found = -self.table.values[rows][:, self.tasks]
        found[~np.isin(rows, list(self.networks))] = np.nan
        if len(known):
            found[rows < 0] = known.max(0)
        return found

    def improvements(self, count: int | None = None) -> Improvements:
        """Of each task, in order; `count` networks at most."""
        found: Improvements = [[] for _ in self.tasks]
        for query, row in enumerate(list(self.networks)[:count]):
            for at, task in enumerate(self.tasks):
                value = self.table.values[:, task]
                if not found[at] or value[row] > value[found[at][-1][1]]:
                    found[at].append((query, row))
        return found


@dataclass(frozen=True)
class Run:
    """What a search found and said."""

    improvements: Improvements
    effective: float  # mean share of a step's networks that a task's estimate is worth
    entropy: float  # mean over tasks at the end


def search(
    table: Table, tasks: list[int], budget: int, seed: int, merge: bool = False
) -> tuple[Asked, Run]:
    """One run of `nas.fbnetv5` for these tasks; with `merge` for one network that serves all: one
    distribution, whose loss is the tasks' mean normal score."""
    plan = fbnetv5.Plan(steps=max(1, REPEATS * budget // fbnetv5.Plan(1).samples), seed=seed)
    asked = Asked(table, tasks, budget)
    state = fbnetv5.start(1 if merge else len(tasks), table.sizes)
    shares, entropy = [], 1.0

    def evaluate(genes: Genes) -> Array:
        return _merged(asked, genes) if merge else asked.losses(genes)

    for after, report in fbnetv5.search(plan, state, evaluate):
        state = after
        shares.append(float(report.effective.mean()) / plan.samples)
        entropy = float(report.entropy.mean())
        if len(asked.networks) == budget:
            break
    while len(asked.networks) < budget:
        known = np.array(list(asked.networks.values()))
        more = fbnetv5.finalists(plan, state, known, budget - len(asked.networks))
        before = len(asked.networks)
        asked.losses(more)
        if len(asked.networks) == before:  # only networks that the space does not have are left
            break
    return asked, Run(asked.improvements(), float(np.mean(shares)), entropy)


def _merged(asked: Asked, genes: Genes) -> Array:
    """Mean over tasks of the losses in deviations of what is known [M, 1]."""
    losses = asked.losses(genes)
    known = -asked.table.values[list(asked.networks)][:, asked.tasks]
    spread = np.maximum(known.std(0), 1e-9)
    merged: Array = ((losses - known.mean(0)) / spread).mean(1, keepdims=True)
    return merged


# ---- the rivals ----------------------------------------------------------------------------------


def one_run(table: Table, budget: int, seed: int) -> Run:
    return search(table, list(range(len(table.tasks))), budget, seed)[1]


def separate(table: Table, budget: int, seed: int) -> Run:
    """A search per task, each of the whole budget."""
    runs = [
        search(table, [task], budget, seed + TASK_SEED * (task + 1))[1]
        for task in range(len(table.tasks))
    ]
    found = [run.improvements[0] for run in runs]
    effective, entropy = (float(np.mean([getattr(r, n) for r in runs])) for n in _SAID)
    return Run(found, effective, entropy)


_SAID = ("effective", "entropy")


def divided(table: Table, budget: int, seed: int) -> Run:
    """A search per task, each of its share of the budget."""
    return separate(table, budget // len(table.tasks), seed)


def one_shared(table: Table, budget: int, seed: int) -> Run:
    """One search for one network, delivered for all tasks: the best mean normal score it saw."""
    every = list(range(len(table.tasks)))
    asked, run = search(table, every, budget, seed, merge=True)
    scores = _merged(asked, np.array(list(asked.networks.values())))[:, 0]
    best = list(asked.networks)[int(scores.argmin())]
    return Run([[(budget - 1, best)] for _ in every], run.effective, run.entropy)


def random(table: Table, budget: int, seed: int) -> Run:
    """Networks of the space at random, each seen by all tasks."""
    order = np.random.default_rng((seed, 52)).permutation(len(table.values))[:budget]
    asked = Asked(table, list(range(len(table.tasks))), budget)
    asked.networks = {int(row): np.zeros(0, np.int64) for row in order}
    return Run(asked.improvements(), 1.0, 1.0)


METHODS: dict[str, Callable[[Table, int, int], Run]] = {
    "one run": one_run,
    "T searches of 1/T": divided,
    "T full searches": separate,
    "one shared network": one_shared,
    "random, all tasks": random,
}


# ---- rows ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Runs:
    """Of one method on one table: one Run per seed."""

    table: Table
    runs: tuple[Run, ...]

    def picks(self, queries: int | None = None) -> NDArray[np.int64]:
        """The best network per seed and task [S, T] after so many queries (of each search)."""
        return np.array([[_best(task, queries) for task in run.improvements] for run in self.runs])

    def ranks(self, queries: int | None = None) -> NDArray[np.int64]:
        picks = self.picks(queries)
        return self.table.ranks[picks, np.arange(picks.shape[1])]

    def regrets(self) -> Array:
        picks = self.picks()
        return self.table.regrets[picks, np.arange(picks.shape[1])]

    def mean(self, what: str) -> float:
        return float(np.mean([getattr(run, what) for run in self.runs]))


def _best(improvements: Iterable[tuple[int, int]], queries: int | None) -> int:
    inside = [row for query, row in improvements if queries is None or query < queries]
    return inside[-1]


def runs(table: Table, method: str, budget: int, seeds: range, rows: contract.Rows | None) -> Runs:
    """From the file of rows if they are there, else now."""
    key = {"table": table.name, "tasks": list(table.tasks), "method": method, "budget": budget}
    key |= {"seeds": [seeds.start, seeds.stop], "plan": _settings()}
    kept = rows.get(key) if rows else None
    if kept is None:
        found = [METHODS[method](table, budget, seed) for seed in seeds]
        kept = {"runs": [vars(run) for run in found]}
        if rows:
            rows.add(key, kept)
    return Runs(table, tuple(Run(**run) for run in kept["runs"]))


def _settings() -> list[float]:
    plan = fbnetv5.Plan(1)
    return [plan.samples, plan.lr, plan.entropy, fbnetv5.WINDOW, fbnetv5.LIMIT, REPEATS]
