"""Rank correlations and how sure they are: plain arrays in, plain numbers out.

Intervals are percentiles of bootstrap samples of the networks (Efron and Tibshirani 1993, chapter
13); a comparison of two proxies resamples both alike, so that what they share cancels.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
RESAMPLES = 1000
LEAST = 10  # networks: bootstraps of fewer are far too sure
TAIL = 2.5  # per cent on either side


@dataclass(frozen=True)
class Interval:
    """A value and its 95 % interval; all NaN where there are too few networks."""

    value: float
    low: float
    high: float


NOTHING = Interval(np.nan, np.nan, np.nan)


def spearman(a: Array, b: Array) -> Array:
    """Rank correlation of the rows of [..., N] with each other's; 0 where one of them is constant.

    Ties share their mean rank.
    """
    from scipy import stats

    x, y = (stats.rankdata(each, axis=-1) for each in (a, b))
    x, y = (each - each.mean(-1, keepdims=True) for each in (x, y))
    lengths = np.sqrt((x**2).sum(-1) * (y**2).sum(-1))
    return np.where(lengths > 0, (x * y).sum(-1) / np.maximum(lengths, 1e-300), 0.0)


def interval(a: Array, b: Array, seed: int = 0) -> Interval:
    """Of the rank correlation of a [N] and b [N], over the networks that have both."""
    both = np.isfinite(a) & np.isfinite(b)
    if both.sum() < LEAST:
        return NOTHING
    drawn = _draws(int(both.sum()), seed)
    found = spearman(a[both][drawn], b[both][drawn])
    return Interval(float(spearman(a[both], b[both])), *_ends(found))


def gain(a: Array, others: Array, truth: Array, seed: int = 0) -> Interval:
    """How much more a [N] correlates with the truth [N] than the best of `others` [K, N] does, on
    the networks that have all."""
    every = np.isfinite(a) & np.isfinite(truth) & np.isfinite(others).all(0)
    if every.sum() < LEAST:
        return NOTHING
    a, truth, others = a[every], truth[every], others[:, every]
    drawn = _draws(int(every.sum()), seed)
    rivals = np.max([spearman(each[drawn], truth[drawn]) for each in others], axis=0)
    value = spearman(a, truth) - max(float(spearman(each, truth)) for each in others)
    return Interval(float(value), *_ends(spearman(a[drawn], truth[drawn]) - rivals))


def _draws(n: int, seed: int) -> NDArray[np.int64]:
    return np.random.default_rng((seed, 19)).integers(0, n, (RESAMPLES, n))


def _ends(found: Array) -> tuple[float, float]:
    low, high = np.percentile(found, [TAIL, 100 - TAIL])
    return float(low), float(high)
