"""One supernet, several tasks on the same images, one search (FBNetV5-style, arXiv 2111.10007).

Weights and distributions learn in turn, on two parts of the training images. A step of the weights
runs one network, drawn from the mixture of all tasks' distributions (`nas.mixture`): the backbone
once, every head on its maps, one backward pass of the tasks' losses, each times the network's
importance weight for the task. So more tasks cost no more than their heads. After a warm-up the
distributions move every few steps, by the losses of a few networks on the same held-out images
(`nas.fbnetv5`), without a backward pass.

Ours: losses count as shares of the task's own running loss, so that no scale decides who is
learned; the distributions see losses less that of one more network on the same images, which takes
out how hard the images are. A task whose loss is no better than that of its best constant answer is
said to have collapsed. Images that nobody labelled for a task are left out of its losses.

Everything random is a function of (seed, step); a search that was killed goes on from the last save
to the same result.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Generator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from nas import checkpoint, fbnetv5, mixture, resumable, update
from nas.elastic import channels_last
from nas.errors import BudgetInfeasible, NasctlError
from nas.fbnetv5 import WINDOW, Plan, Report, State
from nas.goals import Goal
from nas.gradients import batch_indices
from nas.judge import device_of
from nas.mixture import Array
from nas.multitask import MultiTask, answers
from nas.multitask_training import Schedule, goal_losses
from nas.search import Problem
from nas.search_spaces.fbnetv5 import FBNetV5, Space, multiple
from nas.space import Genes

SHARE = 0.8  # of the training images for the weights
WARM = 0.25  # share of the steps before the distributions move
EVERY = 4  # steps of the weights per step of the distributions
TRAVEL = 25.0  # of a logit over a whole search, at most: as in the plans of benchmarks.fbnetv5
DECAY = 0.98  # of the running losses
LEAST_SCALE = 1e-12  # of a loss: one that is zero divides nothing
MOVED = ("logits", "first", "second", "price")  # of a State, kept as buffers under these names
LABEL = "Leave the task out of --tasks, or label more images."
LEAST = 8  # labelled images that every task has among those of a step of the distributions


@dataclass(frozen=True, eq=False)
class Search:
    """What is asked for: a space with a head per goal of `task`, how weights are trained, and for
    each goal its problem: `space.only(goal)` and at most one budget, latency or MACs.

    Raises NasctlError where a goal has no head, no labels, or a budget that nothing meets.
    """

    space: Space
    task: MultiTask
    schedule: Schedule
    problems: Mapping[str, Problem]
    samples: int = 8  # networks per step of the distributions

    def __post_init__(self) -> None:
        for goal in self.task.goals:
            for part, rows in zip(("weights", "distributions"), self.parts, strict=True):
                if not len(self.labelled(goal, rows)):
                    raise NasctlError(
                        f"none of the {len(rows)} training images for the {part} has a label",
                        where=f"task '{goal.name}'",
                        next=LABEL,
                    )
            if goal.labelled is not None and not goal.labelled(self.task.val.targets).any():
                raise NasctlError(
                    f"none of the {len(self.task.val)} validation images, which choose its "
                    "network, has a label",
                    where=f"task '{goal.name}'",
                    next=LABEL,
                )
        for name, problem in self.problems.items():
            _check_budget(name, problem)

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(goal.name for goal in self.task.goals)

    @property
    def warm(self) -> int:
        return math.ceil(WARM * self.schedule.steps)

    @cached_property
    def parts(self) -> tuple[range, range]:
        """The training images for the weights and those for the distributions."""
        cut = round(SHARE * len(self.task.train))
        return range(cut), range(cut, len(self.task.train))

    @cached_property
    def plan(self) -> Plan:
        steps = max(1, len(range(self.warm, self.schedule.steps, EVERY)))
        rate = min(0.4, TRAVEL / steps)
        budgets = tuple(_most(self.problems[name]) for name in self.names)
        return Plan(steps, self.samples, rate, budgets_us=budgets, seed=self.schedule.seed)

    @cached_property
    def fingerprint(self) -> str:
        """Of everything that a search's result depends on besides its initial weights."""
        some = self.space.sample(np.random.default_rng(0), 16)  # whose costs stand for the tables
        rows = np.concatenate([some, self.space.largest[None]])
        said = [self.schedule, self.plan, self.task.fingerprint, self.names, self.space.tasks]
        return hashlib.sha256(f"{said} {self.costs(rows)}".encode()).hexdigest()

    def labelled(self, goal: Goal, rows: range) -> Tensor:
        """Those of the training images `rows` that have a label for the goal [n <= N]."""
        every = torch.arange(rows.start, rows.stop)
        if goal.labelled is None:
            return every
        targets = self.task.train.targets
        return every[goal.labelled({name: t[every] for name, t in targets.items()})]

    def costs(self, rows: Genes) -> Array | None:
        """What each task's budget counts [N, T]: microseconds, or MACs; NaN for a task without a
        budget, None if none has one."""
        budgets = [self.problems[name].budgets for name in self.names]
        if not any(budgets):
            return None
        found = np.full((len(rows), len(budgets)), np.nan)
        for at, limits in enumerate(budgets):
            if limits:
                found[:, at] = limits[0].cost(rows) * _unit(limits[0].name)
        return found


