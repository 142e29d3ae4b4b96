"""An unseen device, from few measurements: the methods, the baselines and what a search loses.

One `Draw` splits the networks of a family: `source` were measured on the source devices, some of
them are measured on the new device too, and `test` were measured nowhere. The columns of the new
device's board are no sources for it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray
from scipy.stats import spearmanr

from benchmarks.latency_data import Family, board_of
from hw_profiles.latency import Array
from hw_profiles.models import predict, transfer
from hw_profiles.models.calibrate import Index
from hw_profiles.models.structure import MEASURES, ROLES, describe
from hw_profiles.models.transfer import Source, Sources

Side = NDArray[np.bool_]  # which boards are in the first group

SOURCE_NETWORKS = 900
CHOICE_POOL = 600  # source networks that `transfer.choose` may choose among
BUDGETS = (0.1, 0.25, 0.5, 0.75, 0.9)  # quantiles of the true latencies of the test networks
CAUTION = 1.2816  # deviations above the estimate: the upper end of an 80 % interval
METHODS = ("chosen", "random", "nearest", "ridge", "macs")  # the first two are ours


@dataclass(frozen=True)
class Set:
    """A family, described once."""

    family: Family
    rows: Array
    columns: tuple[str, ...]  # measured ones: neither sums of blocks nor exactly additive
    additive: tuple[str, ...]  # the others
    accuracy: Array | None = None  # of each network, in %


@dataclass(frozen=True)
class Scores:
    """Of one method on one device; shares and accuracies in %."""

    spearman: float
    within_10: float
    within_5: float
    covered: float  # by the 90 % interval; NaN for a method without one
    hit: float  # how often the first pick keeps the budget
    regret: float  # accuracy lost by the pick, after picks that miss the budget are passed over
    careful_hit: float  # the two of a pick whose upper bound keeps the budget
    careful_regret: float


@dataclass(frozen=True)
class Draw:
    """Which networks were measured where, and the predictors of the sources."""

    data: Set
    seed: int
    test_size: int

    @cached_property
    def parts(self) -> tuple[Index, Index]:
        order = np.random.default_rng(self.seed).permutation(len(self.data.rows))
        at = min(SOURCE_NETWORKS, len(order) // 2)
        return order[:at], order[at : at + self.test_size]

    @cached_property
    def sources(self) -> dict[str, Source]:
        known, _ = self.parts
        rng = np.random.default_rng(self.seed)
        return {
            name: transfer.source(
                name,
                board_of(name),
                self.data.rows[known],
                self.data.family.times[name][known],
                rng,
            )
            for name in self.data.columns
        }

    @cached_property
    def logs(self) -> dict[str, Array]:
        """Each source's predictions for all networks: they cost most of the time."""
        return {name: source.model(self.data.rows) for name, source in self.sources.items()}


def additive_columns(family: Family) -> tuple[str, ...]:
    """Columns that a sum over operators reproduces to 0.5 % on networks it was not fitted on: no
    measurement does that, a simulator or a table of blocks does."""
    kinds = {op: at for at, op in enumerate(dict.fromkeys(op for ops in family.ops for op in ops))}
    counts = np.zeros((len(family.ops), len(kinds) + 1))
    counts[:, -1] = 1
    for row, ops in zip(counts, family.ops, strict=True):
        np.add.at(row, [kinds[op] for op in ops], 1)
    found = []
    for name, times in family.times.items():
        there = np.flatnonzero(~np.isnan(times))
        fit, test = there[::2], there[1::2]
        weights = np.linalg.lstsq(counts[fit], times[fit], rcond=None)[0]
        errors = np.abs(counts[test] @ weights / times[test] - 1)
        if np.quantile(errors, 0.95) < 0.005:
            found.append(name)
    return tuple(found)


def load(family: Family, accuracy: Array | None = None) -> Set:
    additive = tuple(sorted({*additive_columns(family), *family.sums}))
    columns = tuple(name for name in family.times if name not in additive)
    return Set(family, describe(family.ops), columns, additive, accuracy)


def strangers(columns: Sequence[str], target: str) -> tuple[str, ...]:
    """Those of other boards than the target's."""
    return tuple(name for name in columns if board_of(name) != board_of(target))


