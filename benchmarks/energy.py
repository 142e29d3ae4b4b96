"""Predicted millijoules against measured ones: NAS-Bench-201 on a Jetson TX2 (HW-NAS-Bench).

Fitted on some networks, tested on all others, beside a line on MACs, the latency times a mean power
(what one has without energies), and what a second measurement says: the same networks measured with
ten outputs instead of a hundred. `--write` fits the shipped table.
"""

from __future__ import annotations

import sys

import numpy as np
import pyarrow.parquet as parquet
from scipy.stats import kendalltau

from benchmarks import contract, latency_data
from hw_profiles import device, energy, op
from hw_profiles.latency import Array

BOARD, COLUMN = "jetson-tx2", "edgegpu"
FITTED_ON = (30, 100, 900)
DRAWS = 5
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


def main(argv: list[str] | None = None) -> int:
    parser = contract.parser(__doc__)
    parser.add_argument("--write", action="store_true", help="rewrite the shipped table")
    options = parser.parse_args(argv)
    outcome = contract.Outcome("energy")
    folder = contract.data("hwnasbench")
    if folder is None or contract.data("help_latency") is None:
        return outcome.skip("NASCTL_DATA has no hwnasbench and help_latency folders")
    family = latency_data.nb201(folder.parent, None)
    assert family.index is not None
    stored = parquet.read_table(folder / "nb201_hw.parquet").to_pydict()
    mj, again = (
        np.array(stored[f"{data}_{COLUMN}_energy_mj"])[family.index]
        for data in ("cifar100", "cifar10")
    )
    ms = family.times[COLUMN]
    board = device.load(BOARD)
    macs = np.array([float(op.macs(ops)) for ops in family.ops])
    rows: list[list[object]] = []
    for n in FITTED_ON[:2] if options.quick else FITTED_ON:
        found: dict[str, list[dict[str, float]]] = {}
        for seed in range(2 if options.quick else DRAWS):
            order = np.random.default_rng((seed, n)).permutation(len(mj))
            fit, test = order[:n], order[n : n + 3000]
            samples = [(family.ops[at], float(mj[at])) for at in fit]
            table = energy.fit(samples, board, space="nasbench201", origin="", licence="")
            estimates = [table.estimate(family.ops[at], "nasbench201") for at in test]
            value = np.array([one.value_mj for one in estimates])
            a, b = line(macs[fit], mj[fit])
            by = {
                "table": value,
                "MACs": a + b * macs[test],
                "measured latency x mean power": ms[test] * np.mean(mj[fit] / ms[fit]),
                "measured again (CIFAR-10)": again[test],
            }
            for way, predicted in by.items():
                found.setdefault(way, []).append(score(predicted, mj[test]))
            inside = [
                one.low_mj <= mj[at] <= one.high_mj for one, at in zip(estimates, test, strict=True)
            ]
            found["table"][-1]["covered"] = 100 * float(np.mean(inside))
        for way, scores in found.items():
            row: list[object] = [n, way]
            for name in ("mape", "within_10", "worst", "tau", "covered"):
                mean = float(np.mean([one.get(name, float("nan")) for one in scores]))
                row.append(mean)
                if np.isfinite(mean):
                    outcome.figures[f"{n}.{way}.{name}"] = mean
            rows.append(row)
    header = ("fitted on", "predicted by", "MAPE %", "in 10 %", "worst %", "tau", "inside 90 %")
    print(contract.table(header, rows))
    if options.write:
        samples = list(zip(family.ops, mj.tolist(), strict=True))
        energy.fit(
            samples,
            board,
            space="nasbench201",
            origin=ORIGIN.format(n=len(samples)),
            licence="MIT (HW-NAS-Bench)",
        ).save(device.FOLDER / f"{BOARD}.energy.json")
    return outcome.finish(options.save)


if __name__ == "__main__":
    sys.exit(main())
