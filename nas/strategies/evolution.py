"""Regularised evolution (Real et al., AAAI 2019) under hard budgets, with a Pareto archive.

Only the youngest POPULATION networks are alive: age, not loss, decides who dies. A parent wins a
tournament among TOURNAMENT of them by cross-entropy, its child is a mutant. That follows one
objective and would leave the fast end of the front empty, so every second parent is drawn from the
archive of non-dominated networks instead, as AttentiveNAS does (arXiv 2011.09011); evidence in
docs/methods/strategies.md.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from nas import search
from nas.search import GENERATION, Candidate, Problem, random_rows, topped_up
from nas.space import Genes

POPULATION = 64
TOURNAMENT = 16
FIRST = 2 * GENERATION  # random networks before anything evolves
DRAWS = 16 * GENERATION  # mutants drawn for a generation


def propose(problem: Problem, generation: int, history: Sequence[Candidate]) -> Genes:
    """GENERATION mutants of parents that are alive or on the front."""
    rng = np.random.default_rng((problem.seed, 14, generation))
    if len(history) < FIRST:
        return random_rows(problem, rng, history, GENERATION)[0]
    parents = np.where(np.arange(DRAWS)[:, None] % 2, winners(history, rng), members(history, rng))
    mutants = problem.space.mutate(parents, rng, rate=1 / parents.shape[1])
    rows, _ = problem.fresh(mutants, history)
    return topped_up(problem, rng, history, rows[:GENERATION])


def winners(history: Sequence[Candidate], rng: np.random.Generator) -> Genes:
    """The best of a random TOURNAMENT of those alive, DRAWS times [DRAWS, G]."""
    alive = history[-POPULATION:]
    loss = np.array([c.cross_entropy for c in alive])
    drawn = rng.integers(0, len(alive), (DRAWS, TOURNAMENT))
    best = drawn[np.arange(DRAWS), loss[drawn].argmin(axis=1)]
    return np.array([c.genes for c in alive])[best]


def members(history: Sequence[Candidate], rng: np.random.Generator) -> Genes:
    """Random non-dominated networks of all that were ever evaluated [DRAWS, G]."""
    front = np.array([c.genes for c in search.front(history)])
    return front[rng.integers(0, len(front), DRAWS)]
