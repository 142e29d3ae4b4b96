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
from nas.pool import Array, Method, evolution, gp, random, robot

QUERIES = 20
POOLS = (100, 250, 1000)
COUNTED = ("flops", "params")  # read off the architecture


def part(table: Table, seeds: Sequence[int], outcome: contract.Outcome, *, quick: bool) -> None:
    """A line per pool size and method: test accuracy of the pick, seconds, queries."""
    assert table.train_s is not None and table.proxy_s is not None
    names = [name for name in table.pool.names if name not in COUNTED]
    each = float(np.nansum([table.proxy_s.get(name, np.nan) for name in names]))
    print(f"\nequal seconds: {each:.1f} s for the metrics of a network")
    rivals: dict[str, tuple[Table, Method]] = {
        "robot, counts alone": (counts_alone(table), robot.search),
        "random": (table, random.search),
        "evolution": (table, evolution.search),
        "gp": (table, gp.search),
    }
    lines = []
    for n in POOLS[:1] if quick else POOLS:
        results: dict[str, list[tuple[float, float]]] = {}
        for seed in seeds:
            order = np.random.default_rng((seed, 41)).permutation(len(table.pool))
            small = table.take(np.sort(order[:n]))
            truth, seconds, _ = searched(small, robot.search, np.inf, QUERIES, seed)
            allowed = seconds + n * each
            results.setdefault("robot, all metrics", []).append((truth, QUERIES))
            for name, (whole, method) in rivals.items():
                truth, _, queries = searched(whole, method, allowed, len(table.pool), seed)
                results.setdefault(name, []).append((truth, queries))
        for name, found in results.items():
            truths, queries = np.array(found).T
            figures = {"mean": truths.mean(), "std": truths.std(ddof=1), "worst": truths.min()}
            title = f"clock: pool of {n}: {name}"
            outcome.figures |= {f"{title}: {key}": value for key, value in figures.items()}
            shown = [f"{value:.2f}" for value in figures.values()]
            lines.append([n, name, *shown, f"{queries.mean():.0f}"])
    print(contract.table(["pool", "method", "mean", "std", "worst", "queries"], lines))


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
