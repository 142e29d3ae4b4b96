"""RoBoT: a pool of networks inside the budgets, their cheap features, one evaluation at a time.

The pool is drawn from the space once (a function of the seed), its features are the problem's
training-free scores, if it has any, beside what is known anyway: MACs, parameters and latency. The
search over the pool is `nas.pool.robot`, whose next question depends on the answers alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import numpy as np

from nas.pool import Pool
from nas.pool.robot import Surrogate
from nas.search import Candidate, Problem, random_rows, row_keys
from nas.space import Genes

GENERATION = 1
POOL = 256  # networks whose features are computed: a score of one costs about a training step


def propose(problem: Problem, generation: int, history: Sequence[Candidate]) -> Genes:
    """The next row [1, G]: of the pool, or a random one when that is spent; none when nothing is
    left. Evaluated networks that the pool does not hold are passed over."""
    rows = drawn(problem)
    place = {int(key): row for row, key in enumerate(row_keys(rows))}
    known = np.array([c.genes for c in history], np.int64).reshape(-1, rows.shape[1])
    asked = [place.get(int(key)) for key in row_keys(known)]
    answers = {
        row: -c.cross_entropy for row, c in zip(asked, history, strict=True) if row is not None
    }
    if len(answers) == len(rows):
        rng = np.random.default_rng((problem.seed, 17, generation))
        return random_rows(problem, rng, history, 1)[0]
    return rows[[surrogate(problem).favourite(list(answers), list(answers.values()))]]


@lru_cache(maxsize=2)  # both are functions of the problem, and a search asks at every step
def drawn(problem: Problem) -> Genes:
    """The networks of the pool [N <= POOL, G], in the order that they were drawn in."""
    rows, _ = random_rows(problem, np.random.default_rng((problem.seed, 16)), [], POOL)
    return rows


@lru_cache(maxsize=2)
def surrogate(problem: Problem) -> Surrogate:
    return Surrogate(pool(problem, drawn(problem)), problem.seed)


def pool(problem: Problem, rows: Genes) -> Pool:
    """The pool of these networks [N, G]; ids are places in the drawing."""
    latency, _ = problem.latency(rows)
    macs, params = problem.space.costs(rows).T
    columns = {"latency": latency, "macs": macs, "params": params}
    if problem.features is not None and len(rows):
        columns |= problem.features(rows)
    features = np.column_stack(list(columns.values()))
    return Pool(features, tuple(columns), problem.space.encode(rows), np.arange(len(rows)))