def _unit(budget: str) -> float:
    """Latencies of a problem are in milliseconds."""
    return 1e3 if budget == "latency" else 1.0


def _most(problem: Problem) -> float | None:
    return problem.budgets[0].most * _unit(problem.budgets[0].name) if problem.budgets else None


def _check_budget(name: str, problem: Problem) -> None:
    for limit in problem.budgets:  # the smallest mask is the cheapest: no gate has negative cost
        least = float(limit.cost(problem.space.smallest[None])[0])
        if least > limit.most:
            unit = "ms" if limit.name == "latency" else " MACs"
            raise BudgetInfeasible(
                f"no network fits {limit.most:.4g}{unit}: the smallest needs {least:.4g}{unit}",
                where=f"task '{name}'",
                next="Raise its budget, or take a smaller --width or --size.",
            )


def space_for(task: MultiTask, width: float | None = None) -> Space:
    """The backbones for the images of a multi-task, with a head for each of its goals.

    Raises NasctlError for a goal that says nothing of its head, and for images whose sides the
    coarsest path cannot halve evenly.
    """
    for goal in task.goals:
        if goal.answer is None:
            raise NasctlError(
                "says nothing of the head that it needs",
                where=f"task '{goal.name}'",
                next="Give its Goal an `answer`, as classes(..., n_classes=20) does.",
            )
    channels, height, wide = task.shape
    unit = multiple(min(height, wide))
    if height % unit or wide % unit:
        raise NasctlError(
            f"images of {height} x {wide} pixels",
            where="--size",
            allowed=f"height and width that are multiples of {unit}",
        )
    heads = {goal.name: goal.answer for goal in task.goals if goal.answer is not None}
    return Space(channels=channels, size=height, across=wide, width=width, tasks=heads)


# ---- state ---------------------------------------------------------------------------------------


class Shared(nn.Module):
    """The supernet and every task's distribution: buffers, so that a checkpoint is all of it."""

    logits: Tensor
    first: Tensor
    second: Tensor
    window: Tensor  # [WINDOW, T], the latest losses last
    price: Tensor  # [T], of what is above a budget
    moves: Tensor  # steps of the distributions so far
    level: Tensor  # [T], running loss; NaN before the first
    heard: Tensor  # [T], steps that had a loss of the task
    effective: Tensor  # [T], share of the last networks that the task's estimate was worth
    expected: Tensor  # [T], their weighted mean cost: microseconds or MACs

    def __init__(self, search: Search) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(search.schedule.seed)  # torch's initialisers know no other generator
            net = search.space.supernet()
        assert isinstance(net, FBNetV5)
        self.net = channels_last(net)
        tasks = len(search.names)
        begin = fbnetv5.start(tasks, search.space.sizes)
        for name in MOVED:
            self.register_buffer(name, torch.from_numpy(getattr(begin, name).copy()))
        self.register_buffer("window", torch.full((WINDOW, tasks), torch.nan, dtype=torch.float64))
        self.register_buffer("moves", torch.zeros((), dtype=torch.int64))
        self.register_buffer("heard", torch.zeros(tasks, dtype=torch.int64))
        for name in ("level", "effective", "expected"):
            self.register_buffer(name, torch.full((tasks,), torch.nan, dtype=torch.float64))
        self.samples = search.samples

    @property
    def state(self) -> State:
        step = int(self.moves)
        known = min(WINDOW, step * self.samples)
        losses = self.window.numpy()[WINDOW - known :].copy()
        moved = {name: getattr(self, name).numpy().copy() for name in MOVED}
        return State(losses=losses, step=step, **moved)

    def take(self, state: State, report: Report) -> None:
        for name in MOVED:
            getattr(self, name).copy_(torch.from_numpy(getattr(state, name)))
        self.window[WINDOW - len(state.losses) :] = torch.from_numpy(state.losses)
        self.moves.fill_(state.step)
        self.effective.copy_(torch.from_numpy(report.effective / self.samples))
        self.expected.copy_(torch.from_numpy(report.latency_us))

    def follow(self, at: int, loss: float) -> float:
        """A task's running loss with this one: a mean at first, so that the start is forgotten."""
        n = int(self.heard[at])
        decay = min(DECAY, n / (n + 10))
        before = float(self.level[at]) if n else loss
        self.level[at] = max(decay * before + (1 - decay) * loss, LEAST_SCALE)
        self.heard[at] += 1
        return float(self.level[at])


