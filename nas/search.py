"""Search by generations: a strategy proposes, the supernet judges, an Optuna study remembers.

A strategy (`nas/strategies/`) is one function: what it proposes for a generation depends on the
problem, the generation and the results of all earlier generations, on nothing else. The loop
(`search`) evaluates a generation and tells the study, which is the only state. A generation begins
when every earlier one is complete, so a search that was killed goes on to the same result, and
several workers on one storage find what one would have found.

Imports without torch: evaluation is a callable.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from nas import pareto
from nas.errors import NasctlError
from nas.space import Genes, SearchSpace

if TYPE_CHECKING:
    import optuna

Array = NDArray[np.float64]
GENERATION = 16
POOL = 20_000
WALKS = 4  # rounds of mutation that look for networks inside a tight budget


@dataclass(frozen=True)
class Candidate:
    """An evaluated network. `slot` is its place in the search's order of proposals."""

    slot: int
    genes: tuple[int, ...]
    latency_ms: float
    high_ms: float  # upper end of the estimate's 90 % interval
    cross_entropy: float  # nats, on validation images
    accuracy: float


@dataclass(frozen=True)
class Limit:
    """A hard budget: no network is proposed whose `cost(genes [N, G]) -> [N]` is above `most`."""

    name: str  # latency, macs, params or memory: its flag without the dashes
    most: float
    cost: Callable[[Genes], Array]


@dataclass(frozen=True)
class Problem:
    """What is searched: a space, a vectorised latency, a validation score and hard budgets.

    `latency(genes [N, G]) -> (value_ms [N], high_ms [N])`; `evaluate(genes [G]) -> (ce, accuracy)`.
    A network is inside the latency budget when `high_ms` is; `limits` are the other budgets.
    `features` are scores that need no training (`nas.strategies.robot` asks for them, of few rows).
    """

    space: SearchSpace
    latency: Callable[[Genes], tuple[Array, Array]]
    evaluate: Callable[[Genes], tuple[float, float]]
    budget_ms: float | None = None
    seed: int = 0
    limits: tuple[Limit, ...] = ()
    #: genes [N, G] -> values [N] of each cheap feature by name, NaN where one is missing
    features: Callable[[Genes], Mapping[str, Array]] | None = None
    #: logits [G, K] of a distribution that was learned with the weights (`nas.differentiable`)
    policy: Array | None = None

    @property
    def budgets(self) -> tuple[Limit, ...]:
        """All of them, latency's first."""
        if self.budget_ms is None:
            return self.limits
        high = Limit("latency", self.budget_ms, lambda genes: self.latency(genes)[1])
        return (high, *self.limits)

    def inside(self, genes: Genes) -> tuple[Genes, Array]:
        """The rows of [N, G] that are inside every budget, and their latencies in ms."""
        for limit in self.limits:
            genes = genes[limit.cost(genes) <= limit.most]
        value, high = self.latency(genes)
        if self.budget_ms is None:
            return genes, value
        fits = high <= self.budget_ms
        return genes[fits], value[fits]

    def fresh(self, genes: Genes, history: Sequence[Candidate]) -> tuple[Genes, Array]:
        """The distinct rows of [N, G] that are inside every budget and were not evaluated, in their
        order, and their latencies in ms. Every strategy proposes what this lets through."""
        keys, first = np.unique(row_keys(genes), return_index=True)
        if history:
            first = first[~np.isin(keys, row_keys(np.array([c.genes for c in history])))]
        return self.inside(genes[np.sort(first)])

    @cached_property
    def nearest(self) -> Genes:
        """The network found nearest to the budgets [G]: the one whose worst ratio of cost to budget
        is smallest. It is inside all of them exactly if that is at most 1."""
        return least(self, lambda genes: _excess(self.budgets, genes))


#: (problem, generation, everything evaluated in earlier generations) -> rows of one generation
Propose = Callable[[Problem, int, Sequence[Candidate]], Genes]


def row_keys(genes: Genes) -> NDArray[np.uint64]:
    """One number per row, for finding duplicates: sorting rows takes ten times as long.

    A random linear hash modulo 2^64; a collision (one in 10^10 pools) would only hide a candidate.
    """
    weights = np.random.default_rng(0).integers(1, 2**63, genes.shape[1], dtype=np.uint64)
    return genes.astype(np.uint64) @ (2 * weights + 1)


def _excess(budgets: Sequence[Limit], genes: Genes) -> Array:
    return np.max([limit.cost(genes) / limit.most for limit in budgets], axis=0)


def least(problem: Problem, cost: Callable[[Genes], Array]) -> Genes:
    """The cheapest network found [G]: random rows, then descent by one gene at a time."""
    space, rng = problem.space, np.random.default_rng((problem.seed, 4))
    pool = np.concatenate([space.smallest[None], space.sample(rng, POOL)])
    best = pool[np.argmin(cost(pool))]
    while True:
        near = np.repeat(best[None], int(space.sizes.sum()), axis=0)
        near[np.arange(len(near)), np.repeat(np.arange(len(best)), space.sizes)] = np.concatenate(
            [np.arange(size) for size in space.sizes]
        )
        near = space.canonical(near)
        found = cost(near)
        at = int(np.argmin(found))
        if found[at] >= cost(best[None])[0]:
            return best
        best = near[at]


