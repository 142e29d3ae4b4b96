"""Whole-network latency on real measurements that nobody here made.

`part` is the share of benchmarks/latency.py that needs no machine but this one: one device from 30
to 900 measured networks, beside what a repeated measurement agrees to; an unseen device from 10 to
100, beside the baselines; what a search under a budget loses by it; sources unlike the target.
Columns that add up exactly are sums, not measurements: they are listed apart and claim nothing.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from dataclasses import astuple, dataclass, fields
from pathlib import Path

import numpy as np
import pyarrow.parquet as parquet
from scipy.stats import kendalltau, spearmanr
from sklearn.ensemble import HistGradientBoostingRegressor

from benchmarks import contract, latency_data
from benchmarks.latency_unseen import METHODS, Draw, Scores, Set, Unseen, load, strangers, unlike
from hw_profiles.latency import Array
from hw_profiles.models import predict
from hw_profiles.models.calibrate import Index

PREFIX = "public."
HELP_10 = (
    0.932  # mean Spearman of HELP (NeurIPS 2021) with 10 samples; its own devices and networks
)
SCORES = tuple(field.name for field in fields(Scores))


@dataclass(frozen=True)
class Effort:
    first: int  # networks of NAS-Bench-201
    other: int  # of each other family
    test: int  # networks
    sizes: tuple[int, ...]
    draws: int  # of the curve
    samples: tuple[int, ...]
    unseen_draws: int
    every: int  # 1: every device is fitted, and plays the unseen one; 4: each fourth
    unlike: bool


FULL = Effort(4000, 1500, 1500, (30, 100, 300, 900), 2, (10, 30, 100), 3, 1, True)
QUICK = Effort(200, 0, 100, (60,), 1, (20,), 1, 9, False)

Rows = dict[tuple[object, ...], Array]


def part(outcome: contract.Outcome, quick: bool) -> None:
    """Prints the tables and fills `public.*` of the outcome; without the data it says so."""
    if contract.data("hwnasbench") is None or contract.data("help_latency") is None:
        print("skipped: NASCTL_DATA has no hwnasbench and help_latency folders")
        return
    effort = QUICK if quick else FULL
    sets = list(families(Path(os.environ[contract.DATA]), effort))
    for data in sets:
        print(f"\n{data.family.name}: {len(data.rows)} networks, measured: {list(data.columns)}")
        print(f"sums, which prove nothing: {list(data.additive)}")
        ceilings(outcome, data)
        curve(outcome, data, effort)
    for data in sets:
        transfers(outcome, data, effort)
    if not quick:  # a few devices and one draw can neither meet nor miss an aim
        aims(outcome)


def families(root: Path, effort: Effort) -> Iterable[Set]:
    nb201 = latency_data.nb201_executed(root, effort.first)
    yield load(nb201, accuracies(root, nb201.index))
    if effort.other:
        yield load(latency_data.fbnet(root, effort.other))
        yield load(latency_data.ofa(root, effort.other))


def accuracies(root: Path, index: Index | None) -> Array | None:
    """Test accuracy on CIFAR-100 after 200 epochs, of NAS-Bench-201's networks."""
    path = root / "nb201_accuracy/nb201_accuracy.parquet"
    if index is None or not path.is_file():
        return None
    table = parquet.read_table(path, columns=["cifar100_hp200_test_acc"])
    return np.asarray(table.column(0), dtype=float)[index]


def agreement(one: Array, other: Array) -> tuple[float, float, float, float, float]:
    """(% within 5 %, % within 10 %, MAPE %, Spearman, Kendall)."""
    error = np.abs(one / other - 1)
    return (
        float(100 * (error < 0.05).mean()),
        float(100 * (error < 0.1).mean()),
        float(100 * error.mean()),
        float(spearmanr(one, other).statistic),
        float(kendalltau(one, other).statistic),
    )


AGREEMENT = ("within_5", "within_10", "mape", "spearman", "kendall")


def ceilings(outcome: contract.Outcome, data: Set) -> None:
    """How well a second measurement of the same networks agrees with the first."""
    rows: list[list[object]] = []
    for name, again in data.family.repeats.items():
        times = data.family.times.get(name)
        if times is None or name in data.additive:
            continue
        there = ~(np.isnan(times) | np.isnan(again))
        found = agreement(again[there], times[there])
        rows.append([name, *found])
        record(outcome, f"ceiling.{data.family.name}.{name}", AGREEMENT, found)
    if rows:
        print("\nnoise ceiling: the same networks measured on CIFAR-10 and on CIFAR-100")
        print(contract.table(("device", *AGREEMENT), rows))


def curve(outcome: contract.Outcome, data: Set, effort: Effort) -> None:
    """Error against the number of training networks, means of the draws."""
    rows: list[list[object]] = []
    for name in (*data.columns, *data.additive)[:: effort.every]:
        for size in effort.sizes:
            found = [
                one_device(data, name, size, seed, effort.test) for seed in range(effort.draws)
            ]
            mean = np.mean([scores for scores, _ in found], axis=0)
            methods = "/".join(sorted({method for _, method in found}))
            rows.append([name + " (sums)" * (name in data.additive), size, methods, *mean])
            key = "sums" if name in data.additive else "curve"
            names = (*AGREEMENT, "boosting_within_10", "macs_within_10")
            record(outcome, f"{key}.{data.family.name}.{name}.{size}", names, mean)
    print(f"\n{data.family.name}: one device, fitted on n networks, means of {effort.draws} draws")
    header = ("device", "n", "picked", *AGREEMENT, "boosting w10", "MACs w10")
    print(contract.table(header, rows))


