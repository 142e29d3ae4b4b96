"""What a search for many tasks has come to: convergence, collapsed tasks, and each task's network.

A task's network is the best, by the weights it shares and on validation images, of those that the
task's own distribution proposes inside its budget. It is then trained by itself: by whatever the
caller does with it, the search knows nothing of that.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor, nn

from nas.data.split import shuffled
from nas.differentiable.proposals import DRAWS, propose
from nas.elastic import channels_last, extract, recalibrate
from nas.errors import BudgetInfeasible
from nas.goals import Goal
from nas.judge import device_of
from nas.mixture import Array, Policies, draw
from nas.multitask import BATCH_EVAL, MultiTask, answers, evidence
from nas.multitask_search import Search, Shared
from nas.search import GENERATION, Problem
from nas.space import Genes

FITTED = 2**24  # answers, at most, that the best constant one is fitted to
LEAST = 256  # images that it is fitted to, however many answers each has
CALIBRATION = 512  # training images that batch norms are re-calibrated on


@dataclass(frozen=True)
class Outcome:
    """Of one task, at the end of a search."""

    loss: float  # running, of the networks that were trained
    constant: float  # of the best answer that does not look at the image
    entropy: float  # of the distribution, 1 at first and 0 when settled
    effective: float | None  # share of the last step's networks that its estimate was worth
    expected: float | None  # their cost: microseconds, or MACs
    inside: float | None  # share of the distribution's draws that its budget lets through
    labelled: float  # share of the training images

    @property
    def collapsed(self) -> bool:
        return not self.loss < self.constant


def outcomes(shared: Shared, search: Search) -> dict[str, Outcome]:
    """By task."""
    entropy = shared.state.policies.entropy()
    every = range(len(search.task.train))
    found = {}
    for at, goal in enumerate(search.task.goals):
        found[goal.name] = Outcome(
            loss=float(shared.level[at]),
            constant=constant_loss(search.task, goal),
            entropy=float(entropy[at]),
            effective=_number(shared.effective[at]),
            expected=_number(shared.expected[at]),
            inside=_inside(search.problems[goal.name], shared.state.logits[at]),
            labelled=len(search.labelled(goal, every)) / len(every),
        )
    return found


def _inside(problem: Problem, logits: Array) -> float | None:
    if not problem.budgets:
        return None
    rows = draw(Policies(logits[None]), np.random.default_rng((problem.seed, 59)), DRAWS)
    return len(problem.inside(rows)[0]) / len(rows)


def _number(value: Tensor) -> float | None:
    return float(value) if value.isfinite() else None


def constant_loss(task: MultiTask, goal: Goal) -> float:
    """The least loss of an answer that is the same for every image and pixel, on the labelled
    training images, or as many of them at random as FITTED answers are."""
    assert goal.answer is not None
    rows = torch.arange(len(task.train))
    if goal.labelled is not None:
        rows = rows[goal.labelled(task.train.targets)]
    sides = task.shape[1:] if goal.answer.form == "map" else ()
    most = max(LEAST, FITTED // math.prod((goal.answer.channels, *sides)))
    rows = rows[torch.from_numpy(shuffled(len(rows)))[:most]]
    targets = {name: values[rows] for name, values in task.train.targets.items()}
    shape = (len(rows), goal.answer.channels, *sides)
    bias = torch.zeros(goal.answer.channels, requires_grad=True)
    optimiser = torch.optim.LBFGS([bias], max_iter=30, line_search_fn="strong_wolfe")

    def loss() -> float:
        optimiser.zero_grad()
        answer = bias.view(1, -1, *(1 for _ in sides)).expand(shape)
        value = goal.loss({goal.name: answer}, targets)
        value.backward()
        return value.item()

    optimiser.step(loss)
    return loss()


# ---- each task's network -------------------------------------------------------------------------


@dataclass(frozen=True)
class Finalist:
    """A network that was judged for one task by the weights it shares."""

    genes: tuple[int, ...]
    loss: float  # on validation images
    score: float  # the goal's metric, likewise


def judged(shared: Shared, search: Search, name: str, n: int = GENERATION) -> Iterator[Finalist]:
    """At most `n` that the task's distribution proposes inside its budget, the likeliest first.

    Raises BudgetInfeasible where none was found.
    """
    rows = proposed(shared, search, name)[:n]
    own = search.task.only([name])
    for row in rows:
        net = child(shared, search, (name,), row)
        seen = evidence(net, own, own.val)[name]
        loss = validation_loss(net, own)
        yield Finalist(tuple(row.tolist()), loss, own.goals[0].score(seen))


def proposed(shared: Shared, search: Search, name: str) -> Genes:
    """Distinct rows [<= 16, G] inside the task's budget."""
    problem: Problem = search.problems[name]
    logits = shared.state.logits[search.names.index(name)]
    rows = propose(replace(problem, policy=logits), 0, [])
    if len(rows) == 0:
        raise BudgetInfeasible("no network inside the budget was found", where=f"task '{name}'")
    return rows


def child(shared: Shared, search: Search, names: Sequence[str], genes: Genes) -> nn.Module:
    """The network of these gates with the heads of the tasks `names`, with the weights it shares,
    re-calibrated; in eval mode."""
    own = search.space.only(*names)
    device = device_of(shared.net)
    small = channels_last(extract(shared.net, own.build(own.decode(genes)).to(device)))
    order = np.random.default_rng(0).permutation(len(search.task.train))[:CALIBRATION]
    images = search.task.train.images[torch.from_numpy(order)]
    return recalibrate(small, map(search.task.normalise, images.to(device).split(BATCH_EVAL)))


@torch.no_grad()
def validation_loss(net: nn.Module, task: MultiTask) -> float:
    """Of the one goal of `task`, over the images that have a label."""
    (goal,) = task.goals
    total = count = 0.0
    for images, targets in task.batches(task.val, device=device_of(net)):
        known = len(images) if goal.labelled is None else int(goal.labelled(targets).sum())
        if known:
            total += known * float(goal.loss(answers(net(images), task), targets))
            count += known
    return total / count if count else float("nan")
