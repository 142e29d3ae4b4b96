"""Does a latency table fitted on one space hold on the same space, on another, on another device?

The question behind every "inside the budget": the tables are fitted on NAS-Bench-201 and used on
other spaces. For every device column of the public tables:

same      fitted on 900 networks of NAS-Bench-201, tested on the rest; five draws; two baselines
few       the same with 50 networks, on every family: what a run can measure on its own machine
transfer  fitted on those 900, tested on FBNet and on OFA-MobileNetV3, which have depthwise
          convolutions, 5x5 kernels and squeeze-excite that no fitted network has
devices   one device's table with its rates scaled by the datasheets, tested on another device
roofline  datasheet peak and bandwidth alone

Every 90 % interval is set without the device (or fold) that it is tested on. FBNet times of raspi4
and eyeriss are sums of measured (simulated) blocks, not of whole networks.
"""

from __future__ import annotations

import functools
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from scipy.stats import kendalltau

from benchmarks import contract, latency_data
from benchmarks.latency_data import Family
from hw_profiles import device, latency
from hw_profiles.latency import Array, Interval
from hw_profiles.models import calibrate
from hw_profiles.models.calibrate import Design, Index, Ridge

FIT = 900
FEW = 50
RIDGES = {
    "datasheet": Ridge(),
    "overheads": Ridge(bytes=1e-3, slack=None),
    "even": Ridge(slack=None),
    "even, act apart": Ridge(act=1e-5, slack=None),
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


def draw(n: int, seed: int, size: int = FIT) -> tuple[Index, Index]:
    order = np.random.default_rng(seed).permutation(n)
    size = min(size, n // 2)
    return order[:size], order[size:]


def linear_baseline(features: Array, times: Array, fit: Index, test: Index) -> Array:
    """Ratios of an unconstrained relative least squares fit with a constant."""
    terms = np.column_stack([np.ones(len(times)), features])
    weights = np.linalg.lstsq(terms[fit] / times[fit, None], np.ones(len(fit)), rcond=None)[0]
    return times[test] / (terms[test] @ weights)


def same_space(family: Family, column: str, seeds: int, size: int = FIT) -> dict[str, list[float]]:
    design, times = known(family, column)
    found: dict[str, list[float]] = {}
    for seed in range(seeds):
        fit, test = draw(len(times), seed, size)
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
        targets = [(family, name) for family in families for name in family.times]
        targets = [pair for pair in targets if comparable(column, pair[1])]
        if not targets:
            continue
        constant, terms = fitted(source, column, Ridge())
        here = latency_data.device_of(column)
        for family, target in targets:
            ratios = latency.rate_ratios(here, latency_data.device_of(target))
            rates = np.array([1.0, *ratios])
            model = constant, {name: value * rates for name, value in terms.items()}
            yield tested(column, target, family, model)


def comparable(column: str, target: str) -> bool:
    """Two different devices of one kind with datasheets, both measured at batch 1."""
    kinds = latency_data.kind_of(column), latency_data.kind_of(target)
    batches = latency_data.batch_of(column), latency_data.batch_of(target)
    return column != target and kinds[0] == kinds[1] != "" and batches == (1, 1)


def rooflines(families: list[Family]) -> Iterator[Result]:
    """Every fifth network through the table that `latency.analytic` makes of the datasheet."""
    for family in families:
        for column, times in family.times.items():
            device_known = latency_data.device_of(column)
            if not device_known.peak or latency_data.batch_of(column) > 1:
                continue
            table = latency.analytic(device_known)
            cost = functools.cache(lambda op, table=table: float(table.columns(op).sum()))
            predicted = np.array([sum(map(cost, ops)) for ops in family.ops[::5]])
            there = ~np.isnan(times[::5])
            measured, predicted = times[::5][there], predicted[there]
            tau = float(kendalltau(measured, predicted).statistic)
            yield Result("datasheet", column, family.name, measured / predicted, tau)


def envelope(results: list[Result], what: str) -> Interval:
    """From the lowest 5 % to the highest 95 % of any result, widened until it would have covered
    90 % of a device that it was not made from. Where doubling is not enough it stays as it is, and
    the coverage says so: with k devices an envelope covers a new one with a chance of k / (k + 1),
    so a handful of them cannot promise 90 % without help."""
    devices = sorted({result.target for result in results})
    factors = [1 + step / 50 for step in range(51)]
    reached = (factor for factor in factors if _covered(results, factor) >= 0.9)
    factor = next(reached, 1.0)
    low, high = _extremes(results)
    how = (
        f"{what}; lowest 5 % and highest 95 % of {len(results)} results on {len(devices)} devices "
        f"({', '.join(devices)}), widened by {factor:.2f}; coverage is of a device by the others"
    )
    return Interval(
        low=round(low / factor, 3),
        high=round(high * factor, 3),
        n=sum(len(result.ratios) for result in results),
        coverage=round(_covered(results, factor), 3),
        how=how,
    )


def _covered(results: list[Result], factor: float) -> float:
    """Mean over results of the share inside the widened envelope of the other devices."""
    shares = []
    for result in results:
        low, high = _extremes([other for other in results if other.target != result.target])
        inside = (low / factor <= result.ratios) & (result.ratios <= high * factor)
        shares.append(inside.mean())
    return float(np.mean(shares))


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
    # a loan is within one runtime (see latency.analytic): the desktop GPUs' is PyTorch's
    alike = [result for result in gpus if "edgegpu" not in (result.source, result.target)]
    return {
        "cross_cpu": envelope(
            kinds["cpu"], "fitted on NAS-Bench-201, other spaces, CPUs and Eyeriss"
        ),
        "cross_gpu": envelope(kinds["gpu"], "fitted on NAS-Bench-201, other spaces, GPUs"),
        "relative": envelope(alike, "another GPU's fit, rates scaled by datasheets, one runtime"),
        "relative_any_runtime": envelope(gpus, "the same between PyTorch and TensorRT too"),
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


def report_same_space(
    outcome: contract.Outcome, families: list[Family], seeds: int, size: int
) -> None:
    name = "same" if size == FIT else "few"
    rows = []
    for family in families:
        for column in sorted(set(family.times) - family.sums):
            found = same_space(family, column, seeds, size)
            mean = {key: float(np.mean(values)) for key, values in found.items()}
            rows.append([family.name, column, mean["mape"], max(found["mape"])])
            rows[-1] += [mean[key] for key in SAME[1:]] + [min(found["coverage"])]
            for key, value in mean.items():
                outcome.figures[f"{name}.{family.name}.{column}.{key}"] = value
    print(f"\n{name}: fitted on {size} networks, tested on the rest; means of {seeds} draws")
    header = ("family", "device", "MAPE %", "worst", *SAME[1:], "worst coverage")
    print(contract.table(header, rows))


SAME = ("mape", "tau", "coverage", "mape_macs_only", "mape_counts")


def report(outcome: contract.Outcome, name: str, results: list[Result]) -> None:
    print(f"\n{name}")
    print(contract.table(HEADER, [result.row() for result in results]))
    for result in results:
        key = f"{name}.{result.source}.{result.target}.{result.family.split()[0]}"
        outcome.figures[f"{key}.mape"] = mape(result.ratios)
        outcome.figures[f"{key}.tau"] = result.tau
        outcome.figures[f"{key}.median"] = float(np.median(result.ratios))


def aims(outcome: contract.Outcome, crossed: list[Result]) -> None:
    tx2 = outcome.figures["same.nasbench201.edgegpu.mape"]
    outcome.aim("tx2_same_space_mape", "<= 10 %", tx2, tx2 <= 10)
    coverages = [value for name, value in outcome.figures.items() if name.endswith(".coverage")]
    outcome.aim(
        "worst_coverage_of_a_90_percent_interval", ">= 0.85", min(coverages), min(coverages) >= 0.85
    )
    worst = max(mape(result.ratios) for result in crossed)
    outcome.aim("transfer_mape_worst", "<= 20 %", worst, worst <= 20)


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
    seeds = 2 if options.quick else 5
    report_same_space(outcome, [source], seeds, FIT)
    report_same_space(outcome, [source, *others], seeds, FEW)
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
    aims(outcome, crossed)
    if options.write:
        dumped = {name: interval.model_dump() for name, interval in found.items()}
        text = json.dumps(dumped, indent=1) + "\n"
        (device.FOLDER / latency.INTERVALS_FILE).write_text(text, encoding="utf-8")
        write(source)
    return outcome.finish(options.save)


if __name__ == "__main__":
    raise SystemExit(main())
