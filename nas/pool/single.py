"""One feature alone: its ranking walked from the top. "Parameters alone" is `by("params")`."""

from __future__ import annotations

import numpy as np

from nas.errors import unknown
from nas.pool import Method, Pool, Search
from nas.pool.scales import descending


def by(name: str) -> Method:
    """The walk down feature `name`; networks without a value come last."""

    def search(pool: Pool, budget: int, seed: int) -> Search:
        if name not in pool.names:
            raise unknown("feature", name, pool.names, where="pool")
        score = pool.features[:, pool.names.index(name)]
        for row in descending(np.where(np.isfinite(score), score, -np.inf))[:budget]:
            yield int(row)

    return search
