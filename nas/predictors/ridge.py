"""Bayesian ridge regression on one-hot genes: the learned predictor of the inner loop.

An additive model over a few dozen evaluated networks, because that many support no more; its
evidence-based shrinkage needs no tuning (MacKay 1992, as in scikit-learn's BayesianRidge), and a
million candidates cost one matrix product.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
Features = NDArray[np.float32] | NDArray[np.float64]  # as `SearchSpace.encode` gives them


@dataclass(frozen=True)
class Fitted:
    """mean = bias + d @ weights, std = sqrt(noise + d covariance d), d = features - centre."""

    centre: Array
    weights: Array
    bias: float
    root: Array  # covariance = root @ root.T
    noise: float

    def __call__(self, features: Features) -> tuple[Array, Array]:
        """(mean [N], std [N]) for encoded genes [N, F]."""
        d = features - self.centre
        spread = ((d @ self.root) ** 2).sum(axis=1)
        return self.bias + d @ self.weights, np.sqrt(self.noise + spread)


def fit(features: Features, targets: Array) -> Fitted:
    """Fit on encoded genes [N, F] and finite targets [N]; needs two rows."""
    from sklearn.linear_model import BayesianRidge  # 0.8 s to import

    features = features.astype(np.float64)
    centre = features.mean(axis=0)
    model = BayesianRidge().fit(features - centre, targets)
    values, vectors = np.linalg.eigh(model.sigma_)
    root = vectors * np.sqrt(np.maximum(values, 0.0))
    noise = float(1.0 / model.alpha_)
    return Fitted(centre, model.coef_, float(model.intercept_), root, noise)
