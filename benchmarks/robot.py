"""Searching pools of networks with cheap features known: RoBoT, ours and every baseline.

Parts: `nb201` (CIFAR-10 and CIFAR-100, 20 and 50 queries, published rows beside ours), `headline`
(geometric mean true rank after 20 queries over every pool, random 80 % sub-pools, paired tests),
`latency` (accuracy under a TX2's latency budget), `clock` (equal seconds, metrics charged).

`python -m benchmarks.robot [--quick] [--save] [--parts nb201,headline]`. Rows are kept in
benchmarks/results/robot.rows.jsonl as they finish. How settings were chosen: docs/methods/robot.md.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq

from benchmarks import contract, robot_clock, robot_pools
from benchmarks.robot_pools import Table
from benchmarks.robot_runs import ALONE, Runs, Setting, names, run, worse

OURS = "robot"
DETERMINISTIC = ("robot", "walk")  # on one and the same pool
#: must be beaten; `forest` is GRAF's
RIVALS = ("random", "walk", "gp", "forest", f"{ALONE}params")
#: the six that RoBoT was published with
PUBLISHED_METRICS = ("fisher", "grad_norm", "grasp", "jacov", "snip", "synflow")
#: test accuracy on CIFAR-10 and CIFAR-100 as printed by RoBoT's authors (ICLR 2024), who take REA,
#: random search and REINFORCE from Dong and Yang 2020, at 12,000 s (about 110 queries)
PUBLISHED = {
    "RoBoT": (94.36, 73.51),
    "REA": (93.92, 71.84),
    "random search": (93.70, 71.04),
    "REINFORCE": (93.85, 71.71),
    "HNAS": (94.04, 71.75),
}
AIMS = {"nasbench201-live/cifar10": 94.0, "nasbench201-live/cifar100": 72.3}
SHARE = 0.8
FIRST = 1000  # of the seeds that are reported; those below 50 chose the settings
LATENCY_SHARE = 0.5  # of the networks are inside the budget


class Bench:
    """One run of the benchmark: tables, kept rows, sizes and what was found."""

    def __init__(self, root: Path, outcome: contract.Outcome, *, quick: bool) -> None:
        self.root, self.outcome, self.quick = root, outcome, quick
        self.tables = robot_pools.load(root)
        path = contract.RESULTS / "robot.rows.jsonl"
        self.rows = None if quick else contract.Rows(path)
        self.seeds = tuple(range(FIRST, FIRST + (3 if quick else 50)))

    def methods(self, table: Table) -> list[str]:
        """All of them; the fast ones alone when a quick run was asked for."""
        slow = {"bananas", "forest", "gp", "robot-paper"} if self.quick else set()
        return [name for name in names(table) if name not in slow]

    def run(self, table: Table, name: str, budget: int, share: float = 1.0) -> Runs:
        """One seed where nothing is random."""
        seeds = self.seeds[:1] if share == 1 and name in DETERMINISTIC else self.seeds
        return run(table, name, Setting(budget, seeds, share), self.rows)


def main(argv: list[str] | None = None) -> int:
    parser = contract.parser(__doc__)
    parser.add_argument("--parts", default=",".join(PARTS), help=f"[{','.join(PARTS)}]")
    arguments = parser.parse_args(argv)
    outcome = contract.Outcome("robot")
    folders = ("nb201_accuracy", "nb201_zerocost", "nbsuitezero_subset", "transnasbench101")
    absent = [folder for folder in folders if contract.data(folder) is None]
    if absent:
        return outcome.skip(f"NASCTL_DATA/{absent[0]} is absent")
    bench = Bench(Path(os.environ[contract.DATA]), outcome, quick=arguments.quick)
    for part in arguments.parts.split(","):
        PARTS[part](bench)
    return outcome.finish(arguments.save)


# ---- NAS-Bench-201 -------------------------------------------------------------------------------


def nb201(bench: Bench) -> None:
    """All methods with thirteen metrics on sub-pools; on the whole pool the published ones with
    their six metrics beside ours (which has no randomness there: one seed says it all)."""
    for table in (table for table in bench.tables if table.name.startswith("nasbench201-live")):
        for budget in (20,) if bench.quick else (20, 50):
            found = {name: bench.run(table, name, budget, SHARE) for name in bench.methods(table)}
            show(bench, f"{table.name}, 80 %, {budget} queries", found)
            if budget == 20 and table.name in AIMS:
                _aim_accuracy(bench, table, found)
            show(bench, f"{table.name}, whole, {budget} queries", _whole(bench, table, budget))


def _whole(bench: Bench, table: Table, budget: int) -> dict[str, Runs]:
    six = metrics_of(table, PUBLISHED_METRICS)
    published = [n for n in ("robot-paper", "walk", OURS) if n in bench.methods(table)]
    found = {f"{name}, six metrics": bench.run(six, name, budget) for name in published}
    rest = {name: bench.run(table, name, budget) for name in ("random", OURS)}
    return {**found, **rest}


def _aim_accuracy(bench: Bench, table: Table, found: dict[str, Runs]) -> None:
    """Ours on average, and its worst seed against random search's mean."""
    ours, least = found[OURS].truth, AIMS[table.name]
    bench.outcome.aim(f"{table.name}_mean", f">= {least}", ours.mean(), ours.mean() >= least)
    rival = found["random"].truth.mean()
    bench.outcome.aim(f"{table.name}_worst", f"> {rival:.2f}", ours.min(), ours.min() > rival)
    at = list(AIMS).index(table.name)
    print("published: " + ", ".join(f"{name} {row[at]}" for name, row in PUBLISHED.items()))


