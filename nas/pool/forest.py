"""Random forest on graph features and proxies (GRAF, Kadlecova et al., ICML 2024), used for search:
the forest is fitted to everything seen and its favourite is queried."""

from __future__ import annotations

import numpy as np

from nas.pool import Pool, Search
from nas.pool.scales import best_unseen, graded, normal_scores

STARTUP = 5
TREES = 50
BATCH = 5  # queries between two fits, each by the last fit's ranking


def search(pool: Pool, budget: int, seed: int) -> Search:
    """Random at first. Where a pool has no graph features its encoding takes their place."""
    from sklearn.ensemble import RandomForestRegressor  # a second to import

    rng = np.random.default_rng((seed, 27))
    shape = pool.graph if pool.graph.shape[1] else pool.encoding
    inputs = np.concatenate([normal_scores(pool.features), shape], axis=1).astype(np.float32)
    seen: list[int] = []
    answers: list[float] = []
    score = rng.random(len(pool))
    for step in range(budget):
        if step >= STARTUP and (step - STARTUP) % BATCH == 0 and inputs.shape[1]:
            forest = RandomForestRegressor(
                n_estimators=TREES, max_features=1 / 3, random_state=int(rng.integers(2**31))
            )
            score = forest.fit(inputs[seen], graded(np.array(answers))).predict(inputs)
        row = best_unseen(score, seen)
        seen.append(row)
        answers.append((yield row))
