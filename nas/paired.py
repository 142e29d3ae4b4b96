"""Intervals on what a change to a network did to a metric, resampling images in pairs.

Both networks judge the same resampled images, so what is hard about them cancels. It works on a
goal's evidence, so also for metrics that are no means over images (mIoU, mean average precision).
Percentile bootstrap (Efron and Tibshirani, An Introduction to the Bootstrap, chapter 13): the
spread over test images, not over trainings; several seeds are averaged within each draw.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from nas.goals import Goal

NOTHING = 1e-12  # of a metric


@dataclass(frozen=True)
class Change:
    """Of a metric, relative to what it was: -0.01 is 1 % less. `low` to `high` is its interval."""

    value: float
    low: float
    high: float


def change(
    goal: Goal,
    before: Sequence[Tensor],
    after: Sequence[Tensor],
    *,
    rng: np.random.Generator,
    draws: int = 2000,
    level: float = 0.95,
) -> Change:
    """From the evidence [N, ...] of the same N images, one tensor per seed on either side."""
    n = len(before[0])
    assert all(len(seen) == n for seen in (*before, *after)), "evidence of other images"

    def relative(rows: Tensor) -> float:
        old, new = (
            sum(goal.score(seen[rows]) for seen in seeds) / len(seeds) for seeds in (before, after)
        )
        return (new - old) / max(old, NOTHING)  # images drawn may be all failures

    drawn = [relative(torch.from_numpy(rng.integers(n, size=n))) for _ in range(draws)]
    low, high = np.quantile(drawn, [(1 - level) / 2, (1 + level) / 2])
    return Change(relative(torch.arange(n)), float(low), float(high))
