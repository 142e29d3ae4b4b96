"""Random search: uniform over what the budgets leave. What every other strategy must beat."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from nas.search import GENERATION, Candidate, Problem, random_rows
from nas.space import Genes


def propose(problem: Problem, generation: int, history: Sequence[Candidate]) -> Genes:
    """GENERATION rows that nobody evaluated, fewer only where no more are found."""
    rng = np.random.default_rng((problem.seed, 10, generation))
    return random_rows(problem, rng, history, GENERATION)[0]
