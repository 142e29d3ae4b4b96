"""Gaussian-process Bayesian optimisation on the architecture's encoding, without any metric."""

from __future__ import annotations

import numpy as np
from scipy import stats

from nas.pool import Pool, Search
from nas.pool.scales import best_unseen, graded, random_start
from nas.predictors import gp

STARTUP = 5


def search(pool: Pool, budget: int, seed: int) -> Search:
    """Random at first, then the largest expected improvement under `nas.predictors.gp`."""
    rng = np.random.default_rng((seed, 25))
    seen, answers = yield from random_start(pool, min(STARTUP, budget), rng)
    while len(seen) < budget:
        target = graded(np.array(answers))
        mean, std = gp.fit(pool.encoding[seen], target)(pool.encoding)
        std = np.maximum(std, 1e-9)
        z = (mean - target.max()) / std
        row = best_unseen(std * (z * stats.norm.cdf(z) + stats.norm.pdf(z)), seen)
        seen.append(row)
        answers.append((yield row))