def one_device(
    data: Set, name: str, size: int, seed: int, test_size: int
) -> tuple[list[float], str]:
    """(AGREEMENT of the predictor, then within_10 of two baselines; the method it picked)."""
    times = data.family.times[name]
    there = np.flatnonzero(~np.isnan(times))
    order = np.random.default_rng(seed).permutation(there)
    size = min(size, len(order) // 2)
    fit, test = order[:size], order[size : size + test_size]
    model = predict.fit(data.rows[fit], times[fit], np.random.default_rng(seed))
    boosting = HistGradientBoostingRegressor(random_state=0, min_samples_leaf=5)
    boosting.fit(data.rows[fit], np.log(times[fit]))
    macs = data.family.design.features[:, :, 1].sum(axis=1)
    slope, constant = np.polyfit(np.log(macs[fit]), np.log(times[fit]), 1)
    line = np.exp(constant + slope * np.log(macs[test]))
    scores = [
        *agreement(model.predict(data.rows[test]), times[test]),
        agreement(np.exp(boosting.predict(data.rows[test])), times[test])[1],
        agreement(line, times[test])[1],
    ]
    return scores, model.method


def transfers(outcome: contract.Outcome, data: Set, effort: Effort) -> None:
    """Every board as the unseen one, then every column from the half of boards least like it."""
    found: Rows = {}
    hard: Rows = {}
    for seed in range(effort.unseen_draws):
        draw = Draw(data, seed, effort.test)
        targets = [name for name in data.columns if strangers(data.columns, name)]
        for target in targets[:: effort.every]:
            collect(found, Unseen(draw, target, strangers(data.columns, target)), effort.samples)
        boards = {latency_data.board_of(name) for name in targets}
        if seed == 0 and effort.unlike and len(boards) >= 4:
            one, other, alike = unlike(draw)
            print(f"\nhalves least alike (mean Spearman {alike:.2f}): {one} | {other}")
            record(outcome, f"unlike.{data.family.name}", ("correlation",), (alike,))
            for names, target in [(one, name) for name in other] + [(other, name) for name in one]:
                collect(hard, Unseen(draw, target, names), effort.samples[:2])
    print_transfers(outcome, data, "unseen", found)
    if hard:
        print_transfers(outcome, data, "unlike", hard)


def collect(found: Rows, asked: Unseen, samples: Sequence[int]) -> None:
    for n in samples:
        for method in METHODS:
            scores = np.array([astuple(asked.scores(n, method))])
            key = (method, n, asked.target)
            found[key] = np.concatenate([found[key], scores]) if key in found else scores


def print_transfers(outcome: contract.Outcome, data: Set, name: str, found: Rows) -> None:
    """Per device means over draws, then per method their mean, the worst device and draw."""
    label = f"{name}.{data.family.name}"
    devices: list[list[object]] = []
    methods: list[list[object]] = []
    for method, n in dict.fromkeys((method, n) for method, n, _ in found):
        own = {key[2]: rows for key, rows in found.items() if key[:2] == (method, n)}
        means = np.array([rows.mean(axis=0) for rows in own.values()])
        for target, mean in zip(own, means, strict=True):
            if method == METHODS[0]:
                devices.append([target, n, *mean])
                record(outcome, f"{label}.{target}.{method}.{n}", SCORES, mean)
        worst_draw = min(float(rows[:, 0].min()) for rows in own.values())
        methods.append([method, n, *means.mean(axis=0), means[:, 0].min(), worst_draw])
        record(outcome, f"{label}.mean.{method}.{n}", SCORES, means.mean(axis=0))
        extremes = means[:, 0].min(), worst_draw, means[:, 1].min()
        record(outcome, f"{label}.worst.{method}.{n}", ("spearman", "draw", "within_10"), extremes)
    print(f"\n{label}, networks chosen by `transfer.choose`, per device")
    print(contract.table(("device", "n", *SCORES), devices))
    print(f"\n{label}, means over devices")
    print(contract.table(("method", "n", *SCORES, "worst device", "worst draw"), methods))


def record(
    outcome: contract.Outcome, label: str, names: Sequence[str], values: Sequence[float] | Array
) -> None:
    """Figures that do not apply (NaN) are left out."""
    for name, value in zip(names, values, strict=True):
        if np.isfinite(value):
            outcome.figures[f"{PREFIX}{label}.{name}"] = float(value)


def aims(outcome: contract.Outcome) -> None:
    """On NAS-Bench-201, each measured column unseen in turn."""
    aimed = (
        ("mean.chosen.30.spearman", "mean over devices >= 0.95", 0.95),
        ("worst.chosen.30.spearman", "worst device >= 0.90", 0.90),
        ("mean.chosen.30.within_10", "mean over devices >= 80 %", 80.0),
        ("mean.chosen.10.spearman", f"above HELP's mean, {HELP_10}", HELP_10),
        ("mean.chosen.30.careful_hit", "first picks with a margin inside the budget >= 90 %", 90.0),
    )
    for name, aim, least in aimed:
        got = outcome.figures.get(f"{PREFIX}unseen.nasbench201.{name}")
        if got is not None:
            outcome.aim(f"{PREFIX}{name}", aim, got, got >= least)
