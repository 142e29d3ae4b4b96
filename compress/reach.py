"""How every baseline meets a target: scores of channels, and the mildest pruning by them that does.

A baseline says what a channel is worth and which units compete with each other (a scope); the
widths, their rounding, the graph and the search for the target are the same for all.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise

import torch
from torch import Tensor, nn

from compress import losses, widths
from compress.cost import Latency
from compress.graph import Graph, Member
from compress.history import History
from compress.job import Job, OutOfReach, Progress, Pruned, Row, Settings, Steps
from compress.record import Record
from compress.tally import Tally
from compress.units import Found, Unit

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
    job: Job,
    found: Found,
    scores: Scores,
    allocate: Allocate,
    settings: Settings,
    known: Record | None = None,
) -> Steps:
    """Prune by the least strength whose network costs at most the target; the places of least
    score go, and those of most score come back while the target lets. With `known` costs are taken
    from there, and the same call goes on after a kill.
    Raises OutOfReach where not even the greatest strength gives one."""
    began = time.perf_counter()
    search = _Search(job, found, scores, settings, Tally(job, known or Record()))
    low, high = 0.0, 1.0
    met = [search.at(allocate(high))]  # each milder than the one before
    if met[0].cost > job.target:
        raise search.infeasible(met[0])
    for done in range(HALVINGS):
        spent = time.perf_counter() - began
        left = spent / done * (HALVINGS - done) if done else float("nan")
        yield Progress("searching the strength", done / HALVINGS, spent, left)
        middle = (low + high) / 2
        tried_now = search.at(allocate(middle))
        if tried_now.cost <= job.target:
            high = middle
            if tried_now is not met[-1]:
                met.append(tried_now)
        else:
            low = middle
    while (last := search.confirmed(met.pop())).cost > job.target:
        if not met:
            raise search.infeasible(last)
    return search.result(search.widened(last))


@dataclass(frozen=True, eq=False)
class _Try:
    kept: Widths
    history: History
    net: nn.Module
    cost: float


@dataclass
class _Search:
    """Networks of one method by their widths, each costed once."""

    job: Job
    found: Found
    scores: Scores
    settings: Settings
    tally: Tally
    tried: dict[tuple[int, ...], _Try] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.before = self.tally.of(self.job.net)
        self.orders = {u: widths.weakest_first(worth) for u, worth in self.scores.items()}

    def at(self, kept: Widths) -> _Try:
        key = tuple(kept[unit] for unit in self.scores)
        if key not in self.tried:
            steps = [widths.step(u, self.orders[u], n) for u, n in kept.items() if n < u.width]
            history = History(tuple(steps))
            net = history.replay(self.job.net, self.job.example_inputs)
            cost = self.tally.against(net, self.job.target)
            self.tried[key] = _Try(kept, history, net, cost)
        return self.tried[key]

    def confirmed(self, tried: _Try) -> _Try:
        return replace(tried, cost=self.tally.confirmed(tried.net))

    def widened(self, narrow: _Try) -> _Try:
        """A strength moves many places at once, and what it leaves of the target is filled here:
        unit by unit the next width whose places are worth most. Not in milliseconds, where every
        try is several sessions, and of many tries the one that a session flattered would be kept.
        """
        if isinstance(self.job.cost, Latency):
            return narrow
        ways = {u: (u.width, *widths.every(u, self.settings)) for u in self.scores}
        pruned = [unit for unit in self.scores if narrow.kept[unit] < unit.width]
        while pruned:
            now = narrow.kept
            wider = {u: min(w for w in ways[u] if w > now[u]) for u in pruned}
            unit = max(pruned, key=lambda u: self._worth(u, now[u], wider[u]))
            tried = self.at({**now, unit: wider[unit]})
            if tried.cost <= self.job.target:
                narrow = tried
            if tried.cost > self.job.target or wider[unit] == unit.width:
                pruned.remove(unit)
        return narrow

    def _worth(self, unit: Unit, narrow: int, wide: int) -> float:
        """The mean score of the places that come back."""
        back = self.orders[unit][widths.gone(unit, wide) : widths.gone(unit, narrow)]
        return float(self.scores[unit][back].mean())

    def result(self, of: _Try) -> Pruned:
        job, stale = self.job, self.settings.stale
        whole, net = copy.deepcopy(job.net), of.net
        whole, net = (one if stale else job.renewed(one) for one in (whole, net))
        return Pruned(
            net=net,
            history=of.history,
            cost_before=self.before,
            cost=of.cost,
            losses_before=losses.measure(whole, job.objectives, job.batches).values,
            losses=losses.measure(net, job.objectives, job.batches).values,
            rows=tuple(Row(unit.root, unit.width, n, n) for unit, n in of.kept.items()),
            left_alone=self.found.left_alone,
        )

    def infeasible(self, least: _Try) -> OutOfReach:
        job = self.job
        return OutOfReach(
            f"{least.cost:.4g} {job.cost.unit} is the least that this method comes to",
            where=f"target {job.target:.4g} {job.cost.unit}",
            reached=self.result(least),
        )
