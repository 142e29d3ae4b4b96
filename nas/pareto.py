"""Dominance on plain arrays. Every objective is minimised; knows nothing of architectures."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Points = NDArray[np.float64]  # [N, 2]


def front(points: Points) -> NDArray[np.int64]:
    """Indices of the non-dominated points, by rising first objective.

    Of equal points the first is kept. O(N log N): after sorting by (first, second) a point is on
    the front when its second objective is below every earlier one.
    """
    if len(points) == 0:
        return np.zeros(0, np.int64)
    order = np.lexsort((points[:, 1], points[:, 0]))
    second = points[order, 1]
    best_before = np.concatenate([[np.inf], np.minimum.accumulate(second)[:-1]])
    return order[second < best_before]


def knee(points: Points) -> int:
    """Index of the front point farthest below the line between the front's ends.

    The first objective is taken as a logarithm (a millisecond saved matters relative to what is
    left), both are scaled to [0, 1]; with fewer than three front points, the last one (the best).
    """
    at = front(points)
    if len(at) < 3:
        return int(at[-1])
    x = np.log(np.maximum(points[at, 0], 1e-12))
    y = points[at, 1]
    x = (x - x[0]) / (x[-1] - x[0] or 1.0)
    y = (y - y[-1]) / (y[0] - y[-1] or 1.0)
    return int(at[np.argmin(x + y)])


def hypervolume(points: Points, reference: tuple[float, float]) -> float:
    """Area dominated by the points and bounded by `reference`."""
    inside = points[(points < np.array(reference)).all(axis=1)]
    at = front(inside)
    if len(at) == 0:
        return 0.0
    x, y = inside[at, 0], inside[at, 1]
    right = np.concatenate([x[1:], [reference[0]]])
    return float(((right - x) * (reference[1] - y)).sum())


def ranks(points: Points) -> NDArray[np.int64]:
    """Non-dominated rank of each point [N]: 0 for those that nobody dominates, 1 for those that
    only rank 0 dominates, and so on. Equal points share a rank. O(N^2) memory."""
    no_worse = (points[:, None] <= points[None]).all(axis=2)  # [i, j]: i is no worse than j
    dominates = no_worse & ~no_worse.T
    rank = np.full(len(points), -1, np.int64)
    left = np.ones(len(points), bool)
    for level in range(len(points)):
        if not left.any():
            break
        best = left & ~dominates[left].any(axis=0)
        rank[best] = level
        left &= ~best
    return rank


def crowding(points: Points) -> NDArray[np.float64]:
    """Crowding distance of each point among the given [N]: the sum over objectives of the gap
    between its neighbours, as a share of the range; infinite at the ends (Deb et al. 2002)."""
    distance = np.zeros(len(points))
    for values in points.T:
        order = np.argsort(values, kind="stable")
        span = values[order[-1]] - values[order[0]] or 1.0
        distance[order[1:-1]] += (values[order[2:]] - values[order[:-2]]) / span
        distance[order[[0, -1]]] = np.inf
    return distance


def crowded_order(points: Points) -> NDArray[np.int64]:
    """Indices of all points, best first: by rank, within a rank the least crowded first."""
    rank = ranks(points)
    distance = np.zeros(len(points))
    for level in np.unique(rank):
        same = rank == level
        distance[same] = crowding(points[same])
    return np.lexsort((-distance, rank))
