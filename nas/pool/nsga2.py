"""NSGA-II (Deb et al. 2002) on two objectives: the answer and what a network costs.

Populations are replayed from the answers: after each generation the best of parents and children by
non-dominated rank and crowding live on. Children are uniform crossovers, mutated, and taken to the
nearest network of the pool that was not queried.
"""

from __future__ import annotations

import numpy as np

from nas import pareto
from nas.pool import Array, Pool, Search
from nas.pool.scales import nearest_unseen, quantiles, random_start

POPULATION = 10
COSTS = ("latency", "latency_ms", "macs", "flops", "params")  # the first that the pool has


def search(pool: Pool, budget: int, seed: int) -> Search:
    """A random generation, then generations of children. Without a cost there is one objective."""
    rng = np.random.default_rng((seed, 24))
    cost, encoding = _cost(pool), pool.encoding
    parents: list[int] = []  # positions in `seen`
    seen, answers = yield from random_start(pool, min(POPULATION, budget), rng)
    errors = [-answer for answer in answers]
    while len(seen) < budget:
        if len(seen) % POPULATION == 0:
            alive = np.array([*parents, *range(len(seen) - POPULATION, len(seen))])
            found = np.nan_to_num(np.array(errors)[alive], nan=np.finfo(np.float64).max)
            order = pareto.crowded_order(np.column_stack([found, cost[np.array(seen)[alive]]]))
            parents = alive[order[:POPULATION]].tolist()  # best first
        a, b = (parents[int(rng.integers(0, len(parents), 2).min())] for _ in range(2))
        from_a = rng.random(encoding.shape[1]) < 0.5
        child = np.where(from_a, encoding[seen[a]], encoding[seen[b]])
        flipped = rng.random(encoding.shape[1]) < 1 / max(encoding.shape[1], 1)
        row = nearest_unseen(encoding, np.where(flipped, 1 - child, child), seen, rng)
        seen.append(row)
        errors.append(-(yield row))


def _cost(pool: Pool) -> Array:
    for name in COSTS:
        if name in pool.names:
            values = pool.features[:, pool.names.index(name)]
            return quantiles(np.nan_to_num(values, nan=np.inf))
    return np.zeros(len(pool))
