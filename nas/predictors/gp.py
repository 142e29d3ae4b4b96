"""Gaussian process on one-hot genes: what an additive model misses, genes that act together.

Kernel exp(-d / length) with d the squared distance of two rows of `SearchSpace.encode`, which
counts the genes in which they differ. Length and noise maximise the marginal likelihood over a
grid, the amplitude has a closed form (Rasmussen and Williams 2006, chapter 5).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from nas.predictors.ridge import Array, Features

LENGTHS = tuple(2.0 ** np.arange(0, 8))
NOISES = tuple(10.0 ** np.arange(-4.0, 0.5, 0.5))  # as shares of the amplitude
BLOCK = 4096  # rows predicted at once, so that memory stays small


@dataclass(frozen=True)
class Fitted:
    """mean = bias + k @ weights, std = sqrt(amplitude (1 + noise - |k @ root|^2))."""

    rows: NDArray[np.float32]  # [N, F]
    length: float
    weights: Array  # [N]
    root: Array  # [N, N]: its product with its transpose is the inverse of K + noise
    bias: float
    amplitude: float
    noise: float

    def __call__(self, features: Features) -> tuple[Array, Array]:
        """(mean [M], std [M]) for encoded genes [M, F]."""
        blocks = [self._block(features[at : at + BLOCK]) for at in range(0, len(features), BLOCK)]
        mean, std = (np.concatenate(parts) for parts in zip(*blocks, strict=True))
        return mean, std

    def _block(self, features: Features) -> tuple[Array, Array]:
        k = _kernel(features.astype(np.float32), self.rows, self.length)
        explained = ((k @ self.root.astype(np.float32)) ** 2).sum(axis=1, dtype=np.float64)
        variance = self.amplitude * (1 + self.noise - np.minimum(explained, 1.0))
        mean = self.bias + (k @ self.weights.astype(np.float32)).astype(np.float64)
        return mean, np.sqrt(variance)


def fit(features: Features, targets: Array) -> Fitted:
    """Fit on encoded genes [N, F] and finite targets [N]; O(N^3)."""
    rows = features.astype(np.float32)
    bias = float(targets.mean())
    best = (-np.inf, 0.0, 0.0)
    spectra = {}
    for length in LENGTHS:
        values, vectors = np.linalg.eigh(_kernel(rows, rows, length).astype(np.float64))
        projected = vectors.T @ (targets - bias)
        spectra[length] = values, vectors, projected
        likelihoods = _likelihoods(values[:, None] + np.array(NOISES), projected)
        at = int(likelihoods.argmax())
        best = max(best, (float(likelihoods[at]), length, NOISES[at]))
    _, length, noise = best
    values, vectors, projected = spectra[length]
    spectrum = np.maximum(values + noise, 1e-9)
    return Fitted(
        rows,
        length,
        vectors @ (projected / spectrum),
        vectors / np.sqrt(spectrum),
        bias,
        float((projected**2 / spectrum).mean()),
        noise,
    )


def _kernel(a: NDArray[np.float32], b: NDArray[np.float32], length: float) -> NDArray[np.float32]:
    squared = (a**2).sum(1)[:, None] + (b**2).sum(1)[None] - 2 * a @ b.T
    return np.exp(-squared / np.float32(length))


def _likelihoods(spectra: Array, projected: Array) -> Array:
    """Marginal log-likelihoods [K], up to a constant, at the best amplitude of each of the spectra
    [N, K]."""
    spectra = np.maximum(spectra, 1e-9)
    amplitudes = np.maximum((projected[:, None] ** 2 / spectra).mean(axis=0), 1e-30)
    return -0.5 * (len(projected) * np.log(amplitudes) + np.log(spectra).sum(axis=0))