@dataclass(frozen=True)
class Unseen:
    """One device that the named sources are to explain."""

    draw: Draw
    target: str
    names: tuple[str, ...]

    @property
    def rows(self) -> Array:
        return self.draw.data.rows

    @property
    def times(self) -> Array:
        return self.draw.data.family.times[self.target]

    @cached_property
    def known(self) -> Index:
        """Source networks that run on the target."""
        known, _ = self.draw.parts
        return known[~np.isnan(self.times[known])]

    @cached_property
    def test(self) -> Index:
        _, test = self.draw.parts
        return test[~np.isnan(self.times[test])]

    @cached_property
    def sources(self) -> Sources:
        devices = [self.draw.sources[name] for name in self.names]
        return transfer.learn(devices, np.random.default_rng(self.draw.seed))

    @cached_property
    def order(self) -> Index:
        """The networks to measure first."""
        pool = self.known[:CHOICE_POOL]
        return pool[transfer.choose(self.sources, self.rows[pool], min(100, len(pool)))]

    @cached_property
    def blocks(self) -> list[Array]:
        logs = np.column_stack([self.draw.logs[name][self.test] for name in self.names])
        return self.sources.blocks(self.rows[self.test], logs)

    def samples(self, n: int, method: str) -> Index:
        if method == "chosen":
            return self.order[:n]
        rng = np.random.default_rng((self.draw.seed, n))
        return rng.permutation(self.known)[:n]

    def predictions(self, n: int, method: str) -> tuple[Array, Array]:
        """(ms, deviation of their logarithm) of the test networks; NaN without one."""
        some = self.samples(n, method)
        if method in ("chosen", "random"):
            adapted = transfer.adapt(self.sources, self.rows[some], self.times[some])
            return adapted.predict_blocks(self.blocks)
        log_ms = np.log(self.times[some])
        ms = np.exp(BASELINES[method](self, some, log_ms))
        return ms, np.full(len(ms), np.nan)

    def scores(self, n: int, method: str) -> Scores:
        ms, deviation = self.predictions(n, method)
        true = self.times[self.test]
        error = np.abs(ms / true - 1)
        covered = np.abs(np.log(true / ms)) < 1.645 * deviation
        accuracy = self.draw.data.accuracy
        picks, careful = (np.nan, np.nan), (np.nan, np.nan)
        if accuracy is not None:
            picks = picked(ms, true, accuracy[self.test])
            upper = ms * np.exp(CAUTION * np.nan_to_num(deviation))
            careful = picked(upper, true, accuracy[self.test])
        return Scores(
            spearman=float(spearmanr(ms, true).statistic),
            within_10=float(100 * (error < 0.1).mean()),
            within_5=float(100 * (error < 0.05).mean()),
            covered=float(100 * covered.mean()) if np.isfinite(deviation).all() else np.nan,
            hit=picks[0],
            regret=picks[1],
            careful_hit=careful[0],
            careful_regret=careful[1],
        )


def picked(ms: Array, true: Array, accuracy: Array) -> tuple[float, float]:
    """(% of budgets that the first pick keeps, accuracy lost on average).

    The pick is the most accurate network predicted to be within the budget. One that turns out to
    miss it is passed over for the next, so that what is lost is never hidden by a broken budget;
    when none is left, the fastest-looking of the others follow.
    """
    hits, losses = [], []
    for budget in np.quantile(true, BUDGETS):
        best = accuracy[true <= budget].max()
        order = np.lexsort((np.where(ms <= budget, -accuracy, ms), ms > budget))
        kept = true[order] <= budget
        hits.append(kept[0])
        losses.append(best - accuracy[order[kept.argmax()]])
    return float(100 * np.mean(hits)), float(np.mean(losses))


def _nearest(unseen: Unseen, some: Index, log_ms: Array) -> Array:
    """The predictor of the source whose predictions go best with the samples, on a fitted line."""
    logs = unseen.draw.logs
    name = max(unseen.names, key=lambda one: spearmanr(logs[one][some], log_ms).statistic)
    return _line(logs[name][some], log_ms, logs[name][unseen.test])


def _macs(unseen: Unseen, some: Index, log_ms: Array) -> Array:
    sums = unseen.rows[:, : len(ROLES) * len(MEASURES)]
    gmacs = np.log(sums[:, MEASURES.index("gmacs") :: len(MEASURES)].sum(axis=1))
    return _line(gmacs[some], log_ms, gmacs[unseen.test])


def _line(x: Array, y: Array, asked: Array) -> Array:
    slope, constant = np.polyfit(x, y, 1)
    return constant + slope * asked


def _ridge(unseen: Unseen, some: Index, log_ms: Array) -> Array:
    return predict.ridge(unseen.rows[some], log_ms)(unseen.rows[unseen.test])


BASELINES: dict[str, Callable[[Unseen, Index, Array], Array]] = {
    "nearest": _nearest,
    "ridge": _ridge,
    "macs": _macs,
}


def unlike(draw: Draw, least: int = 3) -> tuple[tuple[str, ...], tuple[str, ...], float]:
    """The columns in two groups of boards, at least so many each (fewer where there are not twice
    as many), whose mean Spearman correlation across is lowest: as NAS-FLAT builds its hard device
    sets (Akhauri and Abdelfattah, MLSys 2024), here by descent from every board and 20 random
    starts. Returns (one, other, the correlation)."""
    known, _ = draw.parts
    names = draw.data.columns
    times = np.array([draw.data.family.times[name][known] for name in names])
    both = ~np.isnan(times).any(axis=0)
    alike = spearmanr(times[:, both], axis=1).statistic
    boards = list(dict.fromkeys(map(board_of, names)))
    of = np.array([boards.index(board_of(name)) for name in names])
    least = min(least, len(boards) // 2)

    def across(side: Side) -> float:
        inside = side[of]
        if min(side.sum(), (~side).sum()) < least:
            return np.inf
        return float(alike[np.ix_(inside, ~inside)].mean())

    rng = np.random.default_rng(0)
    starts = [rng.permutation(len(boards)) < len(boards) // 2 for _ in range(20 + len(boards))]
    value, side = min((_descend(start, across) for start in starts), key=lambda found: found[0])
    groups = [tuple(np.array(names)[side[of] == which].tolist()) for which in (True, False)]
    return groups[0], groups[1], value


def _descend(side: Side, across: Callable[[Side], float]) -> tuple[float, Side]:
    """Moves one board, or swaps two, while that lowers the correlation across."""
    value = across(side)
    while True:
        moves = [np.arange(len(side)) == a for a in range(len(side))]
        swaps = [a | b for a in moves for b in moves if (side[a] != side[b]).all()]
        best = min((side ^ move for move in moves + swaps), key=across)
        if across(best) >= value:
            return value, side
        value, side = across(best), best
