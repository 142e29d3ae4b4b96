"""Features of a cell's graph that no network need be built for.

The idea of GRAF (Kadlecova et al., ICML 2024: "Surprisingly strong performance prediction with
neural graph features"): for sets of operations, how often they occur, how far the output is from
the input when only they may be used, and how many of them meet at the ends.
"""

from __future__ import annotations

import itertools

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
Ints = NDArray[np.int64]


def features(sources: Ints, targets: Ints, ops: Ints, *, nodes: int, kinds: int) -> Array:
    """[N, H] for N cells of E edges: edge e of cell n runs sources[n, e] -> targets[e] and does
    ops[n, e] < kinds. Nodes are numbered in topological order; 0 is the input, the last the output.

    Sets of operations are all single ones, all pairs, and all together. Per set: edges in it;
    shortest and longest path of it from input to output (nodes, resp. 0, where there is none);
    paths of it; its edges at the input and at the output.
    """
    sets = [*itertools.combinations(range(kinds), 1), *itertools.combinations(range(kinds), 2)]
    sets.append(tuple(range(kinds)))
    columns = [_of_set(sources, targets, np.isin(ops, some), nodes) for some in sets]
    return np.concatenate(columns, axis=1)


def _of_set(sources: Ints, targets: Ints, usable: NDArray[np.bool_], nodes: int) -> Array:
    n = len(usable)
    paths, longest = np.zeros((n, nodes)), np.full((n, nodes), -np.inf)
    shortest = np.full((n, nodes), np.inf)
    paths[:, 0], shortest[:, 0], longest[:, 0] = 1, 0, 0
    cells = np.arange(n)
    for edge in np.argsort(targets, kind="stable"):
        source, target, on = sources[:, edge], targets[edge], usable[:, edge]
        paths[:, target] += on * paths[cells, source]
        step = np.where(on, shortest[cells, source] + 1, np.inf)
        shortest[:, target] = np.minimum(shortest[:, target], step)
        step = np.where(on, longest[cells, source] + 1, -np.inf)
        longest[:, target] = np.maximum(longest[:, target], step)
    return np.column_stack(
        [
            usable.sum(1),
            np.minimum(shortest[:, -1], nodes),
            np.maximum(longest[:, -1], 0),
            paths[:, -1],
            (usable & (sources == 0)).sum(1),
            usable[:, targets == nodes - 1].sum(1),
        ]
    )
