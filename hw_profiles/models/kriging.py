"""Gaussian-process regression on a few blocks of features, for tens to hundreds of samples.

The covariance is a sum over blocks of a linear kernel (effects that add up) and two squared
exponential kernels (a narrow and a wide one: effects that do not), plus noise; how much each
contributes is learnt by maximum (restricted) marginal likelihood, of one data set or of several
that are thought to be alike (Rasmussen and Williams, Gaussian Processes for Machine Learning,
2006, chapters 2 and 5). The mean is an unknown constant, so adding a constant to every observation
adds it to every prediction and changes nothing else.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.linalg import cho_factor, cho_solve
from scipy.optimize import minimize

from hw_profiles.latency import Array

Blocks = Sequence[Array]  # one (samples, features) array per block

LENGTHS = (0.0, 1.0, 3.0)  # of the kernels of a block, in typical distances; 0 is the linear one
BOUNDS = (-14.0, 4.0)  # of the logarithm of a weight
NOISE_BOUNDS = (-11.0, 0.0)  # a standard deviation of 0.4 % to 100 %
NEGLIGIBLE = 1e-5  # a kernel with a smaller weight than this changes a logarithm by < 0.5 %
STEPS = 50  # of the optimiser; what is left to gain after these is far below the noise
CHUNK = 4096  # rows predicted at a time: bounds the memory
Task = tuple[Array, Array]  # (kernels, samples, samples) from `kernels`, and the observations


@dataclass(frozen=True)
class Scale:
    """Centres columns and divides them by their deviation; constant columns are dropped."""

    mean: Array
    deviation: Array
    kept: NDArray[np.intp]

    @classmethod
    def of(cls, rows: Array) -> Scale:
        mean, deviation = rows.mean(axis=0), rows.std(axis=0)
        kept = np.flatnonzero(deviation > 1e-9 * np.abs(rows).max(axis=0, initial=0.0))
        return cls(mean[kept], deviation[kept], kept)

    def __call__(self, rows: Array) -> Array:
        return (rows[:, self.kept] - self.mean) / self.deviation


def kernels(left: Blocks, right: Blocks) -> Array:
    """(blocks x LENGTHS, rows of left, rows of right)."""
    return np.stack([one for a, b in zip(left, right, strict=True) for one in _of_block(a, b)])


def _of_block(left: Array, right: Array) -> list[Array]:
    features = max(1, left.shape[1])
    linear = left @ right.T / features
    square = (left**2).sum(axis=1)[:, None] + (right**2).sum(axis=1)[None] - 2 * features * linear
    distance = np.maximum(square, 0.0) / features
    return [np.exp(-distance / (2 * length**2)) if length else linear for length in LENGTHS]


def likelihood(log_weights: Array, grams: Array, values: Array) -> tuple[float, Array]:
    """(negative restricted log likelihood, its gradient); the last weight is the noise's."""
    weights = np.exp(log_weights)
    n = len(values)
    covariance = np.tensordot(weights[:-1], grams, axes=1)
    covariance[np.diag_indices(n)] += weights[-1]
    factor = cho_factor(covariance, lower=True)
    inverse = cho_solve(factor, np.eye(n))
    ones = inverse.sum(axis=0)
    residual = inverse @ (values - (ones @ values) / ones.sum())
    spread = np.log(np.diag(factor[0])).sum() + 0.5 * np.log(ones.sum())
    loss = 0.5 * values @ residual + spread
    slope = inverse - np.outer(ones, ones) / ones.sum() - np.outer(residual, residual)
    gradient = np.append(np.tensordot(grams, slope, axes=2), np.trace(slope))
    return float(loss), 0.5 * weights * gradient


def learn(tasks: Sequence[Task], start: Array, spread: float) -> Array:
    """Log weights (kernels, then noise) that suit all tasks; `start` is also the centre of a normal
    prior with this standard deviation, which decides what the samples leave open."""

    def loss(log_weights: Array) -> tuple[float, Array]:
        away = (log_weights - start) / spread
        found = [likelihood(log_weights, grams, values) for grams, values in tasks]
        gradient = sum((one for _, one in found), start=away / spread)
        return 0.5 * float(away @ away) + sum(value for value, _ in found), gradient

    bounds = [BOUNDS] * (len(start) - 1) + [NOISE_BOUNDS]
    options = {"maxiter": STEPS}
    found = minimize(loss, start, jac=True, method="L-BFGS-B", bounds=bounds, options=options)
    return np.asarray(found.x)


