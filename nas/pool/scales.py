"""Features on a common scale, and what is the same for many methods: beginnings, orders and
neighbours."""

from __future__ import annotations

from collections.abc import Generator

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from nas.pool import Array, Pool

Rows = NDArray[np.int64]


def finite(features: Array) -> Array:
    """[N, k]: infinite entries are missing (NaN); columns that do not tell two networks apart
    (constant, or fewer than two values) are dropped."""
    table = np.where(np.isfinite(features), features, np.nan)
    low, high = np.fmin.reduce(table, axis=0), np.fmax.reduce(table, axis=0)
    return table[:, low < high]


def min_max(features: Array) -> Array:
    """Each usable column over [0, 1], missing entries NaN."""
    table = finite(features)
    low, high = np.nanmin(table, axis=0), np.nanmax(table, axis=0)
    scaled: Array = (table - low) / (high - low)
    return scaled


def normal_scores(features: Array) -> Array:
    """Each usable column's ranks as quantiles of N(0, 1); ties share a rank, missing entries are 0.

    Of a feature nothing is left but its order, so outliers and units mean nothing.
    """
    table = finite(features)
    scores = np.zeros(table.shape)
    for column, out in zip(table.T, scores.T, strict=True):
        known = np.isfinite(column)
        out[known] = quantiles(column[known])
    return scores


def quantiles(values: Array) -> Array:
    """Normal scores [n] of values [n] without NaN."""
    scores: Array = stats.norm.ppf((stats.rankdata(values) - 0.5) / len(values))
    return scores


def graded(values: Array) -> Array:
    """What a surrogate learns [n]: normal scores of answers [n], a failure as bad as the worst."""
    alive = np.isfinite(values)
    worst = values[alive].min() if alive.any() else 0.0
    return quantiles(np.where(alive, values, worst))


def descending(score: Array) -> Rows:
    """Rows by falling score, the lower row first of equals."""
    return np.argsort(-score, kind="stable")


def best_unseen(score: Array, seen: Rows | list[int]) -> int:
    """The row of the highest score that is not in `seen`, the lowest of equals."""
    left = score.astype(np.float64)
    left[seen] = -np.inf
    left[np.isnan(left)] = -np.finfo(np.float64).max
    return int(np.argmax(left))


def random_start(
    pool: Pool, n: int, rng: np.random.Generator
) -> Generator[int, float, tuple[list[int], list[float]]]:
    """Ask about `n` random rows; returns them and the answers."""
    seen: list[int] = []
    answers: list[float] = []
    for row in rng.permutation(len(pool))[:n]:
        seen.append(int(row))
        answers.append((yield int(row)))
    return seen, answers


def nearest_unseen(
    encoding: NDArray[np.float32],
    target: NDArray[np.float32],
    seen: list[int],
    rng: np.random.Generator,
) -> int:
    """A row that is not in `seen` and whose architecture is nearest to `target` [F], at random
    among equals: in a pool that holds a whole space, a neighbour by one gene."""
    distance = ((encoding - target) ** 2).sum(axis=1)
    distance[seen] = np.inf
    return int(rng.choice(np.flatnonzero(distance <= distance.min() + 1e-6)))
