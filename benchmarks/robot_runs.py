"""Runs of pool searches that survive a kill, and what is said about them.

A run is stored as the rows that were picked, under a digest of everything that they depend on but
the method's code; ranks, regrets and accuracies are derived. So two data sets that differ only in
what is reported share their runs.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats

from benchmarks import contract
from benchmarks.robot_pools import Table
from nas import pool as pools
from nas.pool import Array, Method, single

ALONE = "alone: "


@dataclass(frozen=True)
class Setting:
    """`share` of the pool, drawn anew for every seed."""

    budget: int
    seeds: tuple[int, ...]
    share: float = 1.0


@dataclass(frozen=True)
class Runs:
    """Of one method on one table, one entry per seed [S]."""

    rank: Array  # true rank of the pick among the networks that the run saw
    truth: Array
    regret: Array  # best truth that the run could have found, minus the pick's

    @property
    def geometric(self) -> float:
        """Geometric mean of the ranks."""
        return float(np.exp(np.log(self.rank).mean()))


def method(name: str) -> Method:
    """A file of nas/pool, or one feature alone."""
    if name.startswith(ALONE):
        return single.by(name.removeprefix(ALONE))
    return pools.load(name)


def names(table: Table) -> list[str]:
    """Every method that the table allows."""
    return [*pools.names(), *(ALONE + feature for feature in table.pool.names)]


def seen(table: Table, setting: Setting, seed: int) -> Table:
    """The part of a table that the run of this seed sees."""
    if setting.share == 1:
        return table
    order = np.random.default_rng((seed, 40)).permutation(len(table.pool))
    return table.take(np.sort(order[: int(setting.share * len(order))]))


def run(table: Table, name: str, setting: Setting, rows: contract.Rows | None) -> Runs:
    """The runs of all seeds: from the file of rows if there is one and they are there, else now."""
    key = {
        "pool": digest(table),
        "method": name,
        "budget": setting.budget,
        "seeds": [setting.seeds[0], setting.seeds[-1]],
        "share": setting.share,
    }
    kept = rows.get(key) if rows else None
    if kept is None:
        began = time.perf_counter()
        picks = [
            _pick(seen(table, setting, seed), name, setting.budget, seed) for seed in setting.seeds
        ]
        took = (time.perf_counter() - began) / len(picks)
        kept = {"table": table.name, "picks": picks, "seconds_per_run": round(took, 4)}
        if rows:
            rows.add(key, kept)
    judged = []
    for seed, pick in zip(setting.seeds, kept["picks"], strict=True):
        part = seen(table, setting, seed)
        truth = float(part.truth[pick])
        judged.append((part.rank(pick), truth, float(part.truth.max()) - truth))
    return Runs(*np.array(judged).T)


def _pick(part: Table, name: str, budget: int, seed: int) -> int:
    found = pools.run(method(name), part.pool, lambda row: part.value[row], budget, seed)
    return pools.best(found)


def digest(table: Table) -> str:
    """Of what a search sees and is answered; not of what it is judged by."""
    pool, whole = table.pool, hashlib.sha256()
    for part in (pool.features, pool.encoding, pool.graph, pool.ids, table.value):
        whole.update(np.ascontiguousarray(part).tobytes())
    return whole.hexdigest()[:16]


def worse(ours: Sequence[Runs], rival: Sequence[Runs]) -> tuple[float, float]:
    """One-sided p that `ours` ranks better than `rival` (Wilcoxon, paired, logarithms of ranks):
    over every run, and over the tables' means, which takes tables and not runs as the sample."""
    gains = [np.log(b.rank) - np.log(a.rank) for a, b in zip(ours, rival, strict=True)]
    return _wilcoxon(np.concatenate(gains)), _wilcoxon(np.array([gain.mean() for gain in gains]))


def _wilcoxon(gains: Array) -> float:
    if not gains.any():
        return 1.0
    return float(stats.wilcoxon(gains, alternative="greater").pvalue)
