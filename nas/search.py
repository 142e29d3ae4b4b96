"""Search by generations: latency first, then predicted accuracy, then the supernet's own verdict.

The inner loop (`propose`) scores tens of thousands of candidates on arrays: latency by gathers,
cross-entropy by a predictor fitted on what was evaluated so far. The outer loop (`search`)
evaluates a generation of them and tells an Optuna study, which is the only state: what a
generation proposes depends on (seed, generation, results of earlier generations) alone, so a
search that was killed goes on to the same result.

Imports without torch: evaluation is a callable.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from nas import pareto
from nas.errors import NasctlError
from nas.predictors import ridge
from nas.space import Genes, SearchSpace

if TYPE_CHECKING:
    import optuna

Array = NDArray[np.float64]
GENERATION = 16
POOL = 20_000


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
class Problem:
    """What is searched: a space, a vectorised latency and a validation score.

    `latency(genes[N, G]) -> (value_ms[N], high_ms[N])`; `evaluate(genes[G]) -> (ce, accuracy)`.
    A network is inside the budget when `high_ms` is.
    """

    space: SearchSpace
    latency: Callable[[Genes], tuple[Array, Array]]
    evaluate: Callable[[Genes], tuple[float, float]]
    budget_ms: float | None = None
    seed: int = 0


def fastest(problem: Problem) -> tuple[Genes, float, float]:
    """The fastest network found (genes, latency, upper end): random rows, then one-gene descent."""
    space, rng = problem.space, np.random.default_rng((problem.seed, 4))
    pool = np.concatenate([space.smallest[None], space.sample(rng, POOL)])
    best = pool[np.argmin(problem.latency(pool)[1])]
    while True:
        near = np.repeat(best[None], int(space.sizes.sum()), axis=0)
        near[np.arange(len(near)), np.repeat(np.arange(len(best)), space.sizes)] = np.concatenate(
            [np.arange(size) for size in space.sizes]
        )
        near = space.canonical(near)
        value, high = problem.latency(near)
        at = int(np.argmin(high))
        now = problem.latency(best[None])
        if high[at] >= now[1][0]:
            return best, float(now[0][0]), float(now[1][0])
        best = near[at]


def propose(problem: Problem, generation: int, history: Sequence[Candidate]) -> Genes:
    """The rows to evaluate next, up to GENERATION of them [n, G], none of them in `history`."""
    space, rng = problem.space, np.random.default_rng((problem.seed, 3, generation))
    pool = _pool(space, rng, history)
    if generation == 0 and problem.budget_ms is not None:
        # perhaps the only one that fits
        pool = np.unique(np.concatenate([pool, fastest(problem)[0][None]]), axis=0)
    value, high = problem.latency(pool)
    if problem.budget_ms is not None:
        inside = high <= problem.budget_ms
        pool, value = pool[inside], value[inside]
    if len(pool) == 0:
        return pool
    if generation == 0 or len(history) < GENERATION:
        promise = rng.random(len(pool))
    else:
        features = space.encode(np.array([c.genes for c in history]))
        predict = ridge.fit(features, np.array([c.cross_entropy for c in history]))
        mean, std = predict(space.encode(pool))
        promise = mean - std
    return pool[_spread(value, promise, best=generation > 0)]


def _pool(space: SearchSpace, rng: np.random.Generator, history: Sequence[Candidate]) -> Genes:
    """New candidates: the ends of the space, random rows and relatives of the front."""
    parts = [space.smallest[None], space.largest[None], space.sample(rng, POOL)]
    if history:
        every = np.array([c.genes for c in history])
        at = pareto.front(np.array([(c.latency_ms, c.cross_entropy) for c in history]))
        a, b = (every[rng.choice(at, POOL // 2)] for _ in range(2))
        parts += [space.mutate(a, rng), space.crossover(a, b, rng)]
    pool = np.concatenate(parts)
    keys, first = np.unique(_keys(pool), return_index=True)
    if history:
        first = first[~np.isin(keys, _keys(every))]
    return pool[first]


def _keys(genes: Genes) -> NDArray[np.uint64]:
    """One number per row, for finding duplicates: sorting rows takes ten times as long.

    A random linear hash modulo 2^64; a collision (one in 10^10 pools) would only hide a candidate.
    """
    weights = np.random.default_rng(0).integers(1, 2**63, genes.shape[1], dtype=np.uint64)
    return genes.astype(np.uint64) @ (2 * weights + 1)


def _spread(latency: Array, promise: Array, *, best: bool) -> NDArray[np.int64]:
    """Indices of up to GENERATION rows: the most promising of each latency band, so that the whole
    front is served, and (if `best`) in half of the places the most promising of all."""
    bands = GENERATION // 2 if best else GENERATION
    order = np.argsort(promise)
    edges = np.geomspace(latency.min(), latency.max() * 1.0001, bands + 1)
    band = np.clip(np.searchsorted(edges, latency[order], side="right") - 1, 0, bands - 1)
    _, first = np.unique(band, return_index=True)
    chosen = order[first]
    rest = order[~np.isin(order, chosen)][: GENERATION - len(chosen)]
    return np.concatenate([chosen, rest])


def search(problem: Problem, study: optuna.Study, evaluations: int) -> Iterator[Candidate]:
    """Evaluate up to `evaluations` networks, yielding each (those already in the study first).

    Several processes may share a study: each takes the next free slot. Ends early when the space
    (within the budget) has no network left that was not evaluated.
    """
    from nas import study as studies

    known = studies.candidates(study)
    yield from known
    proposals: tuple[int, Genes] = (-1, np.zeros((0, 0), np.int64))
    while (slot := studies.next_slot(study)) < evaluations:
        generation, place = divmod(slot, GENERATION)
        if proposals[0] != generation:
            before = [c for c in studies.candidates(study) if c.slot < generation * GENERATION]
            proposals = generation, propose(problem, generation, before)
        if place >= len(proposals[1]):
            return
        candidate = _evaluate(problem, study, slot, proposals[1][place])
        if candidate is not None:
            yield candidate


def _evaluate(problem: Problem, study: optuna.Study, slot: int, genes: Genes) -> Candidate | None:
    from nas import study as studies

    trial = studies.ask(study, problem.space, slot, genes)
    if trial is None:
        return None
    value, high = problem.latency(genes[None])
    cross_entropy, accuracy = problem.evaluate(genes)
    if not math.isfinite(cross_entropy):
        raise NasctlError(
            f"the validation loss of network {slot} is {cross_entropy}",
            where=str(problem.space.decode(genes)),
            next="The supernet has diverged: train it again with a smaller --lr.",
        )
    candidate = Candidate(
        slot,
        tuple(genes.tolist()),
        float(value[0]),
        float(high[0]),
        cross_entropy,
        accuracy,
    )
    studies.tell(study, trial, candidate)
    return candidate


def front(candidates: Sequence[Candidate]) -> list[Candidate]:
    """The non-dominated ones in (latency, validation cross-entropy), fastest first."""
    points = np.array([(c.latency_ms, c.cross_entropy) for c in candidates]).reshape(-1, 2)
    return [candidates[i] for i in pareto.front(points)]


def ranked(candidates: Sequence[Candidate], budget_ms: float | None) -> list[Candidate]:
    """Best first: by cross-entropy among those inside the budget; without one, the front's knee
    and then the rest of the front."""
    if budget_ms is None:
        along = front(candidates)
        points = np.array([(c.latency_ms, c.cross_entropy) for c in along])
        first = along[pareto.knee(points)]
        return [first, *(c for c in along if c is not first)]
    inside = [c for c in candidates if c.high_ms <= budget_ms]
    return sorted(inside, key=lambda c: (c.cross_entropy, c.latency_ms))


def as_dict(candidate: Candidate, space: SearchSpace) -> dict[str, Any]:
    """For JSON: the fields and the architecture."""
    import dataclasses

    from nas.space import arch_to_dict

    arch = arch_to_dict(space.decode(np.array(candidate.genes)))
    return {**dataclasses.asdict(candidate), "arch": arch}
