"""Evolution under hard budgets with a Pareto archive, as AttentiveNAS and AlphaNet search.

(arXiv 2011.09011 and 2102.07954: the archive keeps the best network of each band of cost; a round
mutates and crosses random members of it.) Ours: bands are of latency, on a logarithmic scale.

Regularised evolution (Real et al., AAAI 2019), where the oldest die and a tournament's winner is
mutated, was tried in its place. It found better single networks and, where accuracy grows with
size, fronts no better than random search's: it follows one objective (docs/methods/strategies.md).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from nas.search import GENERATION, Candidate, Problem, random_rows, topped_up
from nas.space import Genes

BANDS = 16
DRAWS = 16 * GENERATION  # mutants drawn, and as many crossovers
RATE = 0.2  # of mutation per gene, as published


def propose(problem: Problem, generation: int, history: Sequence[Candidate]) -> Genes:
    """Half mutants, half crossovers of the archive's members; at first random networks."""
    rng = np.random.default_rng((problem.seed, 14, generation))
    if generation < 2:
        return random_rows(problem, rng, history, GENERATION)[0]
    members = np.array([c.genes for c in archive(history)])
    a, b = members[rng.integers(0, len(members), (2, DRAWS))]
    mutants, _ = problem.fresh(problem.space.mutate(a, rng, RATE), history)
    crossed, _ = problem.fresh(problem.space.crossover(a, b, rng), history)
    half = GENERATION // 2
    rows = np.concatenate([crossed[:half], mutants])
    return topped_up(problem, rng, history, problem.fresh(rows, history)[0][:GENERATION])


def archive(history: Sequence[Candidate]) -> list[Candidate]:
    """The best network of each latency band that has one, fastest band first."""
    latency = np.array([c.latency_ms for c in history])
    edges = np.geomspace(latency.min(), latency.max(), BANDS + 1)[1:-1]
    best: dict[int, Candidate] = {}
    for band, candidate in zip(np.searchsorted(edges, latency), history, strict=True):
        rival = best.get(int(band))
        if rival is None or candidate.cross_entropy < rival.cross_entropy:
            best[int(band)] = candidate
    return [best[band] for band in sorted(best)]
