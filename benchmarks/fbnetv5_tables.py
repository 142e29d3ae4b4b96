"""Parts `tables` and `dev` of the FBNetV5 benchmark: what is run and what is said about it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from benchmarks import contract, fbnetv5_runs, multitask_tables
from benchmarks.fbnetv5_runs import METHODS, Runs
from benchmarks.multitask_tables import Table
from nas.mixture import Array

BUDGETS = (32, 64, 128, 256)
MAIN = 128  # networks: the aims are judged at this budget
SEEDS = range(1000, 1050)
DEVELOPMENT_SEEDS = range(20)
LANDSCAPES = 3
LEVELS = (50, 20, 10, 5)  # geometric mean ranks that queries are counted to
MOST_REGRET = 1.2  # of the one run, as a multiple of T full searches'
DRAWS = 2000  # of the bootstrap over seeds


@dataclass(frozen=True)
class Bench:
    """One run of the benchmark."""

    folder: Path
    outcome: contract.Outcome
    rows: contract.Rows | None
    quick: bool

    def all_methods(self, table: Table, budget: int, seeds: range) -> dict[str, Runs]:
        return {
            method: fbnetv5_runs.runs(table, method, budget, seeds, self.rows) for method in METHODS
        }


def reported(bench: Bench) -> None:
    """The micro space, at every budget; aims at the main one."""
    table = multitask_tables.transnas(bench.folder, "micro")
    seeds = SEEDS[:3] if bench.quick else SEEDS
    shared = table.best_shared()
    ranks = table.ranks[shared]
    print(f"{table.name}: {len(table.values)} networks, {len(seeds)} seeds")
    print(f"best shared network (known only to the table): rank {ranks} on {table.tasks}")
    bench.outcome.figures["best shared: mean rank"] = float(ranks.mean())
    for budget in (32, 64) if bench.quick else BUDGETS:
        found = bench.all_methods(table, budget, seeds)
        _show(bench, f"{table.name}, {budget} queries", found)
        if budget == (64 if bench.quick else MAIN):
            _aims(bench, found, float(ranks.mean()))
        if budget == max(BUDGETS):
            _queries(bench, found)


def development(bench: Bench) -> None:
    """Where settings were chosen: nothing found here is a result."""
    tables = [multitask_tables.transnas(bench.folder, "macro")]
    tables += [multitask_tables.landscape(seed) for seed in range(LANDSCAPES)]
    seeds = DEVELOPMENT_SEEDS[:3] if bench.quick else DEVELOPMENT_SEEDS
    for table in tables:
        for budget in (64, MAIN):
            found = bench.all_methods(table, budget, seeds)
            _show(bench, f"development: {table.name}, {budget} queries", found)


def _show(bench: Bench, title: str, found: dict[str, Runs]) -> None:
    """A line per method and the figures."""
    print(f"\n{title}")
    lines = []
    for method, runs in found.items():
        ranks, regrets = runs.ranks(), runs.regrets()
        per_seed = ranks.mean(1)
        row = {
            "mean rank": float(ranks.mean()),
            "deviation over seeds": float(per_seed.std(ddof=1)),
            "worst": float(ranks.max()),
            "rank (geo)": float(np.exp(np.log(ranks).mean())),
            "regret": float(regrets.mean()),
            "effective": runs.mean("effective"),
            "entropy": runs.mean("entropy"),
        }
        bench.outcome.figures |= {f"{title}: {method}: {key}": v for key, v in row.items()}
        lines.append([method, *row.values(), " ".join(f"{v:.1f}" for v in ranks.mean(0))])
    print(contract.table(["method", *row, "per task"], lines))


def _aims(bench: Bench, found: dict[str, Runs], shared: float) -> None:
    ours = found["one run"].ranks().mean()
    parts = found["T searches of 1/T"].ranks().mean()
    outcome = bench.outcome
    outcome.aim("beats_best_shared", f"mean rank < {shared:.1f}", ours, ours < shared)
    outcome.aim("beats_divided", f"mean rank < {parts:.1f}", ours, ours < parts)
    blind = found["random, all tasks"].ranks().mean()
    outcome.aim("beats_random", f"mean rank < {blind:.1f}", ours, ours < blind)
    one, full = found["one run"].regrets(), found["T full searches"].regrets()
    ratio = float(one.mean() / full.mean())
    low, high = np.percentile(_ratios(one.mean(1), full.mean(1)), (5, 95))
    print(f"regret of one run / of T full searches: {ratio:.2f} (90 %: {low:.2f} to {high:.2f})")
    outcome.figures |= {"regret ratio: low": float(low), "regret ratio: high": float(high)}
    outcome.aim("regret_ratio", f"<= {MOST_REGRET} of T full", ratio, ratio <= MOST_REGRET)


def _ratios(one: Array, full: Array) -> Array:
    """Ratio of means under resampled seeds [DRAWS]; the two runs of a seed share nothing."""
    rng = np.random.default_rng(53)
    a, b = (v[rng.integers(0, len(v), (DRAWS, len(v)))].mean(1) for v in (one, full))
    return a / b


def _queries(bench: Bench, found: dict[str, Runs]) -> None:
    """Networks trained in all until the geometric mean rank is at a level, in plans of the largest
    budget; a search per task counts T times."""
    budget = max(BUDGETS)
    print(f"\nqueries in all to a geometric mean rank, plans of {budget}")
    tasks = len(found["one run"].table.tasks)
    times = {"one run": 1, "T full searches": tasks, "random, all tasks": 1}
    lines = []
    for method, factor in times.items():
        curve = [np.exp(np.log(found[method].ranks(q)).mean()) for q in range(1, budget + 1)]
        needed = {level: _first(curve, level) for level in LEVELS}
        lines.append([method, *(n * factor if n else "never" for n in needed.values())])
        bench.outcome.figures |= {
            f"queries to rank {level}: {method}": float(n * factor) if n else float("nan")
            for level, n in needed.items()
        }
    print(contract.table(["method", *map(str, LEVELS)], lines))


def _first(curve: list[float], level: float) -> int | None:
    return next((at + 1 for at, rank in enumerate(curve) if rank <= level), None)
