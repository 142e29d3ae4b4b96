"""Networks of a learned distribution for the search to judge: the likeliest first, then draws."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from nas.errors import NasctlError
from nas.mixture import Policies, draw
from nas.search import GENERATION, Candidate, Problem, topped_up
from nas.space import Genes

DRAWS = 4096  # rows among which new ones inside the budgets are looked for


def propose(problem: Problem, generation: int, history: Sequence[Candidate]) -> Genes:
    """Up to GENERATION rows inside every budget: as FBNet, which trains several draws; a
    distribution that has settled outside the budgets or on few networks leaves the rest to chance.

    Raises NasctlError if nothing was learned.
    """
    if problem.policy is None:
        raise NasctlError("no distribution was learned", where="--strategy")
    rng = np.random.default_rng((problem.seed, 54, generation))
    policies = Policies(problem.policy[None])
    rows = np.concatenate([policies.likeliest(), draw(policies, rng, DRAWS)])
    inside, _ = problem.fresh(problem.space.canonical(rows), history)
    return topped_up(problem, rng, history, inside[:GENERATION])
