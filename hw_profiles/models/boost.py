"""Gradient boosting of symmetric trees: a few arrays, so a fitted model is plain JSON.

Every level of a symmetric (oblivious) tree asks one question of all rows, so a tree of depth d is d
features, d thresholds and 2^d values (Kohavi and Li, IJCAI 1995; the trees of CatBoost). Scikit-
learn's histogram trees are as good, but have no public arrays, and nothing here is ever unpickled.
The loss is Huber's: a kernel for which the runtime chose an odd tactic shall not bend its
neighbours. Rows and features are drawn anew for every tree (Friedman 2002).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, PlainSerializer, PlainValidator

Array = NDArray[np.float64]
Index = NDArray[np.intp]
BINS = 64


def _floats(value: Any) -> Array:
    return np.asarray(value, dtype=float)


#: an array in a model that is stored as JSON
Stored = Annotated[Array, PlainValidator(_floats), PlainSerializer(lambda array: array.tolist())]


@dataclass(frozen=True)
class Growth:
    """How much to learn; the defaults are for errors in logarithms, some percent wide."""

    trees: int = 200
    depth: int = 6
    rate: float = 0.2
    rows: float = 0.2  # share drawn for a tree
    features: float = 0.4
    ridge: float = 5.0  # rows of value 0 that every leaf is thought to have as well
    width: float = 0.05  # errors beyond this count linearly


class Forest(BaseModel):
    """Its value is the sum over trees."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    features: Stored  # trees x depth
    thresholds: Stored  # trees x depth: the answer is yes above it
    values: Stored  # trees x 2^depth

    def __call__(self, table: Array) -> Array:
        """For rows [N, F]."""
        total = np.zeros(len(table))
        for features, thresholds, values in zip(
            self.features.astype(int), self.thresholds, self.values, strict=True
        ):
            leaf = np.zeros(len(table), dtype=np.intp)
            for feature, threshold in zip(features, thresholds, strict=True):
                leaf = 2 * leaf + (table[:, feature] > threshold)
            total += values[leaf]
        return total


def fit(table: Array, target: Array, rng: np.random.Generator, growth: Growth = Growth()) -> Forest:
    """A forest whose sum approaches `target` [N] on rows [N, F]."""
    n, width = table.shape
    edges = np.quantile(table, np.arange(1, BINS) / BINS, axis=0)
    binned = np.stack([np.searchsorted(edges[:, at], table[:, at]) for at in range(width)])
    error = target.astype(float)
    features = np.zeros((growth.trees, growth.depth))
    thresholds = np.zeros((growth.trees, growth.depth))
    values = np.zeros((growth.trees, 2**growth.depth))
    for tree in range(growth.trees):
        rows = rng.permutation(n)[: max(min(n, 50), round(growth.rows * n))]
        chosen = rng.permutation(width)[: max(1, round(growth.features * width))]
        # iteratively reweighted: a weighted mean that moves like Huber's estimate
        weight = np.minimum(1.0, growth.width / np.maximum(np.abs(error[rows]), 1e-12))
        pull = weight * error[rows]
        splits, leaf = _splits(binned[:, rows], chosen, pull, weight, growth)
        sums, mass = (np.bincount(leaf, part, 2**growth.depth) for part in (pull, weight))
        values[tree] = growth.rate * sums / (mass + growth.ridge)
        every = np.zeros(n, dtype=np.intp)
        for level, (feature, cut) in enumerate(splits):
            features[tree, level], thresholds[tree, level] = feature, edges[cut, feature]
            every = 2 * every + (binned[feature] > cut)
        error -= values[tree][every]
    return Forest(features=features, thresholds=thresholds, values=values)


def _splits(
    binned: Index, chosen: Index, pull: Array, weight: Array, growth: Growth
) -> tuple[list[tuple[int, int]], Index]:
    """(feature, last bin that answers no) of each level, greedily, and the leaf of each row."""
    leaf = np.zeros(binned.shape[1], dtype=np.intp)
    found = []
    for level in range(growth.depth):
        gains = [_gains(leaf * BINS + binned[at], 2**level, pull, weight, growth) for at in chosen]
        at, cut = divmod(int(np.argmax(gains)), BINS - 1)
        feature = int(chosen[at])
        found.append((feature, cut))
        leaf = 2 * leaf + (binned[feature] > cut)
    return found, leaf


def _gains(cell: Index, leaves: int, pull: Array, weight: Array, growth: Growth) -> Array:
    """What each cut of one feature explains, summed over the leaves it splits."""
    below, mass = (
        np.bincount(cell, part, leaves * BINS).reshape(leaves, BINS).cumsum(axis=1)
        for part in (pull, weight)
    )
    above, rest = below[:, -1:] - below, mass[:, -1:] - mass
    gain = below**2 / (mass + growth.ridge) + above**2 / (rest + growth.ridge)
    return gain.sum(axis=0)[:-1]
