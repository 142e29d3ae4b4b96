"""NSGA-II (Deb et al., IEEE Trans. Evol. Computation 6(2), 2002) on (latency, cross-entropy).

The population survives by non-dominated rank and, within the last rank that fits, by crowding
distance; parents win binary tournaments in the same order; children are uniform crossovers with
each gene redrawn at a rate of 1/G. Populations are not stored: they are replayed from the history,
generation by generation, which takes milliseconds. Budgets are met by construction: a child outside
one, or evaluated before, is drawn again, and at least one gene of each child is redrawn.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from nas import pareto
from nas.search import GENERATION, Candidate, Problem, random_rows, topped_up
from nas.space import Genes

POPULATION = 2 * GENERATION
CROSSOVER = 0.9  # share of children of two parents
DRAWS = 64  # children drawn per place


def propose(problem: Problem, generation: int, history: Sequence[Candidate]) -> Genes:
    """GENERATION children of the population that the history leads to."""
    rng = np.random.default_rng((problem.seed, 11, generation))
    if len(history) < POPULATION:  # the first population
        return random_rows(problem, rng, history, GENERATION)[0]
    population = survivors(history)
    parents = np.array([c.genes for c in population])
    order = pareto.crowded_order(_points(population))  # best first: a place is a fitness
    place = np.empty(len(order), np.int64)
    place[order] = np.arange(len(order))
    a, b = (_tournament(parents, place, rng) for _ in range(2))
    crossed = rng.random(len(a)) < CROSSOVER
    children = np.where(crossed[:, None], problem.space.crossover(a, b, rng), a)
    children = problem.space.mutate(children, rng, rate=1 / children.shape[1])
    rows, _ = problem.fresh(children, history)
    return topped_up(problem, rng, history, rows[:GENERATION])


def survivors(history: Sequence[Candidate]) -> list[Candidate]:
    """The population after each generation's children competed with it, replayed."""
    population: list[Candidate] = []
    for start in range(0, len(history), GENERATION):
        population = [*population, *history[start : start + GENERATION]]
        kept = pareto.crowded_order(_points(population))[:POPULATION]
        population = [population[at] for at in sorted(kept)]
    return population


def _points(candidates: Sequence[Candidate]) -> NDArray[np.float64]:
    return np.array([(c.latency_ms, c.cross_entropy) for c in candidates])


def _tournament(parents: Genes, place: NDArray[np.int64], rng: np.random.Generator) -> Genes:
    """The better of two random parents, for every child drawn."""
    pairs = rng.integers(0, len(parents), (DRAWS * GENERATION, 2))
    better = np.argmin(place[pairs], axis=1)
    return parents[pairs[np.arange(len(pairs)), better]]
