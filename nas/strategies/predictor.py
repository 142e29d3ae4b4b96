"""Predict, then evaluate: the default. Bayesian optimisation by generations.

The first generation covers the latency range. For each later one an accuracy ensemble is fitted on
everything evaluated so far, tens of thousands of candidates (random ones and relatives of the
front) are scored on arrays, and the most promising of each latency band and of all are proposed.
A predictor that does no better on held-out evaluations than MACs and parameters is refused, and the
generation is chosen at random among the same candidates, band by band.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from nas import pareto
from nas.predictors import ensemble, held_out
from nas.search import GENERATION, POOL, Array, Candidate, Problem, random_rows
from nas.space import Genes


def propose(problem: Problem, generation: int, history: Sequence[Candidate]) -> Genes:
    """The most promising rows that nobody evaluated."""
    rng = np.random.default_rng((problem.seed, 3, generation))
    pool, latency = _pool(problem, rng, history)
    if len(pool) == 0:
        return pool
    promise = _promise(problem, pool, history)
    if promise is None:
        promise = rng.random(len(pool))
    return pool[_spread(latency, promise, best=generation > 0)]


def _pool(
    problem: Problem, rng: np.random.Generator, history: Sequence[Candidate]
) -> tuple[Genes, Array]:
    """New candidates and their latencies: random ones, the ends of the space, relatives of the
    front."""
    space = problem.space
    rows, latency = random_rows(problem, rng, history, POOL)
    relatives = [space.smallest[None], space.largest[None]]
    if history:
        every = np.array([c.genes for c in history])
        at = pareto.front(np.array([(c.latency_ms, c.cross_entropy) for c in history]))
        a, b = (every[rng.choice(at, POOL // 2)] for _ in range(2))
        relatives += [space.mutate(a, rng), space.crossover(a, b, rng)]
    return problem.fresh(np.concatenate([rows, *relatives]), history)


def _promise(problem: Problem, pool: Genes, history: Sequence[Candidate]) -> Array | None:
    """Optimistic cross-entropy of each candidate, or None if the predictor is refused."""
    verdict = held_out.judge(problem.space, history, problem.seed)
    if verdict is None or not verdict.accepted:
        return None
    features = problem.space.encode(np.array([c.genes for c in history]))
    predict = ensemble.fit(features, np.array([c.cross_entropy for c in history]))
    mean, std = predict(problem.space.encode(pool))
    return mean - std


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
