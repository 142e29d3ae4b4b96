"""RoBoT's purpose by another way: a surrogate over networks whose inputs are their metrics.

The published method (`robot_paper`) learns one weight per metric from which network each weighting
ranks first. Here a Gaussian process predicts a network's worth from its metrics and its
architecture, so that every answer counts for every network and a metric may mislead, saturate or
interact. What few answers cannot teach is assumed: until shown otherwise, the networks that the
metrics agree on are better (the prior mean). The first queries are networks that are all among the
best by that agreement and as different by their metrics as such networks can be.
"""

from __future__ import annotations

import numpy as np

from nas.pool import Array, Pool, Search
from nas.pool.scales import best_unseen, descending, graded, normal_scores

# Chosen by the protocol of docs/methods/robot.md, and frozen.
START = 5  # queries before the surrogate is asked
AGREED = 0.05  # of the pool is what they are chosen from
AGREEMENT = 0.5  # prior slope: deviations of worth per unit of consensus
NOISE = 0.4  # variance, as a share of the kernel's
KAPPA = 1.0  # deviations of the upper confidence bound


def search(pool: Pool, budget: int, seed: int) -> Search:
    """No randomness where the pool has features: the same for every seed."""
    surrogate = Surrogate(pool, seed)
    seen: list[int] = []
    answers: list[float] = []
    for _ in range(budget):
        row = surrogate.favourite(seen, answers)
        seen.append(row)
        answers.append((yield row))


class Surrogate:
    """What is believed of a pool's networks.

    worth = constant + AGREEMENT * consensus + process; the process's kernel is the mean of three:
    linear in the metrics' normal scores, and exponentials of the squared distance of those scores
    and of the encodings. Distances are per dimension, so that no pool needs a length scale.
    """

    def __init__(self, pool: Pool, seed: int) -> None:
        self.scores = normal_scores(pool.features)  # [N, m]
        n, m = self.scores.shape
        self.dimensions = max(m, 1)
        self.consensus: Array = self.scores.sum(axis=1) / self.dimensions
        # without features nobody is a favourite: then the first are random
        self.first: Array = (
            self.consensus if m else np.random.default_rng((seed, 29)).random(len(pool))
        )
        self.encoding = pool.encoding.astype(np.float64)
        # twice the mean squared norm: what two one-hot rows without a common gene are apart
        self.span = max(2 * float((self.encoding**2).sum(axis=1).mean()) if n else 0.0, 1.0)
        self.columns: dict[int, Array] = {}  # of the kernel: a query's never changes

    def favourite(self, seen: list[int], answers: list[float]) -> int:
        """The row to query after `answers` [t] (NaN: failed) to the rows `seen`; there is one."""
        if not seen:
            return best_unseen(self.first, seen)
        if len(seen) < START:
            return best_unseen(self._apart(seen), seen)
        return best_unseen(self.bound(seen, answers), seen)

    def _apart(self, seen: list[int]) -> Array:
        """How far by its metrics each network [N] is from the nearest of `seen`; -inf for those
        that the metrics do not agree on."""
        agreed = descending(self.first)[: max(int(AGREED * len(self.first)), START)]
        distance = np.full(len(self.first), -np.inf)
        distance[agreed] = _squared(self.scores[agreed], self.scores[seen]).min(axis=1)
        return distance

    def kernel(self, rows: list[int]) -> Array:
        """[N, t] between all networks and these."""
        some, cells = self.scores[rows], self.encoding[rows]
        linear = self.scores @ some.T / self.dimensions
        metrics = np.exp(-_squared(self.scores, some) / (2 * self.dimensions))
        return (linear + metrics + np.exp(-_squared(self.encoding, cells) / self.span)) / 3

    def bound(self, seen: list[int], answers: list[float]) -> Array:
        """Upper confidence bound [N] of the normal scores of the answers, all networks'."""
        new = [row for row in seen if row not in self.columns]
        self.columns |= dict(zip(new, self.kernel(new).T, strict=True))
        k = np.array([self.columns[row] for row in seen])
        own = ((self.scores**2).sum(axis=1) / self.dimensions + 2) / 3
        scale = float(own[seen].mean())
        residual = graded(np.array(answers)) - AGREEMENT * self.consensus[seen]
        constant = float(residual.mean())
        root = np.linalg.cholesky(k[:, seen] / scale + NOISE * np.eye(len(seen)))
        white = np.linalg.solve(root, residual - constant)
        half = np.linalg.solve(root, k / scale)
        amplitude = max(float((white**2).mean()), 1e-3)
        mean = constant + AGREEMENT * self.consensus + white @ half
        variance = amplitude * np.maximum(own / scale - (half**2).sum(axis=0), 0.0)
        bound: Array = mean + KAPPA * np.sqrt(variance)
        return bound


def _squared(a: Array, b: Array) -> Array:
    squared: Array = (a**2).sum(1)[:, None] + (b**2).sum(1)[None] - 2 * a @ b.T
    return np.maximum(squared, 0.0)
