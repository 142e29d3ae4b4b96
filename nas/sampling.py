"""Which networks a training step runs: the sandwich, and whom its random places go to.

`uniform` is BigNAS (arXiv 2003.11142). `bestup` and `worstup` are AttentiveNAS (2011.09011): each
random place goes to the best or the worst of several networks *of the same cost*, best being the
lowest predicted loss, or without a predictor the lowest loss on the step's own images (section
3.2 of that paper).

Ours: the paper draws from a product of each gene's frequencies in a cost bin, so genes that go
together are lost and draws may miss the bin. Here all candidates come from one uniform sample of
the space: the first fixes the bin, others are taken if they are in it. That is uniform sampling
conditioned on the cost, exactly; one candidate is uniform sampling.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nas.recipe import Recipe
from nas.space import Genes, SearchSpace, scalar

BINS = 20  # of equal width in MACs between the smallest and the largest network
POOL = 512  # rows among which a step looks for candidates

Predict = Callable[[Genes], NDArray[np.float64]]  # rows [N, G] to losses [N]: lower is better
Archs = Callable[[int], list[Any]]


@dataclass(frozen=True)
class Contest:
    """Networks of one cost, of which a step trains the one with the lowest (or the highest) loss on
    its images (those of all processes) before the step."""

    archs: tuple[Any, ...]
    worst: bool


def sandwich(space: SearchSpace, recipe: Recipe, predict: Predict | None = None) -> Archs:
    """The networks of a step, a function of (seed, step): the largest first (it teaches), then the
    smallest, then `recipe.n_random` by `recipe.policy`, as architectures or as a Contest of some.
    """
    rows_of = _uniform(space, recipe)
    if recipe.policy != "uniform":
        rows_of = _of_one_cost(space, recipe)

    def archs(step: int) -> list[Any]:
        groups = rows_of(np.random.default_rng((recipe.seed, 2, step)))
        ends = [space.decode(space.largest), space.decode(space.smallest)]
        return [*ends, *(_chosen(space, group, recipe, predict) for group in groups)]

    return archs


def _uniform(space: SearchSpace, recipe: Recipe) -> Callable[[np.random.Generator], list[Genes]]:
    return lambda rng: list(space.sample(rng, recipe.n_random)[:, None])


def _of_one_cost(
    space: SearchSpace, recipe: Recipe
) -> Callable[[np.random.Generator], list[Genes]]:
    """For each random place up to `recipe.candidates` rows [k, G] of one cost bin."""
    bin_of, places = cost_bins(space), recipe.n_random

    def draw(rng: np.random.Generator) -> list[Genes]:
        pool = space.sample(rng, max(POOL, places))
        bins, groups = bin_of(pool), []
        for place in range(places):  # each looks through rows of its own, so that none is run twice
            own = np.arange(place, len(pool), places)
            same = own[bins[own] == bins[place]]
            groups.append(pool[same[: recipe.candidates]])
        return groups

    return draw


def cost_bins(space: SearchSpace) -> Callable[[Genes], NDArray[np.int64]]:
    """Rows [N, G] to the number [N] of their bin in MACs, 0 to BINS - 1."""

    fold = space.fold(scalar(lambda op: op.macs))
    low, high = (float(fold(row[None])[0, 0]) for row in (space.smallest, space.largest))
    width = max(high - low, 1.0) / BINS
    return lambda rows: np.minimum((fold(rows)[:, 0] - low) // width, BINS - 1).astype(np.int64)


def _chosen(space: SearchSpace, group: Genes, recipe: Recipe, predict: Predict | None) -> Any:
    worst = recipe.policy == "worstup"
    if len(group) == 1:
        return space.decode(group[0])
    if predict is not None:
        losses = predict(group)
        return space.decode(group[losses.argmax() if worst else losses.argmin()])
    return Contest(tuple(space.decode(row) for row in group), worst)


def alone(net: Any) -> Archs:
    """For `train`: every step runs `net` itself, and only that."""
    return lambda step: [net.arch]
