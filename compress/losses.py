"""Losses of a network on cached batches, given up as soon as one is surely over its limit."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from compress.graph import forward
from compress.objective import Batch, Objective
from nas.errors import NasctlError


@dataclass(frozen=True)
class Losses:
    """Means over all samples, by task; where the measuring was given up, `over` names the task
    that is over its limit, and `values` are what the losses are at least."""

    values: Mapping[str, float]
    over: str = ""


def measure(
    net: nn.Module,
    objectives: Sequence[Objective],
    batches: Sequence[Batch],
    limits: Mapping[str, float] | None = None,
) -> Losses:
    """The losses of `net`, held to `limits`. Batches count by their samples.

    A limit is surely exceeded when it would be even if all batches to come had a task's least
    loss, so what is given up is what a full measurement would refuse. A loss that is not a number
    is over every limit; without limits it raises NasctlError.
    """
    sizes = [len(inputs) for inputs, _ in batches]
    total = sum(sizes)
    sums = {objective.name: 0.0 for objective in objectives}
    seen = 0
    with torch.no_grad():
        for at, ((inputs, targets), size) in enumerate(zip(batches, sizes, strict=True)):
            outputs = forward(net, inputs)
            seen += size
            for objective in objectives:
                loss = float(objective.loss(outputs, targets))
                _check(loss, objective, at, limits)
                sums[objective.name] += loss * size
            at_least = {
                o.name: (sums[o.name] + (o.least * (total - seen) if seen < total else 0.0)) / total
                for o in objectives
            }
            over = _worst(at_least, limits) if limits else ""
            if over:
                return Losses(at_least, over)
    return Losses(at_least)


def _check(
    loss: float, objective: Objective, batch: int, limits: Mapping[str, float] | None
) -> None:
    if loss < objective.least:
        raise NasctlError(
            f"a loss of {loss:.4g}, below its least value {objective.least:g}",
            where=f"task '{objective.name}', batch {batch}",
            next="Say Objective(least=...): measurements are given up by it.",
        )
    if limits is None and not math.isfinite(loss):
        raise NasctlError(
            f"the unpruned network's loss is {loss}",
            where=f"task '{objective.name}', batch {batch}",
            next="Are these its trained weights, and its data? Look at its outputs on that batch.",
        )


def _worst(losses: Mapping[str, float], limits: Mapping[str, float]) -> str:
    """The task that is furthest over its limit, relative to it; nothing if none is."""
    furthest, name = 1.0, ""
    for task, loss in losses.items():
        if math.isnan(loss):
            return task
        if loss > limits[task] and loss / limits[task] >= furthest:
            furthest, name = loss / limits[task], task
    return name