@dataclass(frozen=True)
class Process:
    """A fitted regression: observations at `blocks`, ready to be asked elsewhere."""

    blocks: tuple[Array, ...]
    log_weights: Array
    mean: float
    residual: Array  # inverse covariance times what the mean leaves
    factor: Array  # lower Cholesky factor of the covariance

    @classmethod
    def fit(cls, blocks: Blocks, values: Array, log_weights: Array) -> Process:
        covariance = _covariance(blocks, blocks, np.exp(log_weights))
        covariance[np.diag_indices(len(values))] += np.exp(log_weights[-1])
        factor, _ = cho_factor(covariance, lower=True)
        ones = cho_solve((factor, True), np.ones(len(values)))
        mean = float(ones @ values / ones.sum())
        residual = cho_solve((factor, True), values - mean)
        return cls(tuple(blocks), log_weights, mean, residual, factor)

    def leave_one_out(self, values: Array) -> tuple[Array, Array]:
        """What `predict` would say of each observation without it, at the same weights (Rasmussen
        and Williams 2006, section 5.4.2; here with the mean estimated again, too)."""
        inverse = cho_solve((self.factor, True), np.eye(len(values)))
        ones = inverse.sum(axis=0)
        inverse -= np.outer(ones, ones) / ones.sum()
        variance = 1 / np.diag(inverse)
        return values - variance * (inverse @ values), np.sqrt(variance)

    def mean_at(self, blocks: Blocks) -> Array:
        """Like `predict`, without the deviation, which costs most of the time."""
        weights = np.exp(self.log_weights)
        means = [
            self.mean + _covariance(part, self.blocks, weights) @ self.residual
            for part in _parts(blocks)
        ]
        return np.concatenate([[], *means])

    def predict(self, blocks: Blocks) -> tuple[Array, Array]:
        """(mean, standard deviation of one more observation) per row of the blocks."""
        found = [self._predict(part) for part in _parts(blocks)]
        means, deviations = zip(*found, strict=True) if found else ((), ())
        return np.concatenate([[], *means]), np.concatenate([[], *deviations])

    def _predict(self, blocks: Blocks) -> tuple[Array, Array]:
        weights = np.exp(self.log_weights)
        across = _covariance(self.blocks, blocks, weights)
        solved = cho_solve((self.factor, True), across)
        ones = cho_solve((self.factor, True), np.ones(len(self.residual)))
        unsure = (1 - solved.sum(axis=0)) ** 2 / ones.sum()  # of the mean itself
        variance = _diagonal(blocks, weights) - (across * solved).sum(axis=0) + unsure
        return self.mean + across.T @ self.residual, np.sqrt(np.maximum(variance, weights[-1]))


def _parts(blocks: Blocks) -> Iterator[list[Array]]:
    for first in range(0, len(blocks[0]), CHUNK):
        yield [block[first : first + CHUNK] for block in blocks]


def _covariance(left: Blocks, right: Blocks, weights: Array) -> Array:
    total = np.zeros((len(left[0]), len(right[0])))
    for at, (a, b) in enumerate(zip(left, right, strict=True)):
        own = weights[at * len(LENGTHS) : (at + 1) * len(LENGTHS)]
        if own.max() > NEGLIGIBLE:
            total += np.tensordot(own, np.stack(_of_block(a, b)), axes=1)
    return total


def _diagonal(blocks: Blocks, weights: Array) -> Array:
    """Prior variance of each row, noise included."""
    total = np.full(len(blocks[0]), weights[-1])
    for at, block in enumerate(blocks):
        own = weights[at * len(LENGTHS) : (at + 1) * len(LENGTHS)]
        total += own[0] * (block**2).sum(axis=1) / max(1, block.shape[1]) + own[1:].sum()
    return total
