"""What part `real` of the FBNetV5 benchmark runs: searches, rivals, and trainings alone.

tiny_imagenet_20 (class, box) and camvid (label map, boundaries, presence), at CPU sizes. A method
finds a network per task inside the task's budget of MACs, the same for all methods; every network
is then trained alone from scratch, for the same steps, and judged once on test images. What they
take in milliseconds is measured at the end (`fbnetv5_latency`).

  one run            a search for all tasks together; each takes the best of its distribution
  one shared         of the same search the network that is best for all tasks on average
  separate searches  a search of the same length per task: T times the budget
  random, all tasks  `short` networks at random, trained with all heads for as many steps in all as
                     the one run's work is worth; each task takes its best
  a random network   one per task, not searched for

Selections read validation images only. Seconds are of CPU, of one thread.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from benchmarks import contract
from hw_profiles import op
from nas import multitask, multitask_outcome
from nas.elastic import channels_last
from nas.mixture import Array
from nas.multitask import MultiTask
from nas.multitask_outcome import constant_loss, judged, outcomes, validation_loss
from nas.multitask_search import Search, Shared, learn, space_for
from nas.multitask_training import Schedule, train
from nas.search import Limit, Problem
from nas.search_spaces.fbnetv5 import Space
from nas.space import Genes

BUDGET = 0.4  # of the way from a task's smallest network to its largest, MACs
FORWARD = 1 / 3  # of a step's work is the forward pass, which is all that distributions need

Genes1 = tuple[int, ...]
Picks = dict[str, Genes1]  # by task


@dataclass(frozen=True)
class Setting:
    """A data set at a CPU's size."""

    data: str
    size: int  # shorter side, pixels
    width: float
    search: Schedule
    own: Schedule


#: rates are the usual ones for the batch, not searched
SETTINGS = (
    Setting(
        data="tiny_imagenet_20",
        size=32,
        width=0.5,
        search=Schedule(steps=112 * 8, batch=64, lr=0.05),
        own=Schedule(steps=140 * 10, batch=64, lr=0.1),
    ),
    Setting(
        data="camvid",
        size=48,
        width=0.5,
        search=Schedule(steps=18 * 24, batch=16, lr=0.03),
        own=Schedule(steps=22 * 40, batch=16, lr=0.05),
    ),
)


@dataclass(frozen=True)
class Experiment:
    """One data set and seed."""

    setting: Setting
    task: MultiTask
    seed: int
    rows: contract.Rows
    folder: Path  # for unfinished trainings
    judged: int = 16  # networks of a task's distribution
    short: int = 12  # random networks that the work of one run is divided among

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(goal.name for goal in self.task.goals)

    @cached_property
    def space(self) -> Space:
        return space_for(self.task, self.setting.width)

    @cached_property
    def of(self) -> dict[str, Space]:
        """Each task's own."""
        return {name: self.space.only(name) for name in self.names}

    def row(self, what: Mapping[str, Any], work: Callable[[Path], dict[str, Any]]) -> Any:
        """The row of that name, from `work(state file)` if it is not on disk yet."""
        setting = self.setting
        sizes = [setting.size, setting.width, setting.search.steps, setting.own.steps, BUDGET]
        key = {"data": setting.data, "sizes": sizes, "seed": self.seed, **what}
        if (known := self.rows.get(key)) is not None:
            return known
        began = time.process_time()
        words = [setting.data, self.seed, *what.values()]
        name = "-".join("".join(map(str, w)) if isinstance(w, list) else str(w) for w in words)
        state = self.folder / f"{name.replace(' ', '_').replace(',', '')}.safetensors"
        found = {**work(state), "cpu_seconds": round(time.process_time() - began, 1)}
        self.rows.add(key, found)
        state.unlink(missing_ok=True)
        print(json.dumps({**key, **found}), flush=True)
        return found

    def budget(self, name: str) -> float:
        space = self.of[name]
        low, high = space.costs(np.stack([space.smallest, space.largest]))[:, 0]
        return float(low + BUDGET * (high - low))

    def asked(self, names: tuple[str, ...]) -> Search:
        """The search for some of the tasks."""
        task = self.task.only(names)
        space = space_for(task, self.setting.width)
        problems = {name: self._problem(space.only(name), name) for name in names}
        return Search(space, task, replace(self.setting.search, seed=self.seed), problems)

    def _problem(self, own: Space, name: str) -> Problem:
        def free(genes: Genes) -> tuple[Array, Array]:
            return np.zeros(len(genes)), np.zeros(len(genes))

        limit = Limit("macs", self.budget(name), lambda genes: own.costs(genes)[:, 0])
        return Problem(own, free, lambda genes: (0.0, 0.0), None, self.seed, (limit,))

    def inside(self, rows: Genes, names: tuple[str, ...]) -> Genes:
        """Those inside the budgets of all these tasks."""
        for name in names:
            rows = rows[self.of[name].costs(rows)[:, 0] <= self.budget(name)]
        return rows

    def random(self, names: tuple[str, ...], n: int) -> Genes:
        rng = np.random.default_rng((self.seed, 58))
        return self.inside(self.space.sample(rng, 4096), names)[:n]


# ---- methods -------------------------------------------------------------------------------------


