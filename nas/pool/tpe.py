"""Tree-structured Parzen estimator (Bergstra et al., NeurIPS 2011) on the encoding.

The good quarter of what was seen and the rest give one categorical density each; of candidates
drawn from the good one, the one with the largest ratio is queried. Own code, because Optuna's
sampler proposes from the whole product of genes, of which a pool holds a part.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from nas.pool import Array, Pool, Search
from nas.pool.scales import graded, random_start

STARTUP = 10
CANDIDATES = 24
GOOD = 0.25


def search(pool: Pool, budget: int, seed: int) -> Search:
    """Random at first; densities are products over the encoding's columns with a prior of one."""
    rng = np.random.default_rng((seed, 23))
    encoding = pool.encoding.astype(np.float64)
    seen, answers = yield from random_start(pool, min(STARTUP, budget), rng)
    while len(seen) < budget:
        order = np.argsort(-graded(np.array(answers)), kind="stable")
        split = int(np.ceil(GOOD * len(seen)))
        known = np.array(seen)[order]
        good, rest = (_log_density(encoding, part) for part in np.split(known, [split]))
        free = np.setdiff1d(np.arange(len(pool)), seen)
        chance = np.exp(good[free] - good[free].max())
        drawn = rng.choice(free, min(CANDIDATES, len(free)), replace=True, p=chance / chance.sum())
        row = int(drawn[np.argmax((good - rest)[drawn])])
        seen.append(row)
        answers.append((yield row))


def _log_density(encoding: Array, members: NDArray[np.int64]) -> Array:
    """[N], up to a constant: each column's frequency among the members and one network more that is
    the pool's mean."""
    share = (encoding[members].sum(0) + encoding.mean(0)) / (len(members) + 1)
    return encoding @ np.log(np.maximum(share, 1e-9))