def metrics_of(table: Table, wanted: Sequence[str]) -> Table:
    """The table with these metrics alone, as many of them as it has."""
    at = [table.pool.names.index(name) for name in wanted if name in table.pool.names]
    kept = tuple(table.pool.names[column] for column in at)
    pool = replace(table.pool, features=table.pool.features[:, at], names=kept)
    return replace(table, pool=pool)


def show(bench: Bench, title: str, found: dict[str, Runs]) -> None:
    """A line per method, best mean truth first, and the figures."""
    print(f"\n{title}, {len(bench.seeds)} seeds")
    lines = []
    for name, runs in sorted(found.items(), key=lambda item: -item[1].truth.mean()):
        truth = runs.truth
        spread = truth.std(ddof=1) if len(truth) > 1 else 0.0
        row = {"mean": truth.mean(), "std": spread, "worst": truth.min()}
        row |= {"regret": runs.regret.mean(), "rank": runs.geometric}
        bench.outcome.figures |= {f"{title}: {name}: {key}": value for key, value in row.items()}
        lines.append([name, *(f"{value:.2f}" for value in row.values())])
    print(contract.table(["method", "mean", "std", "worst", "regret", "rank (geo)"], lines))


# ---- every pool ----------------------------------------------------------------------------------


def headline(bench: Bench) -> None:
    """Geometric mean true rank at 20 queries, per family and over all; paired tests of ours."""
    tables = bench.tables[:6] if bench.quick else bench.tables
    found: dict[str, dict[str, Runs]] = {}
    for table in tables:
        for name in bench.methods(table):
            found.setdefault(name, {})[table.name] = bench.run(table, name, 20, SHARE)
    families = sorted({table.family for table in tables})
    of = {table.name: table.family for table in tables}
    lines = []
    for name, runs in sorted(found.items(), key=lambda item: _geometric(item[1].values())):
        every = _geometric(runs.values())
        groups = {each: [r for key, r in runs.items() if of[key] == each] for each in families}
        per = {each: _geometric(group) for each, group in groups.items() if group}
        arithmetic = float(np.mean([r.rank.mean() for r in runs.values()]))
        cells = [f"{value:.2f}" for value in (every, arithmetic)]
        cells += [f"{per[each]:.2f}" if each in per else "" for each in families]
        lines.append([name, *cells, len(runs)])
        bench.outcome.figures[f"headline: {name}: rank"] = every
        bench.outcome.figures[f"headline: {name}: arithmetic"] = arithmetic
        bench.outcome.figures |= {f"headline: {name}: {k}": v for k, v in per.items()}
    print(f"\nheadline: {len(tables)} pools, {len(bench.seeds)} sub-pools each, 20 queries")
    print(contract.table(["method", "geo", "mean", *families, "pools"], lines))
    for name in (name for name in found if name != OURS):
        shared = list(found[name])
        ours = [found[OURS][key] for key in shared]
        p, p_tables = worse(ours, list(found[name].values()))
        better = _geometric(ours) < _geometric(found[name].values())
        bench.outcome.figures[f"headline: p against {name}"] = p
        bench.outcome.figures[f"headline: p by pools against {name}"] = p_tables
        if name in RIVALS:
            aim = "better, p < .05 over runs"
            bench.outcome.aim(f"headline_beats_{name}", aim, p, better and p < 0.05)
    for table in tables:
        picked = {name: runs[table.name] for name, runs in found.items() if table.name in runs}
        show(bench, f"{table.name} (80 % of {len(table.pool)}), 20 queries", picked)


def _geometric(some: Iterable[Runs]) -> float:
    return float(np.exp(np.mean([np.log(runs.rank).mean() for runs in some])))


# ---- a latency budget, a wall clock --------------------------------------------------------------


def latency(bench: Bench) -> None:
    """CIFAR-10 on a Jetson TX2 (HW-NAS-Bench): the pool is what is inside the budget, latency is a
    feature more, and the optimum of that pool is known."""
    folder = contract.data("hwnasbench")
    if folder is None:
        print("part latency skipped: NASCTL_DATA/hwnasbench is absent")
        return
    column = "cifar10_edgegpu_latency_ms"
    file = folder / "nb201_hw.parquet"
    measured = pq.read_table(file, columns=["arch_index", column]).to_pydict()
    by_index = dict(zip(measured["arch_index"], measured[column], strict=True))
    table = bench.tables[0]
    ms = np.array([by_index[int(index)] for index in table.pool.ids])
    budget_ms = float(np.quantile(ms, LATENCY_SHARE))
    part = table.take(np.flatnonzero(ms <= budget_ms))
    with_latency = replace(
        part.pool,
        features=np.column_stack([part.pool.features, ms[ms <= budget_ms]]),
        names=(*part.pool.names, "latency"),
    )
    part = replace(part, pool=with_latency)
    for budget in (20,) if bench.quick else (20, 50):
        found = {name: bench.run(part, name, budget, SHARE) for name in bench.methods(part)}
        title = f"TX2 within {budget_ms:.2f} ms, {budget} queries, {len(part.pool)} networks"
        show(bench, title, found)


def clock(bench: Bench) -> None:
    sizes = robot_clock.POOLS[:1] if bench.quick else robot_clock.POOLS
    robot_clock.part(bench.tables[0], bench.seeds, bench.outcome, bench.rows, sizes)


PARTS: dict[str, Callable[[Bench], None]] = {
    "headline": headline,
    "clock": clock,
    "nb201": nb201,
    "latency": latency,
}

if __name__ == "__main__":
    sys.exit(main())
