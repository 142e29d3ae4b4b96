"""Does a latency table fitted on one space hold on the same space, on another, on another device?

The question behind every "inside the budget": the tables are fitted on NAS-Bench-201 and used on
other spaces. For every device column of the public tables:

same      fitted on 900 networks of NAS-Bench-201, tested on the rest; five draws; two baselines
transfer  fitted on those 900, tested on FBNet and on OFA-MobileNetV3, which have depthwise
          convolutions, 5x5 kernels and squeeze-excite that no fitted network has
devices   one device's table with its rates scaled by the datasheets, tested on another device
roofline  datasheet peak and bandwidth alone

Every 90 % interval is set without the device (or fold) that it is tested on. FBNet times of raspi4
and eyeriss are sums of measured (simulated) blocks, not of whole networks.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from scipy.stats import kendalltau

from benchmarks import contract, latency_data
from benchmarks.latency_data import Family
from hw_profiles import calibrate, device, latency
from hw_profiles.calibrate import Design, Ridge
from hw_profiles.latency import FAMILIES, Array, Interval

FIT = 900
RIDGES = {
    "datasheet": Ridge(),
    "overheads": Ridge(bytes=1e-1, slack=None),
    "even": Ridge(slack=None),
    "even, act apart": Ridge(act=1e-3, slack=None),
}
ORIGIN = (
    "fitted by benchmarks/latency_transfer.py on HW-NAS-Bench (C. Li et al., ICLR 2021), "
    "NAS-Bench-201 on CIFAR-100, column {column}, {n} networks without dead edges"
)
WRITTEN = {  # column -> (device file, what the timed region includes)
    "edgegpu": (
        "jetson-tx2",
        "one call of the torch2trt module with its synchronisation, input already on the GPU; "
        "mean of 50 calls after 3 s of warm-up",
    ),
    "raspi4": ("raspi4", "one inference; HW-NAS-Bench's files do not say more"),
}


@dataclass(frozen=True)
class Result:
    """Ratios measured / predicted of one (source, target) and how well the order was kept."""

    source: str
    target: str
    family: str
    ratios: Array
    tau: float

    def row(self) -> list[object]:
        low, median, high = np.quantile(self.ratios, (0.05, 0.5, 0.95))
        return [
            self.source,
            self.target,
            self.family,
            mape(self.ratios),
            self.tau,
            low,
            median,
            high,
        ]


HEADER = ("fitted on", "tested on", "family", "MAPE %", "tau", "5 %", "median", "95 %")


def mape(ratios: Array) -> float:
    return float(100 * np.mean(np.abs(1 / ratios - 1)))


def known(family: Family, column: str) -> tuple[Design, Array]:
    """Without the networks that this device could not run."""
    times = family.times[column]
    there = ~np.isnan(times)
    return family.design_for(column).rows(there), times[there]


def draw(n: int, seed: int) -> tuple[Array, Array]:
    order = np.random.default_rng(seed).permutation(n)
    size = min(FIT, n // 2)
    return order[:size], order[size:]


def linear_baseline(features: Array, times: Array, fit: Array, test: Array) -> Array:
    """Ratios of an unconstrained relative least squares fit with a constant."""
    terms = np.column_stack([np.ones(len(times)), features])
    weights = np.linalg.lstsq(terms[fit] / times[fit, None], np.ones(len(fit)), rcond=None)[0]
    return times[test] / (terms[test] @ weights)


def same_space(family: Family, column: str, seeds: int) -> dict[str, list[float]]:
    design, times = known(family, column)
    found: dict[str, list[float]] = {}
    for seed in range(seeds):
        fit, test = draw(len(times), seed)
        constant, terms = calibrate.solve(design.rows(fit), times[fit], Ridge())
        predicted = calibrate.predict(design.rows(test), constant, terms)
        ratios = times[test] / predicted
        held_out, _ = calibrate.held_out_ratios(design.rows(fit), times[fit], fit, Ridge())
        low, high = calibrate.quantiles(held_out)
        macs, counts = design.features[:, :, 1].sum(axis=1), design.features[:, :, 0]
        for name, value in {
            "mape": mape(ratios),
            "tau": float(kendalltau(times[test], predicted).statistic),
            "coverage": float(((low <= ratios) & (ratios <= high)).mean()),
            "mape_macs_only": mape(linear_baseline(macs, times, fit, test)),
            "mape_counts": mape(linear_baseline(counts, times, fit, test)),
        }.items():
            found.setdefault(name, []).append(value)
    return found


def fitted(family: Family, column: str, ridge: Ridge) -> tuple[float, dict[str, Array]]:
    design, times = known(family, column)
    chosen, _ = draw(len(times), 0)
    return calibrate.solve(design.rows(chosen), times[chosen], ridge)


def tested(
    source: str, target: str, family: Family, model: tuple[float, dict[str, Array]]
) -> Result:
    design, times = known(family, target)
    predicted = calibrate.predict(design, *model)
    tau = float(kendalltau(times, predicted).statistic)
    label = family.name + (" (block sums)" if target in family.sums else "")
    return Result(source, target, label, times / predicted, tau)


def transfers(source: Family, others: list[Family], ridge: Ridge) -> Iterator[Result]:
    for column in source.times:
        for family in others:
            if column in family.times:
                yield tested(column, column, family, fitted(source, column, ridge))


def between_devices(source: Family, families: list[Family]) -> Iterator[Result]:
    """Pairs of one kind at batch 1; the model is what `latency.scaled` makes of a fitted table."""
    for column in source.times:
        here = latency_data.device_of(column)
        if not here.peak or not here.bandwidth_gb_per_s or latency_data.batch_of(column) > 1:
            continue
        constant, terms = fitted(source, column, Ridge())
        for family in families:
            for target in family.times:
                there = latency_data.device_of(target)
                comparable = latency_data.kind_of(target) == latency_data.kind_of(column)
                if here == there or not comparable or latency_data.batch_of(target) > 1:
                    continue
                rates = np.array(
                    [
                        1.0,
                        here.peak / there.peak,
                        here.bandwidth_gb_per_s / there.bandwidth_gb_per_s,
                    ]
                )
                model = constant, {name: value * rates for name, value in terms.items()}
                yield tested(column, target, family, model)


def rooflines(families: list[Family]) -> Iterator[Result]:
    """Sum of overlapped compute and memory per family of operators: never above the per-operator
    roofline by more than rounding, and within 2 of it."""
    for family in families:
        for column in family.times:
            known_device = latency_data.device_of(column)
            if known_device.peak and latency_data.batch_of(column) == 1:
                floor = family.design_for(column).floor
                slower = dict.fromkeys(FAMILIES, floor)
                yield tested("datasheet", column, family, (0.0, slower))


def envelope(results: list[Result], what: str) -> Interval:
    """From the lowest 5 % to the highest 95 % of any result; the coverage is that of the networks
    of a device by the envelope of the other devices. With k devices an envelope covers a new one
    with a chance of k / (k + 1), so fewer than nine cannot promise 90 %: the coverage says it."""
    devices = sorted({result.target for result in results})
    covered = []
    for name in devices:
        low, high = _extremes([result for result in results if result.target != name])
        covered += [
            float(((low <= result.ratios) & (result.ratios <= high)).mean())
            for result in results
            if result.target == name
        ]
    low, high = _extremes(results)
    how = (
        f"{what}; lowest 5 % and highest 95 % of {len(results)} results on {len(devices)} devices "
        f"({', '.join(devices)}); coverage is of a device by the others"
    )
    networks = sum(len(result.ratios) for result in results)
    return Interval(
        low=round(low, 3), high=round(high, 3), n=networks, coverage=np.mean(covered), how=how
    )


def _extremes(results: list[Result]) -> tuple[float, float]:
    lows, highs = zip(*(calibrate.quantiles(result.ratios) for result in results), strict=True)
    return min(lows), max(highs)


def intervals(
    crossed: list[Result], moved: list[Result], roofed: list[Result]
) -> dict[str, Interval]:
    kinds = {
        kind: [
            result for result in crossed if (latency_data.kind_of(result.target) or "cpu") == kind
        ]
        for kind in ("cpu", "gpu")
    }
    gpus = [result for result in moved if latency_data.kind_of(result.target) == "gpu"]
    return {
        "cross_cpu": envelope(
            kinds["cpu"], "fitted on NAS-Bench-201, other spaces, CPUs and Eyeriss"
        ),
        "cross_gpu": envelope(kinds["gpu"], "fitted on NAS-Bench-201, other spaces, GPUs"),
        "relative": envelope(gpus, "another GPU's fit with its rates scaled by the datasheets"),
        "roofline": envelope(roofed, "peak and bandwidth of the datasheet alone"),
    }


def choose_ridge(by_name: dict[str, list[Result]]) -> list[list[object]]:
    """For each device the rule with the least mean MAPE on the others, and its MAPE on this one."""

    def error(rule: str, name: str, inside: bool) -> float:
        errors = [mape(item.ratios) for item in by_name[rule] if (item.target == name) == inside]
        return float(np.mean(errors))

    rows: list[list[object]] = []
    for name in sorted({result.target for result in next(iter(by_name.values()))}):
        picked = min(by_name, key=lambda rule: error(rule, name, inside=False))
        rows.append([name, picked, *(error(rule, name, inside=True) for rule in by_name)])
    return rows


def write(source: Family) -> None:
    """The shipped tables, fitted on every network of a column."""
    for column, (name, includes) in WRITTEN.items():
        times = source.times[column]
        samples = list(zip(source.ops, times.tolist(), strict=True))
        text = ORIGIN.format(column=column, n=len(samples))
        table = calibrate.fit(
            samples, device.load(name), space="nasbench201", source_text=text
        ).model_copy(update={"includes": includes, "licence": "MIT (HW-NAS-Bench)"})
        table.save(device.FOLDER / f"{name}.table.json")


def report_same_space(outcome: contract.Outcome, source: Family, seeds: int) -> None:
    rows = []
    for column in source.times:
        found = same_space(source, column, seeds)
        mean = {name: float(np.mean(values)) for name, values in found.items()}
        worst = max(found["mape"])
        rows.append([column, mean["mape"], worst, *(mean[name] for name in SAME[1:])])
        for name, value in mean.items():
            outcome.figures[f"same.{column}.{name}"] = value
    print(f"same space: fitted on {FIT}, tested on the rest, mean and worst of {seeds} draws")
    print(contract.table(("device", "MAPE %", "worst", *SAME[1:]), rows))


SAME = ("mape", "tau", "coverage", "mape_macs_only", "mape_counts")


def report(outcome: contract.Outcome, name: str, results: list[Result]) -> None:
    print(f"\n{name}")
    print(contract.table(HEADER, [result.row() for result in results]))
    for result in results:
        key = f"{name}.{result.source}.{result.target}.{result.family.split()[0]}"
        outcome.figures[f"{key}.mape"] = mape(result.ratios)
        outcome.figures[f"{key}.tau"] = result.tau
        outcome.figures[f"{key}.median"] = float(np.median(result.ratios))


def main() -> int:
    parser = contract.parser(__doc__)
    parser.add_argument("--write", action="store_true", help="rewrite intervals and shipped tables")
    options = parser.parse_args()
    outcome = contract.Outcome("latency_transfer")
    if contract.data("hwnasbench") is None or contract.data("help_latency") is None:
        return outcome.skip("NASCTL_DATA has no hwnasbench and help_latency folders")
    root = Path(os.environ[contract.DATA])
    source = latency_data.nb201(root, 2500 if options.quick else None)
    others = [
        family(root, 1000 if options.quick else 5000)
        for family in (latency_data.fbnet, latency_data.ofa)
    ]
    report_same_space(outcome, source, seeds=2 if options.quick else 5)
    by_rule = {name: list(transfers(source, others, ridge)) for name, ridge in RIDGES.items()}
    crossed = next(iter(by_rule.values()))
    moved = list(between_devices(source, [source, *others]))
    roofed = list(rooflines([source, *others]))
    for name, results in (("transfer", crossed), ("devices", moved), ("roofline", roofed)):
        report(outcome, name, results)
    print("\nrule that is best on the other devices, and the MAPE % of every rule on this one")
    print(contract.table(("device", "picked", *RIDGES), choose_ridge(by_rule)))
    found = intervals(crossed, moved, roofed)
    print("\nintervals of measured / predicted")
    for name, interval in found.items():
        print(f"{name}: {interval.low} to {interval.high}, coverage {interval.coverage:.2f}")
        outcome.figures[f"interval.{name}.low"] = interval.low
        outcome.figures[f"interval.{name}.high"] = interval.high
        outcome.figures[f"interval.{name}.coverage"] = interval.coverage or 0.0
    tx2 = outcome.figures["same.edgegpu.mape"]
    outcome.aim("tx2_same_space_mape", "<= 10 %", tx2, tx2 <= 10)
    gpu = [
        mape(result.ratios) for result in crossed if latency_data.kind_of(result.target) == "gpu"
    ]
    outcome.aim("gpu_transfer_mape_worst", "<= 20 %", max(gpu), max(gpu) <= 20)
    worst = max(mape(result.ratios) for result in crossed)
    outcome.aim("transfer_mape_worst", "<= 20 %", worst, worst <= 20)
    if options.write:
        dumped = {name: interval.model_dump() for name, interval in found.items()}
        text = json.dumps(dumped, indent=1) + "\n"
        (device.FOLDER / latency.INTERVALS_FILE).write_text(text, encoding="utf-8")
        write(source)
    return outcome.finish(options.save)


if __name__ == "__main__":
    raise SystemExit(main())
