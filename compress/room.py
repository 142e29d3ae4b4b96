"""How far each task's loss may grow, from what that task has to lose (an extension of PAGCP).

A network that answers every image alike has lost a task: its loss there is the task's ceiling. The
published method gives all tasks one factor D, 6 for a detector; but a class may be lost at twice
its loss and a box at 1.2 times. So a task's D is a share of the way to its own ceiling, in
logarithms: (ceiling / loss) ** share. Rounds that each go a share below 1 of what is left never
come to the ceiling, however many they are.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from compress import losses
from compress.graph import forward
from compress.objective import Batch, Objective
from nas.outputs import changed, tensors

#: a ceiling is at least this times the unpruned network's loss. Where answers that are all alike do
#: hardly worse, the task has learned nothing that could be lost, but should not get worse either
LEAST = 1.05
LOOSENED = 3  # times, at most, that a round which misses its target goes on with larger shares


def share(drop: float) -> float:
    """Of the way to the ceiling, for a metric that may drop by so much in the end: 0.32 for 1 %,
    0.38 for 2 %, 0.56 for 10 %, 0.84 for 50 %. Far more than the drop, because training after the
    pruning makes up for most; a guess, not searched."""
    return drop**0.25


@dataclass(frozen=True)
class Room:
    """Of each task its ceiling, a loss, and the share of the way that a round may go."""

    ceilings: Mapping[str, float]
    shares: Mapping[str, float]  # above 0, below 1

    def bounds(self, losses: Mapping[str, float]) -> dict[str, float]:
        """D of each task for a network with these losses."""
        return {
            task: _ratio(self.ceilings[task], loss) ** self.shares[task]
            for task, loss in losses.items()
        }

    def loosened(self) -> list[Room]:
        """This one, and those to go on with where it does not do: each takes half of what the one
        before leaves, so that no task is ever given up."""
        found = [self]
        for _ in range(LOOSENED):
            wider = {task: (1 + share) / 2 for task, share in found[-1].shares.items()}
            found.append(replace(self, shares=wider))
        return found


def _ratio(ceiling: float, loss: float) -> float:
    found = ceiling / loss
    return found if found > 1 + 1e-6 else LEAST  # at its ceiling already: nothing more is lost


def of(
    net: nn.Module,
    objectives: Sequence[Objective],
    batches: Sequence[Batch],
    drops: Mapping[str, float],
) -> Room:
    """For metrics that may drop by these shares, relative; `net` is the unpruned network."""
    shares = {task: share(drop) for task, drop in drops.items()}
    alike = ceilings(net, objectives, batches)
    before = losses.measure(net, objectives, batches).values
    found = {
        task: alike[task] if LEAST * loss < alike[task] < math.inf else LEAST * loss
        for task, loss in before.items()
    }
    return Room(found, shares)


@torch.no_grad()
def ceilings(
    net: nn.Module, objectives: Sequence[Objective], batches: Sequence[Batch]
) -> dict[str, float]:
    """Losses on the batches where every image gets the network's mean answer to all of them."""
    means = _mean_answers(net, batches)
    sums = dict.fromkeys((objective.name for objective in objectives), 0.0)
    for inputs, targets in batches:
        outputs = _alike(forward(net, inputs), means)
        for objective in objectives:
            sums[objective.name] += float(objective.loss(outputs, targets)) * len(inputs)
    total = sum(len(inputs) for inputs, _ in batches)
    return {task: value / total for task, value in sums.items()}


def _alike(outputs: Any, means: Sequence[Tensor | None]) -> Any:
    """These outputs with the means for every image."""
    left = iter(means)

    def mean_of(answer: Tensor) -> Tensor:
        mean = next(left)
        return answer if mean is None else mean.to(answer).expand_as(answer)

    return changed(outputs, mean_of)


def _mean_answers(net: nn.Module, batches: Sequence[Batch]) -> list[Tensor | None]:
    """Of each tensor of the outputs; None for one without a row per image, or of other shapes from
    batch to batch."""
    found: list[list[Tensor | None]] = []
    for inputs, _ in batches:
        answers = tensors(forward(net, inputs))
        found.append([_total(answer, len(inputs)) for answer in answers])
    images = sum(len(inputs) for inputs, _ in batches)
    means: list[Tensor | None] = []
    for sums in zip(*found, strict=True):
        known = [one for one in sums if one is not None]
        alike = len(known) == len(sums) and len({one.shape for one in known}) == 1
        means.append(torch.stack(known).sum(0) / images if alike else None)
    return means


def _total(answer: Tensor, images: int) -> Tensor | None:
    rows = answer.dim() and len(answer) == images and answer.is_floating_point()
    return answer.double().sum(0) if rows else None