def random_rows(
    problem: Problem, rng: np.random.Generator, history: Sequence[Candidate], n: int
) -> tuple[Genes, Array]:
    """Up to `n` new random rows inside every budget, and their latencies in ms.

    Uniform over the space while the budgets let enough through; where they are tight, the rest are
    found by walking from what is known to fit. Empty only if that finds nothing new.
    """
    space = problem.space
    pool = space.sample(rng, POOL)
    if problem.budgets:
        pool = np.concatenate([pool, problem.nearest[None]])
    rows, latency = problem.fresh(pool, history)
    for _ in range(WALKS):
        if len(rows) >= n:
            break
        known = [rows, np.array([c.genes for c in history], np.int64).reshape(-1, rows.shape[1])]
        starts = np.concatenate([*known, problem.nearest[None]] if problem.budgets else known)
        if len(starts) == 0:
            break
        walked = space.mutate(starts[rng.integers(0, len(starts), POOL)], rng)
        rows, latency = problem.fresh(np.concatenate([rows, walked]), history)
    return rows[:n], latency[:n]


def topped_up(
    problem: Problem, rng: np.random.Generator, history: Sequence[Candidate], rows: Genes
) -> Genes:
    """`rows` [n <= GENERATION, G] and as many random others as make a generation of them."""
    if len(rows) == GENERATION:
        return rows
    others, _ = random_rows(problem, rng, history, 2 * GENERATION)
    others = others[~np.isin(row_keys(others), row_keys(rows))]
    return np.concatenate([rows, others])[:GENERATION]


def search(
    problem: Problem,
    study: optuna.Study,
    evaluations: int,
    propose: Propose,
    size: int = GENERATION,
) -> Iterator[Candidate]:
    """Evaluate up to `evaluations` networks, yielding each (those already in the study first).

    A generation is `size` networks: what the strategy's file says (`strategies.generation`).

    Several processes may share a study: each takes the next free slot, waits at the end of a
    generation until the others' are complete and takes over the slots of dead ones. Ends early when
    the strategy finds no network within the budgets that was not evaluated.
    """
    from nas import study as studies

    yield from studies.candidates(study)
    watch = studies.Watch(study)
    proposals: tuple[int, Genes] = (-1, np.zeros((0, 0), np.int64))
    while True:
        slot = studies.next_slot(study)
        generation, place = divmod(slot, size)
        if not watch.complete(evaluations if slot >= evaluations else generation * size):
            continue
        if slot >= evaluations:
            return
        if proposals[0] != generation:
            before = [c for c in studies.candidates(study) if c.slot < generation * size]
            rows = propose(problem, generation, before)
            proposals = generation, _checked(problem, rows, before, size)
        if place >= len(proposals[1]):
            evaluations = slot  # nothing is left to evaluate but what others are at
            continue
        candidate = _evaluate(problem, study, slot, proposals[1][place])
        if candidate is not None:
            yield candidate


def _checked(problem: Problem, rows: Genes, history: Sequence[Candidate], size: int) -> Genes:
    """The rows, if they keep to a strategy's contract: it may be the user's own module."""
    if len(rows) > size or len(problem.fresh(rows, history)[0]) != len(rows):
        raise NasctlError(
            "the strategy proposed a network outside the budgets, or one twice, or more than "
            f"{size}",
            where="--strategy",
            next="Propose from Problem.fresh (docs/methods/strategies.md).",
        )
    return rows


def _evaluate(problem: Problem, study: optuna.Study, slot: int, genes: Genes) -> Candidate | None:
    from nas import study as studies

    trial = studies.ask(study, problem.space, slot, genes)
    if trial is None:
        return None
    value, high = problem.latency(genes[None])
    with studies.alive(study, trial):
        cross_entropy, accuracy = problem.evaluate(genes)
    if not math.isfinite(cross_entropy):
        raise NasctlError(
            f"the validation loss of network {slot} is {cross_entropy}",
            where=str(problem.space.decode(genes)),
            next="The supernet has diverged: train it again with a smaller --lr.",
        )
    row = tuple(genes.tolist())
    candidate = Candidate(slot, row, float(value[0]), float(high[0]), cross_entropy, accuracy)
    return candidate if studies.tell(study, trial, candidate) else None


def front(candidates: Sequence[Candidate]) -> list[Candidate]:
    """The non-dominated ones in (latency, validation cross-entropy), fastest first."""
    points = np.array([(c.latency_ms, c.cross_entropy) for c in candidates]).reshape(-1, 2)
    return [candidates[i] for i in pareto.front(points)]


def ranked(
    candidates: Sequence[Candidate], budget_ms: float | None, *, limited: bool = False
) -> list[Candidate]:
    """Best first: by cross-entropy among those inside the latency budget; without one, the front's
    knee and then the rest of the front.

    `limited` says that the search had other budgets (which all of its candidates keep to): then the
    best counts as with a latency budget.
    """
    if budget_ms is None and not limited:
        along = front(candidates)
        points = np.array([(c.latency_ms, c.cross_entropy) for c in along])
        first = along[pareto.knee(points)]
        return [first, *(c for c in along if c is not first)]
    inside = [c for c in candidates if budget_ms is None or c.high_ms <= budget_ms]
    return sorted(inside, key=lambda c: (c.cross_entropy, c.latency_ms))


def as_dict(candidate: Candidate, space: SearchSpace) -> dict[str, Any]:
    """For JSON: the fields and the architecture."""
    import dataclasses

    from nas.space import arch_to_dict

    arch = arch_to_dict(space.decode(np.array(candidate.genes)))
    return {**dataclasses.asdict(candidate), "arch": arch}
