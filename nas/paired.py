"""Intervals on what a change to a network did to a metric, resampling images in pairs.

Both networks judge the same resampled images, so what is hard about them cancels. It works on a
goal's evidence, so also for metrics that are no means over images (mIoU, mean average precision).
Percentile bootstrap (Efron and Tibshirani, An Introduction to the Bootstrap, chapter 13): the
spread over test images; several seeds are averaged within each draw. With `trainings` seeds are
drawn too, in pairs. Of three seeds that is still too narrow: two thirds of their variance.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from nas.goals import Goal

NOTHING = 1e-12  # of a metric
LEVEL = 0.95  # of the interval
DRAWS = 2000


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
    block: int = 1,
    trainings: bool = False,
) -> Change:
    """From the evidence [N, ...] of the same N images, one tensor per seed on either side.

    Images are drawn in blocks of so many neighbours: frames of a video are no independent images.
    """
    n, pairs = len(before[0]), len(before)
    assert all(len(seen) == n for seen in (*before, *after)), "evidence of other images"
    assert not trainings or len(after) == pairs, "seeds without a partner"

    def relative(rows: Tensor, old: Sequence[Tensor], new: Sequence[Tensor]) -> float:
        was, became = (sum(goal.score(s[rows]) for s in seeds) / len(seeds) for seeds in (old, new))
        return (became - was) / max(was, NOTHING)  # images drawn may be all failures

    def draw() -> float:
        rows = _in_blocks(n, block, rng)
        if not trainings:
            return relative(rows, before, after)
        seeds = rng.integers(pairs, size=pairs)
        return relative(rows, [before[at] for at in seeds], [after[at] for at in seeds])

    low, high = np.quantile([draw() for _ in range(DRAWS)], [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return Change(relative(torch.arange(n), before, after), float(low), float(high))


def _in_blocks(n: int, block: int, rng: np.random.Generator) -> Tensor:
    """About `n` rows, with replacement, in runs of `block`."""
    blocks = -(-n // block)
    first = block * rng.integers(blocks, size=(blocks, 1))
    rows = (first + np.arange(block)).ravel()
    return torch.from_numpy(rows[rows < n])
