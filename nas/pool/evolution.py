"""Regularised evolution (Real et al., AAAI 2019): a tournament's winner is mutated, the oldest
dies.

In a pool a mutant is a network nobody queried at the smallest distance from its parent; where the
pool holds the whole space that is one gene away, as published. (What RoBoT's repository calls REA
always mutates and removes the best: another method.)
"""

from __future__ import annotations

import numpy as np

from nas.pool import Pool, Search
from nas.pool.scales import nearest_unseen, random_start

POPULATION = 10
TOURNAMENT = 5


def search(pool: Pool, budget: int, seed: int) -> Search:
    """A random population, then one mutant at a time; a failed network loses every tournament."""
    rng = np.random.default_rng((seed, 21))
    seen, answers = yield from random_start(pool, min(POPULATION, budget), rng)
    while len(seen) < budget:
        rivals = len(seen) - 1 - rng.permutation(min(POPULATION, len(seen)))[:TOURNAMENT]
        fitness = np.nan_to_num(np.array(answers)[rivals], nan=-np.inf)
        parent = seen[int(rivals[np.argmax(fitness)])]
        row = nearest_unseen(pool.encoding, pool.encoding[parent], seen, rng)
        seen.append(row)
        answers.append((yield row))
