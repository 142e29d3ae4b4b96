"""Equal seconds on NAS-Bench-201: what metrics cost is taken from what a search may train.

A search with metrics first computes them for a random pool of n networks and then trains 20 of it;
its rivals search all networks and train for the same seconds in all. Metric seconds are means of
those stored by NAS-Bench-Suite-Zero, training seconds those of 12 epochs: two different GPUs, both
their authors' own; zen has no stored time and counts as free.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from benchmarks import contract
from benchmarks.robot_pools import Table
from nas import pool as pools
from nas.pool import Array, Method, evolution, random, robot

QUERIES = 20
POOLS = (100, 250, 1000)
COUNTED = ("flops", "params")  # read off the architecture


def part(
    table: Table,
    seeds: Sequence[int],
    outcome: contract.Outcome,
    rows: contract.Rows | None,
    sizes: Sequence[int] = POOLS,
) -> None:
    """A line per pool size and method: test accuracy of the pick, seconds, queries."""
    lines = []
    for n in sizes:
        key = {"part": "clock", "pool": n, "seeds": [seeds[0], seeds[-1]]}
        found = rows.get(key) if rows else None
        if found is None:
            found = of_size(table, n, seeds)
            if rows:
                rows.add(key, found)
        for name, runs in found.items():
            truths, queries = np.array(runs).T
            figures = {"mean": truths.mean(), "std": truths.std(ddof=1), "worst": truths.min()}
            title = f"clock: pool of {n}: {name}"
            outcome.figures |= {f"{title}: {key}": value for key, value in figures.items()}
            shown = [f"{value:.2f}" for value in figures.values()]
            lines.append([n, name, *shown, f"{queries.mean():.0f}"])
    print(f"\nequal seconds: {metric_s(table):.1f} s for the metrics of a network")
    print(contract.table(["pool", "method", "mean", "std", "worst", "queries"], lines))


def metric_s(table: Table) -> float:
    """Seconds per network for every metric that is not read off the architecture."""
    assert table.proxy_s is not None
    each = [table.proxy_s.get(name, np.nan) for name in table.pool.names if name not in COUNTED]
    return float(np.nansum(each))


def of_size(table: Table, n: int, seeds: Sequence[int]) -> dict[str, list[tuple[float, int]]]:
    """(truth, queries) of every seed: metrics for n networks and their rivals."""
    rivals: dict[str, tuple[Table, Method]] = {
        "robot, counts alone": (counts_alone(table), robot.search),
        "random": (table, random.search),
        "evolution": (table, evolution.search),
    }
    found: dict[str, list[tuple[float, int]]] = {name: [] for name in ("robot", *rivals)}
    for seed in seeds:
        order = np.random.default_rng((seed, 41)).permutation(len(table.pool))
        small = table.take(np.sort(order[:n]))
        truth, seconds, queries = searched(small, robot.search, np.inf, QUERIES, seed)
        found["robot"].append((truth, queries))
        allowed = seconds + n * metric_s(table)
        for name, (whole, method) in rivals.items():
            truth, _, queries = searched(whole, method, allowed, len(table.pool), seed)
            found[name].append((truth, queries))
    return found


def counts_alone(table: Table) -> Table:
    at = [table.pool.names.index(name) for name in COUNTED]
    features: Array = table.pool.features[:, at]
    return replace(table, pool=replace(table.pool, features=features, names=COUNTED))


def searched(
    table: Table, method: Method, seconds: float, budget: int, seed: int
) -> tuple[float, float, int]:
    """(truth of the pick, seconds of training, queries) of a search that stops before the query
    that would take it beyond `seconds`."""
    assert table.train_s is not None
    search = pools.queries(method, table.pool, budget, seed)
    found: list[tuple[int, float]] = []
    row, spent = next(search), 0.0
    while not found or spent + table.train_s[row] <= seconds:
        spent += float(table.train_s[row])
        found.append((row, float(table.value[row])))
        try:
            row = search.send(found[-1][1])
        except StopIteration:
            break
    return float(table.truth[pools.best(found)]), spent, len(found)
