"""Operator times learned from whole networks: an additive Gaussian process.

    ms(network) = constant + sum over its operators of  prior(op) * (1 + f(op))

`prior` is the non-negative fit of `calibrate.solve` (count, MACs and bytes per family of
operators); f, a smooth function of an operator's dimensions plus an effect of its own for every
operator that was measured, is what the prior gets wrong. No operator is ever timed alone: overheads
that overlap, fusion and caches are in the sums, which is where they act. A network of N operators
says something about each of them, so a set of random networks is a weighing design: it knows single
operators better than as many measurements of one operator each (Hotelling, 1944).

The sum of Gaussian processes over parts is one over the wholes (Duvenaud et al., arXiv 1112.4394),
so fit and prediction are exact linear algebra; the four variances and the length scale maximise the
marginal likelihood.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, field_serializer, field_validator
from scipy.linalg import cho_factor, cho_solve
from scipy.optimize import minimize

from hw_profiles.op import Op, to_row

Array = NDArray[np.float64]
ACTS = ("", "relu", "hswish", "hsigmoid", "silu")
#: length scales to choose from, in the units of `features` (doublings of a dimension)
LENGTHS = (0.7, 1.5, 3.0)
ROUGH = 0.3  # length of the rough part, as a share of the smooth part's
MOST = 240  # networks that the hyper-parameters are chosen on


class Additive(BaseModel):
    """f as a weighted sum of kernels around the operators of the measured networks."""

    model_config = ConfigDict(frozen=True, extra="forbid", arbitrary_types_allowed=True)
    ops: tuple[Op, ...]
    weights: tuple[float, ...]  # one per operator
    length: float
    variances: tuple[float, float, float]  # of the smooth, the rough and the operator's own part

    @field_validator("ops", mode="before")
    @classmethod
    def _read(cls, value: Any) -> Any:
        return tuple(Op(**row) if isinstance(row, dict) else row for row in value)

    @field_serializer("ops")
    def _write(self, ops: tuple[Op, ...]) -> list[dict[str, Any]]:
        return [to_row(op) for op in ops]

    @cached_property
    def _index(self) -> dict[Op, int]:
        return {op: at for at, op in enumerate(self.ops)}

    @cached_property
    def _features(self) -> tuple[Array, NDArray[Any]]:
        return features(self.ops)

    def __contains__(self, op: Op) -> bool:
        """Was it in a measured network?"""
        return op in self._index

    def correction(self, ops: Sequence[Op]) -> Array:
        """f of each operator [len(ops)]; the prior's time is to be multiplied by 1 + f."""
        distance = squared_distances(features(ops), self._features)
        own = np.zeros(distance.shape, bool)
        for row, op in enumerate(ops):
            if op in self._index:
                own[row, self._index[op]] = True
        return mix(parts(distance, own, self.length), self.variances) @ np.array(self.weights)


def features(ops: Sequence[Op]) -> tuple[Array, NDArray[Any]]:
    """(dimensions [N, F] in doublings, group [N]); operators of two groups tell nothing about each
    other."""
    rows, groups = [], []
    for op in ops:
        tails = [float(c % tile > 0) for c in (op.c_in, op.c_out) for tile in (8, 16)]
        rows.append(
            [
                np.log2(op.c_in),
                np.log2(op.c_out),
                np.log2(op.h_out * op.w_out),
                2 * np.log2(op.kernel),
                2 * np.log2(op.stride),
                *tails,
                *(1.5 * (op.act == act) for act in ACTS),
            ]
        )
        shape = "1x1" if op.kernel == 1 else "kxk"
        groups.append(f"{op.kind} {shape} {'grouped' if op.groups > 1 else ''}")
    return np.array(rows), np.array(groups)


def squared_distances(a: tuple[Array, NDArray[Any]], b: tuple[Array, NDArray[Any]]) -> Array:
    """Between the operators of two results of `features`: [N, M], infinite between groups."""
    (left, own), (right, other) = a, b
    squared = (left**2).sum(1)[:, None] + (right**2).sum(1) - 2 * left @ right.T
    return np.where(own[:, None] == other, np.maximum(squared, 0.0), np.inf)


def parts(distance: Array, own: NDArray[np.bool_], length: float) -> list[Array]:
    smooth = np.exp(-distance / (2 * length**2))
    rough = np.exp(-distance / (2 * (ROUGH * length) ** 2))
    return [smooth, rough, own.astype(float)]


def mix(kernels: Sequence[Array], variances: Sequence[float]) -> Array:
    return sum((v * k for v, k in zip(variances, kernels, strict=True)), np.zeros(()))


def fit(shares: Array, ops: Sequence[Op], residuals: Array, rng: np.random.Generator) -> Additive:
    """`residuals` [N]: measured / prior - 1 of each network; `shares` [N, U]: which share of the
    prior's time each of the U distinct `ops` has in it."""
    there = features(ops)
    distance, own = squared_distances(there, there), np.eye(len(ops), dtype=bool)
    some = np.sort(rng.permutation(len(residuals))[:MOST])
    best: tuple[float, float, Array] = (np.inf, 0.0, np.zeros(4))
    for length in LENGTHS:
        covariances = [shares[some] @ k @ shares[some].T for k in parts(distance, own, length)]
        found = minimize(
            _likelihood,
            np.log([0.02, 0.01, 0.01, 1e-3]),
            (covariances, residuals[some]),
            method="L-BFGS-B",
            bounds=[(-18, 2)] * 3 + [(-12, 0)],
            options={"maxiter": 60},
        )
        if found.fun < best[0]:
            best = float(found.fun), length, np.exp(found.x)
    _, length, (*variances, noise) = best
    kernel = mix(parts(distance, own, length), variances)
    covariance = shares @ kernel @ shares.T + noise * np.eye(len(residuals))
    weights = shares.T @ cho_solve(cho_factor(covariance), residuals)
    a, b, c = (float(v) for v in variances)
    return Additive(ops=tuple(ops), weights=tuple(weights), length=length, variances=(a, b, c))


def _likelihood(logs: Array, covariances: Sequence[Array], residuals: Array) -> float:
    """Minus the log marginal likelihood, up to a constant."""
    *variances, noise = np.exp(logs)
    total = mix(covariances, variances) + noise * np.eye(len(residuals))
    try:
        factor = cho_factor(total)
    except np.linalg.LinAlgError:
        return 1e10
    half = np.log(np.diag(factor[0])).sum()
    return float(0.5 * residuals @ cho_solve(factor, residuals) + half)
