"""Random search without replacement: what every other method must beat."""

from __future__ import annotations

import numpy as np

from nas.pool import Pool, Search


def search(pool: Pool, budget: int, seed: int) -> Search:
    """`budget` rows in a random order."""
    for row in np.random.default_rng((seed, 20)).permutation(len(pool))[:budget]:
        yield int(row)
