"""BigNAS's coarse-to-fine selection (arXiv 2003.11142, section 3.3).

Coarse: a grid of presets (input resolution, depth, width, kernel size, ... each the same share of
its range in the whole network) is evaluated once. Fine: for a budget, the best grid network inside
it is the skeleton; mutants of the skeleton inside the budget are evaluated, and the best so far is
the next skeleton. No network is evaluated twice.

The paper does that for a list of budgets with one grid, and so does this: a ladder of latencies up
to the budget (or, without one, up to the slowest network of the front), so that the whole front is
served and not its last point alone.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np

from nas import pareto
from nas.search import GENERATION, Candidate, Problem, topped_up
from nas.space import Genes

GRID = 64  # presets evaluated at most
RUNGS = 4  # budgets of the ladder: a quarter of a generation refines each
DRAWS = 512  # mutants drawn per skeleton
#: genes that a space has once and that are widths too: the paper scales all widths together
WIDTHS = {"stem": "width", "last": "width"}


def propose(problem: Problem, generation: int, history: Sequence[Candidate]) -> Genes:
    """What is left of the grid, then mutants of the skeletons."""
    rng = np.random.default_rng((problem.seed, 12, generation))
    presets = grid(problem)
    rows, _ = problem.fresh(presets[rng.permutation(len(presets))], history)
    if history and len(rows) < GENERATION:
        rows, _ = problem.fresh(np.concatenate([rows, _mutants(problem, rng, history)]), history)
    return topped_up(problem, rng, history, rows[:GENERATION])


def grid(problem: Problem) -> Genes:
    """The presets [N <= GRID, G]: every combination of one level per kind of gene.

    A kind is the last part of a gene's name; a level is a share of the range of its options. A kind
    has as many levels as options, fewer where the combinations would be too many.
    """
    space = problem.space
    kinds = [WIDTHS.get(kind := gene.name.rpartition(".")[2], kind) for gene in space.genes]
    names = sorted(set(kinds))
    of = np.array([names.index(kind) for kind in kinds])  # kind of each gene [G]
    levels = [int(space.sizes[of == at].max()) for at in range(len(names))]
    while np.prod(levels) > GRID:
        levels[int(np.argmax(levels))] -= 1
    shares = np.array(list(itertools.product(*(np.linspace(0, 1, n) for n in levels))))
    return space.canonical(np.rint(shares[:, of] * (space.sizes - 1)).astype(np.int64))


def _mutants(problem: Problem, rng: np.random.Generator, history: Sequence[Candidate]) -> Genes:
    """For each rung, new mutants of the best network on or below it that stay on or below it."""
    points = np.array([(c.latency_ms, c.cross_entropy) for c in history])
    front = points[pareto.front(points), 0]
    ladder = np.geomspace(front[0], front[-1], RUNGS + 1)[1:]
    ladder[-1] = problem.budget_ms or front[-1]
    found = []
    for most in ladder:
        below = [c for c in history if c.latency_ms <= most]
        skeleton = min(below, key=lambda c: (c.cross_entropy, c.latency_ms))
        mutants = problem.space.mutate(np.array([skeleton.genes] * DRAWS), rng)
        rows, latency = problem.fresh(mutants, history)
        found.append(rows[latency <= most][: GENERATION // RUNGS])
    return np.concatenate(found)