@dataclass(frozen=True)
class Step:
    """A step of the weights, and of the distributions if there was one."""

    step: int  # steps done so far
    steps: int
    losses: Mapping[str, float]  # running, in the task's own unit
    report: Report | None = None


# ---- the search ----------------------------------------------------------------------------------


def learn(
    shared: Shared, search: Search, *, resume: Path | None = None, save_every_s: float = 20.0
) -> Generator[Step, None, None]:
    """Train weights and distributions in place, yielding after each of the schedule's steps.

    `resume`, `save_every_s` and what closing does are as in `nas.multitask_training.train`. Raises
    NasctlError naming the task whose loss is not finite, or if the state is of another search.
    """
    schedule, net = search.schedule, shared.net.train()
    optimiser = update.sgd(shared, schedule.lr, schedule.momentum, schedule.weight_decay)
    said = f"{search.fingerprint} {checkpoint.digest(shared)}"

    def step(done: int) -> Step:
        _weights(shared, search, done)
        update.step(net, optimiser, schedule.lr_at(done), schedule.clip_norm)
        report = None
        if done >= search.warm and (done - search.warm) % EVERY == 0:
            report = _move(shared, search)
        losses = dict(zip(search.names, shared.level.tolist(), strict=True))
        return Step(done + 1, schedule.steps, losses, report)

    state = resumable.Weights(resume, shared, optimiser, said)
    yield from resumable.train(step, state, schedule.steps, save_every_s)
    shared.eval()


def _weights(shared: Shared, search: Search, step: int) -> None:
    """Adds the gradient of one network, which all tasks share."""
    task, seed, policies = search.task, search.schedule.seed, shared.state.policies
    row = mixture.draw(policies, np.random.default_rng((seed, 55, step)), 1)
    weight = mixture.weights(policies, row)[0]
    rows = batch_indices(len(search.parts[0]), search.schedule.batch, step, seed)
    part = task.train.at(rows)
    generator = torch.Generator().manual_seed(seed * 1_000_003 + step)
    images, targets = task.augmented(part.to(device_of(shared.net)), generator)
    outputs = answers(shared.net(images, search.space.decode(row[0])), task)
    losses = goal_losses(task, outputs, targets)
    parts = []
    for at, goal in enumerate(task.goals):
        loss = losses[goal.name]
        if not loss.isfinite():
            raise NasctlError(
                f"the loss of {goal.name} is {loss.item()} at step {step + 1}",
                where="--lr",
                next=f"Try --lr {search.schedule.lr / 3:.2g}, or look at its labels.",
            )
        if goal.labelled is not None and not goal.labelled(targets).any():
            continue
        scale = shared.follow(at, loss.item())
        parts.append(goal.weight * float(weight[at]) * loss / scale)
    if parts:
        torch.stack(parts).sum().backward()


@torch.no_grad()
def _move(shared: Shared, search: Search) -> Report:
    """A step of every task's distribution, from the losses of a few networks and no gradient."""
    state, plan, task = shared.state, search.plan, search.task
    rows = fbnetv5.ask(plan, state)
    rng = np.random.default_rng((plan.seed, 56, state.step))
    control = mixture.draw(state.policies, rng, 1)
    seen = task.train.at(_held_out(search, state.step)).to(device_of(shared.net))
    images = task.normalise(seen.images)
    found = []
    for row in np.concatenate([rows, control]):
        outputs = answers(shared.net(images, search.space.decode(row)), task)
        each = goal_losses(task, outputs, seen.targets)
        found.append([each[name].item() for name in search.names])
    losses = np.array(found)
    after, report = fbnetv5.tell(plan, state, rows, losses[:-1] - losses[-1], search.costs(rows))
    shared.take(after, report)
    return report


def _held_out(search: Search, move: int) -> Tensor:
    """Training images that the weights do not learn from; some are labelled for every task."""
    task, part, seed = search.task, search.parts[1], search.schedule.seed
    rows = part.start + batch_indices(len(part), search.schedule.batch, move, seed)
    for goal in task.goals:
        known = goal.labelled and int(goal.labelled(task.train.at(rows).targets).sum())
        if known is not None and known < LEAST:
            there = search.labelled(goal, part)
            rng = np.random.default_rng((seed, 57, move))
            more = there[torch.from_numpy(rng.permutation(len(there))[: LEAST - known])]
            rows = torch.cat([rows, more])
    return rows
