"""How every baseline meets a target: scores of channels, and the mildest pruning by them that does.

A baseline says what a channel is worth and which units compete with each other (a scope); the
widths, their rounding, the graph and the search for the target are the same for all.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Hashable, Mapping, Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn

from compress import losses, widths
from compress.graph import Graph, Member
from compress.history import History
from compress.job import Job, Progress, Pruned, Row, Settings, Steps
from compress.record import Record
from compress.tally import Tally
from compress.units import Found, Unit
from nas.errors import BudgetInfeasible

HALVINGS = 16  # of the interval in which the strength lies

Scores = Mapping[Unit, Tensor]  # [places of a part]: what each is worth
Widths = Mapping[Unit, int]
#: from strength, 0 (nothing goes) to 1 (all that may), to the widths that are kept
Allocate = Callable[[float], Widths]


def scored(
    graph: Graph, found: Sequence[Unit], score: Callable[[Sequence[Member], int], Tensor]
) -> Scores:
    """`score` of every unit of a network: (members of all channels, width) -> [width]."""
    return {u: widths.by_place(score(graph.members(u.root), u.width), u) for u in found}


def by_threshold(scores: Scores, scope: Callable[[Unit], Hashable], settings: Settings) -> Allocate:
    """The strength's share of each scope's places goes, those of least score. No unit loses more
    than the grid's last ratio: a global order may want to empty a layer."""
    scopes: dict[Hashable, list[Unit]] = {}
    for unit in scores:
        scopes.setdefault(scope(unit), []).append(unit)
    most = settings.grid[-1]

    def allocate(strength: float) -> dict[Unit, int]:
        kept: dict[Unit, int] = {}
        for members in scopes.values():
            every = torch.cat([scores[unit] for unit in members]).sort().values
            limit = every[min(round(strength * len(every)), len(every) - 1)]
            for unit in members:
                share = float((scores[unit] < limit).float().mean()) if strength < 1 else 1.0
                kept[unit] = widths.kept(unit, min(share, most), settings.divisor)
        return kept

    return allocate


def evenly(scores: Scores, settings: Settings) -> Allocate:
    """The strength's share of every unit goes, to the nearest width. Units come to it one by one,
    from the input on where they are alike: all at once, widths in multiples of the divisor would
    leave nothing between two networks of which one misses the target and one is far below it."""
    steps: list[tuple[float, Unit, int]] = []
    for unit in scores:
        way = (unit.width, *widths.every(unit, settings))
        for wide, narrow in pairwise(way):
            steps.append((1 - (wide + narrow) / 2 / unit.width, unit, narrow))
    steps.sort(key=lambda step: step[0])

    def allocate(strength: float) -> dict[Unit, int]:
        taken = steps[: round(strength * len(steps))]
        return {unit: unit.width for unit in scores} | {unit: kept for _, unit, kept in taken}

    return allocate


def reach(
    job: Job, found: Found, scores: Scores, allocate: Allocate, known: Record | None = None
) -> Steps:
    """Prune by the least strength whose network costs at most the target; the places of least
    score go. With `known` costs are taken from there, and the same call goes on after a kill.
    Raises BudgetInfeasible where not even the greatest strength gives one."""
    began = time.perf_counter()
    tally = Tally(job, known or Record())
    before = tally.of(job.net)
    orders = {unit: widths.weakest_first(worth) for unit, worth in scores.items()}
    tried: dict[tuple[int, ...], tuple[History, nn.Module, float]] = {}

    def at(strength: float) -> tuple[History, nn.Module, float]:
        kept = allocate(strength)
        key = tuple(kept.values())
        if key not in tried:
            steps = [widths.step(u, orders[u], n) for u, n in kept.items() if n < u.width]
            history = History(tuple(steps))
            net = history.replay(job.net, job.example_inputs)
            tried[key] = history, net, tally.against(net, job.target)
        return tried[key]

    low, high = 0.0, 1.0
    met = [at(high)]  # each milder than the one before
    if met[0][2] > job.target:
        raise _infeasible(job, met[0][2])
    for done in range(HALVINGS):
        spent = time.perf_counter() - began
        left = spent / done * (HALVINGS - done) if done else float("nan")
        yield Progress("searching the strength", done / HALVINGS, spent, left)
        middle = (low + high) / 2
        tried_now = at(middle)
        if tried_now[2] <= job.target:
            high = middle
            if tried_now is not met[-1]:
                met.append(tried_now)
        else:
            low = middle
    while (cost := tally.confirmed(met[-1][1])) > job.target:
        met.pop()
        if not met:
            raise _infeasible(job, cost)
    history, net, _ = met[-1]
    kept = {
        u: u.width - sum(len(s.indices) for s in history.steps if s.root == u.root) for u in scores
    }
    return Pruned(
        net=net,
        history=history,
        cost_before=before,
        cost=cost,
        losses_before=losses.measure(job.net, job.objectives, job.batches).values,
        losses=losses.measure(net, job.objectives, job.batches).values,
        rows=tuple(Row(unit.root, unit.width, n, n) for unit, n in kept.items()),
        left_alone=found.left_alone,
    )


def _infeasible(job: Job, least: float) -> BudgetInfeasible:
    return BudgetInfeasible(
        f"{least:.4g} {job.cost.unit} is the least that this method comes to",
        where=f"target {job.target:.4g} {job.cost.unit}",
    )