def searched(experiment: Experiment, names: tuple[str, ...]) -> dict[str, Any]:
    """The row of a search: each task's network, the shared one, convergence."""

    def work(state: Path) -> dict[str, Any]:
        search = experiment.asked(names)
        shared = Shared(search)
        for _ in learn(shared, search, resume=state):
            pass
        picks, every = {}, []
        for name in names:
            found = list(judged(shared, search, name, experiment.judged))
            every += [finalist.genes for finalist in found]
            picks[name] = min(found, key=lambda finalist: finalist.loss).genes
        told = {name: vars(outcome) for name, outcome in outcomes(shared, search).items()}
        common = _common(experiment, search, shared, every) if len(names) > 1 else None
        return {"picks": picks, "shared": common, "told": told}

    return experiment.row({"what": "search", "tasks": list(names)}, work)


def _common(experiment: Experiment, search: Search, shared: Shared, genes: list[Genes1]) -> Genes1:
    """The best of all tasks' candidates by the mean of its losses, each as a share of the best
    constant answer's."""
    rows = np.unique(np.array(genes), axis=0)
    rows = experiment.inside(rows, search.names)
    if len(rows) == 0:  # distributions have gone apart: none suits every budget
        rows = experiment.random(search.names, experiment.judged)
    constant = {goal.name: constant_loss(search.task, goal) for goal in search.task.goals}

    def mean(row: Genes) -> float:
        each = [
            validation_loss(
                multitask_outcome.child(shared, search, (name,), row), search.task.only([name])
            )
            / constant[name]
            for name in search.names
        ]
        return float(np.mean(each))

    found: list[int] = min(rows, key=mean).tolist()
    return tuple(found)


def one_run(experiment: Experiment) -> Picks:
    return dict(searched(experiment, experiment.names)["picks"])


def one_shared(experiment: Experiment) -> Picks:
    return dict.fromkeys(experiment.names, searched(experiment, experiment.names)["shared"])


def separate(experiment: Experiment) -> Picks:
    return {name: searched(experiment, (name,))["picks"][name] for name in experiment.names}


def random_all(experiment: Experiment) -> Picks:
    """The work of the one run in equal parts."""
    search = experiment.asked(experiment.names)
    judging = FORWARD * (search.samples + 1) * search.plan.steps
    steps = round((search.schedule.steps + judging) / experiment.short)
    schedule = replace(search.schedule, steps=steps)
    rows = [tuple(row) for row in experiment.random(experiment.names, experiment.short).tolist()]

    def loss(genes: Genes1) -> dict[str, float]:
        def work(state: Path) -> dict[str, Any]:
            net = fresh(experiment.space, genes, experiment.seed)
            for _ in train(net, experiment.task, schedule, resume=state):
                pass
            alone = {name: Only(net, name) for name in experiment.names}
            return {
                name: validation_loss(each, experiment.task.only([name]))
                for name, each in alone.items()
            }

        found: dict[str, float] = experiment.row({"what": "short", "genes": list(genes)}, work)
        return found

    every = [loss(row) for row in rows]
    return {name: rows[int(np.argmin([each[name] for each in every]))] for name in experiment.names}


def random_one(experiment: Experiment) -> Picks:
    drawn = experiment.random(experiment.names, len(experiment.names)).tolist()
    return {name: tuple(row) for name, row in zip(experiment.names, drawn, strict=True)}


METHODS: dict[str, Callable[[Experiment], Picks]] = {
    "one run": one_run,
    "one shared": one_shared,
    "random, all tasks": random_all,
    "a random network": random_one,
    "separate searches": separate,
}


class Only(nn.Module):
    """One answer of a network with several."""

    def __init__(self, net: nn.Module, name: str) -> None:
        super().__init__()
        self.net, self.name = net, name

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = self.net(x)[self.name]
        return found


def fresh(space: Space, genes: Genes1, seed: int) -> nn.Module:
    """The network of these genes, initialised from the seed."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return channels_last(space.build(space.decode(np.array(genes))))


def own_training(experiment: Experiment, name: str, genes: Genes1) -> dict[str, Any]:
    """The row of a task's network trained alone from scratch: its metric. Methods that chose the
    same network share it."""

    def work(state: Path) -> dict[str, Any]:
        space, task = experiment.of[name], experiment.task.only([name])
        net = fresh(space, genes, experiment.seed)
        schedule = replace(experiment.setting.own, seed=experiment.seed)
        for _ in train(net, task, schedule, resume=state):
            pass
        found = {}
        for part, split in (("val", task.val), ("test", task.test)):
            found[part] = multitask.scores(task, multitask.evidence(net, task, split))[name]
        return {**found, "macs": op.macs(space.ops(space.decode(np.array(genes))))}

    row: dict[str, Any] = experiment.row({"what": "own", "task": name, "genes": list(genes)}, work)
    return row


def wall_time(experiment: Experiment, rounds: int) -> dict[str, Any]:
    """Seconds per step of searches for the first one, two, ... tasks, in turn with each other."""

    def work(state: Path) -> dict[str, Any]:
        names = experiment.names
        running = []
        for count in range(1, len(names) + 1):
            search = experiment.asked(names[:count])
            # past the warm-up, so that every fourth step is one of the distributions too
            timed = replace(search, schedule=replace(search.schedule, steps=4 * rounds))
            running.append(learn(Shared(timed), timed))
            for _ in range(rounds):  # the warm-up
                next(running[-1])
        spent = np.zeros(len(running))
        for _ in range(2 * rounds):
            for at, steps in enumerate(running):
                began = time.process_time()
                next(steps)
                spent[at] += time.process_time() - began
        return {"seconds_per_step": (spent / (2 * rounds)).tolist()}

    row: dict[str, Any] = experiment.row({"what": "wall time"}, work)
    return row
