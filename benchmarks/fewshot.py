"""A new device's latency table from 30 networks and other devices' tables (public measurements).

What `nasctl profile --from` does, on HW-NAS-Bench and HELP: every board in turn is new, the tables
of all other boards are fitted on 900 networks each, 30 chosen networks are measured on it, and the
table is tried on networks that were measured nowhere. Beside it: the transfer model before it is
turned into a table, a table from the 30 networks alone, the best single other table (rescaled by
the 30), and a line on MACs.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
from scipy.stats import spearmanr

from benchmarks import contract, latency_data, latency_unseen
from hw_profiles import op
from hw_profiles.latency import Array, LatencyTable
from hw_profiles.models import calibrate, fewshot, transfer

SOURCE, POOL, TEST = 900, 300, 1000
SHOWN = 30
QUICK = (420, 60)  # networks read, and those that the other tables are fitted on


def score(predicted: Array, true: Array) -> dict[str, float]:
    off = np.abs(predicted / true - 1)
    return {
        "spearman": float(spearmanr(true, predicted).statistic),
        "within_10": float(100 * (off <= 0.1).mean()),
        "mape": float(100 * off.mean()),
    }


def tables(data: latency_unseen.Set, known: calibrate.Index) -> dict[str, LatencyTable]:
    found = {}
    for name in data.columns:
        times = data.family.times[name]
        there = known[~np.isnan(times[known])]
        samples = [(data.family.ops[at], float(times[at])) for at in there]
        device = latency_data.device_of(name)
        fitted = calibrate.fit(samples, device, space=data.family.name, source_text="")
        found[name] = fitted.model_copy(update={"device": name})
    return found


def few(columns: Sequence[str]) -> tuple[str, ...]:
    """A device that can be the new one, and two strangers to it."""
    target = next(name for name in columns if latency_unseen.strangers(columns, name))
    return (target, *latency_unseen.strangers(columns, target)[:2])


def judged(
    data: latency_unseen.Set,
    target: str,
    lenders: Mapping[str, LatencyTable],
    known: calibrate.Index,
    seed: int,
) -> dict[str, dict[str, float]]:
    """way -> its scores on `target`, on networks other than those `known` to the lenders."""
    rng = np.random.default_rng((seed, 1))
    ops, times = data.family.ops, data.family.times[target]
    measured = rng.permutation(np.setdiff1d(np.flatnonzero(~np.isnan(times)), known))
    pool, test = measured[:POOL], measured[POOL : POOL + TEST]
    space, device = data.family.name, latency_data.device_of(target)
    networks = [ops[at] for at in pool]
    sources = fewshot.sources(list(lenders.values()), networks, space, rng)
    shown = [int(at) for at in pool[transfer.choose(sources, data.rows[pool], SHOWN)]]
    samples = [(ops[at], float(times[at])) for at in shown]
    adapted = transfer.adapt(sources, data.rows[shown], times[shown])
    table = fewshot.table(adapted, samples, networks, device, space)
    alone = calibrate.fit(samples, device, space=space, source_text="")
    true = times[test]

    def by(found: LatencyTable, at: list[int]) -> Array:
        return np.array([found.estimate(ops[one], space).value_ms for one in at])

    asked = test.tolist()
    scaled = {}
    for name, lender in lenders.items():
        ratio = times[shown] / by(lender, shown)
        scaled[name] = (float(np.std(np.log(ratio))), float(np.median(ratio)))
    nearest = min(scaled, key=scaled.__getitem__)
    macs = np.array([float(op.macs(one)) for one in ops])
    design = np.column_stack([np.ones(SHOWN), macs[shown]]) / times[shown][:, None]
    line = np.linalg.lstsq(design, np.ones(SHOWN), rcond=None)[0]
    estimates = [table.estimate(ops[at], space) for at in asked]
    scores = {
        "few-shot table": score(np.array([one.value_ms for one in estimates]), true),
        "before it is a table": score(adapted.predict(data.rows[test])[0], true),
        "30 networks alone": score(by(alone, asked), true),
        "nearest table": score(scaled[nearest][1] * by(lenders[nearest], asked), true),
        "MACs": score(line[0] + line[1] * macs[test], true),
    }
    inside = [one.low_ms <= ms <= one.high_ms for one, ms in zip(estimates, true, strict=True)]
    scores["few-shot table"]["covered"] = float(100 * np.mean(inside))
    return scores


def main(argv: list[str] | None = None) -> int:
    options = contract.parser(__doc__).parse_args(argv)
    outcome = contract.Outcome("fewshot")
    if contract.data("hwnasbench") is None or contract.data("help_latency") is None:
        return outcome.skip("NASCTL_DATA has no hwnasbench and help_latency folders")
    root = Path(os.environ[contract.DATA])
    limit, known_to = QUICK if options.quick else (5000, SOURCE)
    loaders = [latency_data.nb201_executed, latency_data.fbnet, latency_data.ofa]
    found: dict[str, list[dict[str, float]]] = {}
    rows: list[list[object]] = []
    for loader in loaders[:1] if options.quick else loaders:
        data = latency_unseen.load(loader(root, limit))
        if options.quick:
            data = replace(data, columns=few(data.columns))
        known = np.random.default_rng(0).permutation(len(data.rows))[:known_to]
        every = tables(data, known)
        targets = data.columns[:1] if options.quick else data.columns
        for target in targets:
            names = latency_unseen.strangers(data.columns, target)
            if not names:
                continue
            scores = judged(data, target, {name: every[name] for name in names}, known, 0)
            for way, one in scores.items():
                found.setdefault(way, []).append(one)
            rows.append([data.family.name, target, *(one["within_10"] for one in scores.values())])
            print(contract.table(("space", "device", *scores), rows[-1:]), flush=True)
    print()
    summary: list[list[object]] = []
    for way, each in found.items():
        row: list[object] = [way]
        for name in ("spearman", "within_10", "mape", "covered"):
            values = [one[name] for one in each if name in one]
            if not values:
                continue
            worst = max(values) if name == "mape" else min(values)
            outcome.figures[f"{way}.{name}"] = float(np.mean(values))
            outcome.figures[f"{way}.{name}.worst"] = worst
            row += [float(np.mean(values)), worst]
        summary.append(row + [""] * (9 - len(row)))
    header = ["predicted by", "rho", "worst", "in 10 %", "worst", "MAPE %", "worst"]
    print(contract.table([*header, "covered %", "worst"], summary))
    return outcome.finish(options.save)


if __name__ == "__main__":
    sys.exit(main())
