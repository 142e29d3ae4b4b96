"""Candidates per second of the search's inner loop against a per-candidate walk over the network.

The inner loop is the default strategy's `propose` as the search runs it: make a pool, look up every
latency, judge and fit the predictor, predict every cross-entropy, pick a generation. The walk does
the same for one candidate at a time the way published latency tables are used: decode, enumerate
the operators, look each one up in a dictionary of floats, sum; its prediction is batched like ours.
Both in one process, alternating, so that the machine's mood cancels.
"""

from __future__ import annotations

import sys
import time

import numpy as np

from benchmarks import contract
from hw_profiles import device, latency
from hw_profiles.latency import LatencyTable
from nas import pareto, space
from nas.predictors import ensemble
from nas.search import Candidate, Problem
from nas.space import SearchSpace
from nas.strategies import predictor

HISTORY = 64  # evaluated networks that the predictor is fitted on


def main(argv: list[str] | None = None) -> int:
    arguments = contract.parser(__doc__).parse_args(argv)
    outcome = contract.Outcome("search_throughput")
    repeats, walked = (1, 20) if arguments.quick else (9, 1000)
    table = latency.table(device.load("jetson-tx2"))
    rows = []
    for name in space.names():
        found = space.load(name, channels=3, classes=10, size=32)
        loop, walk, compile_s = measure(found, name, table, repeats, walked)
        ratio = np.array(loop) / np.array(walk)
        rows.append([name, np.median(loop), np.median(walk), np.median(ratio), compile_s])
        outcome.figures[f"{name}_candidates_per_s"] = float(np.median(loop))
        outcome.figures[f"{name}_walk_per_s"] = float(np.median(walk))
        outcome.figures[f"{name}_ratio"] = float(np.median(ratio))
        outcome.figures[f"{name}_ratio_worst"] = float(ratio.min())
        outcome.figures[f"{name}_compile_s"] = compile_s
    header = ["space", "inner loop /s", "walk /s", "ratio", "compile s (once)"]
    print(contract.table(header, rows))
    worst = min(row[3] for row in rows)
    outcome.aim("ratio", ">= 100 in every space", float(worst), worst >= 100)
    return outcome.finish(arguments.save)


def measure(
    found: SearchSpace, name: str, table: LatencyTable, repeats: int, walked: int
) -> tuple[list[float], list[float], float]:
    """(inner loop candidates/s, walk candidates/s) per repeat, and the seconds to compile."""
    began = time.perf_counter()
    columns = found.fold(table.columns)
    compile_s = time.perf_counter() - began

    def latencies(genes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        value, _, high = table.combine(columns(genes), name)
        return value, high

    problem = Problem(found, latencies, lambda genes: (0.0, 0.0), budget_ms=None)
    history = evaluated(problem)
    seen: list[int] = []  # rows looked up per call; the last is the pool that was scored

    def counted(genes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        seen.append(len(genes))
        return latencies(genes)

    counting = Problem(found, counted, problem.evaluate)
    loop, walk = [], []
    for repeat in range(repeats):
        began = time.perf_counter()
        predictor.propose(counting, 1 + repeat, history)
        loop.append(seen[-1] / (time.perf_counter() - began))
        walk.append(walk_rate(found, name, table, history, walked))
    return loop, walk, compile_s


def evaluated(problem: Problem) -> list[Candidate]:
    """A made-up history: its values only have to be finite, nothing here depends on them."""
    rng = np.random.default_rng(0)
    rows = problem.space.sample(rng, HISTORY)
    value, high = problem.latency(rows)
    return [
        Candidate(slot, tuple(row), float(v), float(h), float(ce), 0.5)
        for slot, (row, v, h, ce) in enumerate(
            zip(rows.tolist(), value, high, rng.random(HISTORY), strict=True)
        )
    ]


def walk_rate(
    found: SearchSpace, name: str, table: LatencyTable, history: list[Candidate], n: int
) -> float:
    """Candidates per second one at a time, each operator's time already in a dictionary."""
    rng = np.random.default_rng(1)
    pool = found.sample(rng, n)
    known = {op: float(table.columns(op).sum()) for g in pool for op in found.ops(found.decode(g))}
    features = found.encode(np.array([c.genes for c in history]))
    predict = ensemble.fit(features, np.array([c.cross_entropy for c in history]))
    began = time.perf_counter()
    times = [sum(known[op] for op in found.ops(found.decode(row))) for row in pool]
    mean, _ = predict(found.encode(pool))  # in one batch: only the walk is held against us
    pareto.front(np.column_stack([times, mean]))
    return n / (time.perf_counter() - began)


if __name__ == "__main__":
    sys.exit(main())
