"""RoBoT (He et al., ICLR 2024, arXiv 2403.07591) as its authors released it.

Bayesian optimisation over the weights of a linear combination of metrics: a weight vector is worth
what the network is worth that the combination ranks first. `budget` weight vectors are tried; they
often agree on a network, and the queries that this leaves over walk down the ranking of the best
weight vector. Settings are those of the release: weights in [-1, 1], a Gaussian process with a
Matern 5/2 kernel and 1e-6 of noise on standardised values, upper confidence bound with 2.576
deviations, the newest of equal weight vectors is the incumbent.

As there, a missing metric counts as 0: the worst value under a positive weight, the best under a
negative one. (Its column's median looks wiser. On NAS-Bench-201's live networks it concerns one of
9,445, a dead one, and changes how often a search finds the best from nine in ten to seven.)

Different here: ties go to the lowest id (there: an unstable sort), the length scale is the
likeliest of a grid (there: a descent from six starts), and the bound is climbed from the best of
10,000 random points all at once (there: one after another, from ten more random ones).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from nas.pool import Array, Pool, Search
from nas.pool.scales import best_unseen, min_max

KAPPA = 2.576
NOISE = 1e-6
LENGTHS = np.geomspace(0.05, 20.0, 24)
RANDOM = 10_000
STARTS = 10
CLIMB = 30  # steps from each start


def search(pool: Pool, budget: int, seed: int) -> Search:
    """Exactly `budget` weight vectors, then the walk; a failed query is worth the worst so far."""
    table = np.nan_to_num(min_max(pool.features), nan=0.0)
    seen: dict[int, float] = {}
    weights: list[Array] = []
    values: list[float] = []
    best: tuple[float, Array] | None = None
    for step in range(budget):
        rng = np.random.default_rng((seed, 28, step))
        weight: Array = rng.uniform(-1, 1, table.shape[1:])
        if step:
            weight = _next(weights, values, rng)
        row = int(np.argmax(table @ weight))
        if row not in seen:
            seen[row] = yield row
        weights.append(weight)
        values.append(seen[row])
        if np.isfinite(seen[row]) and (best is None or seen[row] >= best[0]):
            best = seen[row], weight
    ranking = table @ (weights[-1] if best is None else best[1])
    while len(seen) < budget:
        row = best_unseen(ranking, list(seen))
        seen[row] = yield row


def _next(weights: list[Array], values: list[float], rng: np.random.Generator) -> Array:
    """The weights of the highest upper confidence bound found [m]."""
    found = np.array(values)
    if not np.isfinite(found).any():
        return rng.uniform(-1, 1, len(weights[0]))
    process = fit(np.array(weights), np.where(np.isnan(found), np.nanmin(found), found))
    points = rng.uniform(-1, 1, (RANDOM, len(weights[0])))
    bound, _ = process.bound(points, slopes=False)
    points = points[np.argsort(-bound, kind="stable")[:STARTS]]
    step = np.full((len(points), 1), 0.1)
    bound, slope = process.bound(points)
    for _ in range(CLIMB):  # uphill, each start with its own step: longer after a success
        length = np.linalg.norm(slope, axis=1, keepdims=True)
        tried = np.clip(points + step * slope / np.maximum(length, 1e-12), -1, 1)
        higher, steeper = process.bound(tried)
        better = (higher > bound)[:, None]
        points, slope = np.where(better, tried, points), np.where(better, steeper, slope)
        bound, step = np.maximum(higher, bound), np.where(better, 1.5 * step, step / 3)
    return points[int(np.argmax(bound))]


@dataclass(frozen=True)
class Process:
    """Matern 5/2 with unit amplitude on standardised values."""

    points: Array  # [n, m]
    length: float
    inverse: Array  # [n, n] of the kernel matrix with its noise
    weights: Array  # [n]: inverse @ standardised values

    def bound(self, at: Array, *, slopes: bool = True) -> tuple[Array, Array]:
        """Upper confidence bound [K] in deviations of the values, and its gradient [K, m]."""
        apart = np.sqrt(_squared(at, self.points)) * np.sqrt(5) / self.length
        decay = np.exp(-apart)
        k = (1 + apart + apart**2 / 3) * decay
        solved = k @ self.inverse
        std = np.sqrt(np.maximum(1 - (solved * k).sum(axis=1), 1e-12))
        value = k @ self.weights + KAPPA * std
        if not slopes:
            return value, np.zeros((0, at.shape[1]))
        # dk/dx = -5 / (3 length^2) (1 + apart) decay (x - point)
        shrink = -5 / (3 * self.length**2) * (1 + apart) * decay
        pull = shrink * (self.weights - KAPPA * solved / std[:, None])
        return value, pull.sum(axis=1)[:, None] * at - pull @ self.points


def fit(points: Array, values: Array) -> Process:
    """The process whose length scale makes the values [n] likeliest."""
    target = (values - values.mean()) / (values.std() or 1.0)
    distance = np.sqrt(_squared(points, points)) * np.sqrt(5) / LENGTHS[:, None, None]
    kernels = (1 + distance + distance**2 / 3) * np.exp(-distance) + NOISE * np.eye(len(points))
    spectra, vectors = np.linalg.eigh(kernels)
    spectra = np.maximum(spectra, NOISE / 10)
    projected = np.einsum("lij,i->lj", vectors, target)
    likelihood = -0.5 * (projected**2 / spectra + np.log(spectra)).sum(axis=1)
    at = int(np.argmax(likelihood))
    inverse = (vectors[at] / spectra[at]) @ vectors[at].T
    return Process(points, float(LENGTHS[at]), inverse, inverse @ target)


def _squared(a: Array, b: Array) -> Array:
    squared: Array = (a**2).sum(1)[:, None] + (b**2).sum(1)[None] - 2 * a @ b.T
    return np.maximum(squared, 0.0)
