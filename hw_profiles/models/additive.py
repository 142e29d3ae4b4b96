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
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, field_serializer, field_validator

from hw_profiles.op import Op, to_row

Array = NDArray[np.float64]
Index = NDArray[np.intp]
ACTS = ("", "relu", "hswish", "hsigmoid", "silu")
#: length scales to choose from, in the units of `features` (doublings of a dimension)
LENGTHS = (1.5, 3.0, 6.0)
TAIL = 2.0  # how far channels that fill no vector are from those that do
ROUGH = 0.3  # length of the rough part, as a share of the smooth part's
MOST = 240  # networks that the hyper-parameters are chosen on


class Additive(BaseModel):
    """f as a weighted sum of kernels around the operators of the measured networks."""

    model_config = ConfigDict(frozen=True, extra="forbid", arbitrary_types_allowed=True)
    ops: tuple[Op, ...]
    weights: tuple[float, ...]  # one per operator
    length: float
    variances: tuple[float, float, float]  # of the smooth, the rough and the operator's own part
    predicted: tuple[int, ...] = ()  # positions of operators that only predicted networks had

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
    def _predicted(self) -> frozenset[int]:
        return frozenset(self.predicted)

    @cached_property
    def _features(self) -> tuple[Array, NDArray[Any]]:
        return features(self.ops)

    def __contains__(self, op: Op) -> bool:
        """Was it in a measured network?"""
        return op in self._index and self._index[op] not in self._predicted

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
        tails = [TAIL * (c % tile > 0) for c in (op.c_in, op.c_out) for tile in (4, 8, 16)]
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


def parts(distance: Any, own: NDArray[np.bool_], length: float) -> list[Array]:
    smooth = np.exp(-distance / (2 * length**2))
    rough = np.exp(-distance / (2 * (ROUGH * length) ** 2))
    return [smooth, rough, own.astype(distance.dtype)]


def mix(kernels: Sequence[Array], variances: Sequence[float]) -> Array:
    return sum((v * k for v, k in zip(variances, kernels, strict=True)), np.zeros(()))


@dataclass(frozen=True)
class Process:
    """The Gaussian process over networks, before it has seen their residuals.

    `shares` [N, U]: which share of network n's prior time each of the distinct `ops` has.
    """

    shares: Array
    ops: tuple[Op, ...]
    covariances: dict[float, list[Array]]  # length scale -> [N, N] of each part

    @classmethod
    def of(cls, shares: Array, ops: Sequence[Op]) -> Process:
        there = features(ops)
        distance = squared_distances(there, there).astype(np.float32)
        own, narrow = np.eye(len(ops), dtype=bool), shares.astype(np.float32)
        found = {
            length: [
                (narrow @ (kernel @ narrow.T)).astype(np.float64)
                for kernel in parts(distance, own, length)
            ]
            for length in LENGTHS
        }
        return cls(shares, tuple(ops), found)

    def choose(self, residuals: Array, rng: np.random.Generator) -> Hyper:
        """The length, variances and noise of the highest marginal likelihood."""
        from scipy.optimize import minimize  # 0.3 s to import, and tables are read without it

        some = np.sort(rng.permutation(len(residuals))[:MOST])
        best = Hyper(np.inf, 0.0, (0.0, 0.0, 0.0), 0.0)
        for length, kernels in self.covariances.items():
            found = minimize(
                _likelihood,
                np.log([0.02, 0.01, 0.01, 1e-3]),
                ([kernel[np.ix_(some, some)] for kernel in kernels], residuals[some]),
                method="L-BFGS-B",
                bounds=[(-18, 2)] * 3 + [(-12, 0)],
                options={"maxiter": 60},
            )
            if found.fun < best.loss:
                a, b, c, noise = (float(value) for value in np.exp(found.x))
                best = Hyper(float(found.fun), length, (a, b, c), noise)
        return best

    def predict(self, hyper: Hyper, residuals: Array, seen: Index, unseen: Index) -> Array:
        """Residuals of the networks `unseen` from those of `seen`, by position."""
        whole = mix(self.covariances[hyper.length], hyper.variances)
        inner = whole[np.ix_(seen, seen)] + hyper.noise * np.eye(len(seen))
        return whole[np.ix_(unseen, seen)] @ _solve(inner, residuals)[0]

    def fit(self, hyper: Hyper, residuals: Array) -> Additive:
        """From all networks: `residuals` [N] are measured / prior - 1."""
        whole = mix(self.covariances[hyper.length], hyper.variances)
        inner = whole + hyper.noise * np.eye(len(residuals))
        weights = self.shares.T @ _solve(inner, residuals)[0]
        return Additive(
            ops=self.ops,
            weights=tuple(weights.tolist()),
            length=hyper.length,
            variances=hyper.variances,
        )


@dataclass(frozen=True)
class Hyper:
    loss: float  # minus the log marginal likelihood, up to a constant
    length: float
    variances: tuple[float, float, float]
    noise: float


def _likelihood(logs: Array, covariances: Sequence[Array], residuals: Array) -> float:
    *variances, noise = np.exp(logs)
    total = mix(covariances, variances) + noise * np.eye(len(residuals))
    try:
        solved, log_determinant = _solve(total, residuals)
    except np.linalg.LinAlgError:
        return 1e10
    return float(residuals @ solved + log_determinant) / 2


def _solve(matrix: Array, right: Array) -> tuple[Array, float]:
    """(matrix^-1 right, log determinant) of a positive definite matrix."""
    from scipy.linalg import cho_factor, cho_solve

    factor = cho_factor(matrix)
    return cho_solve(factor, right), float(2 * np.log(np.diag(factor[0])).sum())
