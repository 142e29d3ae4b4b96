"""Predicted millijoules against measured ones: NAS-Bench-201 on a Jetson TX2 (HW-NAS-Bench).

Fitted on some networks, tested on all others, beside a line on MACs, the latency times a mean power
(what one has without energies), and what a second measurement says: the same networks measured with
ten outputs instead of a hundred. `--write` fits the shipped table.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow.parquet as parquet
from scipy.stats import kendalltau

from benchmarks import contract, latency_data
from hw_profiles import device, energy, op
from hw_profiles.latency import Array
from hw_profiles.op import Op

BOARD, COLUMN, SPACE = "jetson-tx2", "edgegpu", "nasbench201"
FITTED_ON = (30, 100, 900)
DRAWS = 5
QUICK = 500  # networks
ORIGIN = (
    "fitted by benchmarks/energy.py on HW-NAS-Bench (C. Li et al., ICLR 2021), NAS-Bench-201 on "
    "CIFAR-100, column edgegpu energy, {n} networks without dead edges"
)


def score(predicted: Array, measured: Array) -> dict[str, float]:
    off = 100 * np.abs(predicted / measured - 1)
    return {
        "mape": float(off.mean()),
        "within_10": float(100 * (off <= 10).mean()),
        "worst": float(off.max()),
        "tau": float(kendalltau(measured, predicted).statistic),
    }


def line(x: Array, y: Array) -> Array:
    """Offset and slope with the least relative error."""
    design = np.column_stack([np.ones(len(x)), x])
    return np.asarray(np.linalg.lstsq(design / y[:, None], np.ones(len(y)), rcond=None)[0])


@dataclass(frozen=True)
class Measured:
    """Networks with their millijoules, measured twice, and milliseconds."""

    ops: Sequence[Sequence[Op]]
    mj: Array
    again: Array
    ms: Array

    @classmethod
    def of(cls, folder: Path, limit: int | None) -> Measured:
        family = latency_data.nb201(folder.parent, limit)
        assert family.index is not None
        stored = parquet.read_table(folder / "nb201_hw.parquet").to_pydict()
        mj, again = (
            np.array(stored[f"{data}_{COLUMN}_energy_mj"])[family.index]
            for data in ("cifar100", "cifar10")
        )
        return cls(family.ops, mj, again, family.times[COLUMN])


def scored(found: Measured, n: int, seed: int) -> dict[str, dict[str, float]]:
    """way -> its scores, with `n` networks fitted and 3,000 others tried."""
    order = np.random.default_rng((seed, n)).permutation(len(found.mj))
    fit, test = order[:n], order[n : n + 3000]
    samples = [(found.ops[at], float(found.mj[at])) for at in fit]
    table = energy.fit(samples, device.load(BOARD), space=SPACE, origin="", licence="")
    estimates = [table.estimate(found.ops[at], SPACE) for at in test]
    macs = np.array([float(op.macs(ops)) for ops in found.ops])
    a, b = line(macs[fit], found.mj[fit])
    by = {
        "table": np.array([one.value_mj for one in estimates]),
        "MACs": a + b * macs[test],
        "measured latency x mean power": found.ms[test] * np.mean(found.mj[fit] / found.ms[fit]),
        "measured again (CIFAR-10)": found.again[test],
    }
    scores = {way: score(predicted, found.mj[test]) for way, predicted in by.items()}
    inside = [
        one.low_mj <= mj <= one.high_mj for one, mj in zip(estimates, found.mj[test], strict=True)
    ]
    scores["table"]["covered"] = 100 * float(np.mean(inside))
    return scores


def write(found: Measured) -> None:
    samples = list(zip(found.ops, found.mj.tolist(), strict=True))
    table = energy.fit(
        samples,
        device.load(BOARD),
        space=SPACE,
        origin=ORIGIN.format(n=len(samples)),
        licence="MIT (HW-NAS-Bench)",
    )
    table.save(device.FOLDER / f"{BOARD}.energy.json")


def main(argv: list[str] | None = None) -> int:
    parser = contract.parser(__doc__)
    parser.add_argument("--write", action="store_true", help="rewrite the shipped table")
    options = parser.parse_args(argv)
    outcome = contract.Outcome("energy")
    folder = contract.data("hwnasbench")
    if folder is None or contract.data("help_latency") is None:
        return outcome.skip("NASCTL_DATA has no hwnasbench and help_latency folders")
    found = Measured.of(folder, QUICK if options.quick else None)
    rows: list[list[object]] = []
    for n in FITTED_ON[:1] if options.quick else FITTED_ON:
        draws = [scored(found, n, seed) for seed in range(1 if options.quick else DRAWS)]
        for way in draws[0]:
            means = {
                name: float(np.mean([draw[way].get(name, np.nan) for draw in draws]))
                for name in ("mape", "within_10", "worst", "tau", "covered")
            }
            rows.append([n, way, *means.values()])
            known = {name: value for name, value in means.items() if np.isfinite(value)}
            outcome.figures |= {f"{n}.{way}.{name}": value for name, value in known.items()}
    header = ("fitted on", "predicted by", "MAPE %", "in 10 %", "worst %", "tau", "inside 90 %")
    print(contract.table(header, rows))
    if options.write:
        write(found)
    return outcome.finish(options.save)


if __name__ == "__main__":
    sys.exit(main())
