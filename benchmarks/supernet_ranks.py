"""Part `ranks` of the supernet benchmark: does the supernet order networks as training them alone
does? Beside it what MACs and parameters would say, and the ceiling: one seed alone against another.

Networks come from three sizes, each within 10 % in MACs, so that size alone cannot order those of a
band. Alone they see as many images as the supernet: a fifth of that ranks them by how fast they
start. Kendall's tau, on validation accuracy.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from scipy import stats

from benchmarks import contract
from benchmarks.supernet_training import Experiment, alone, in_bands
from nas.elastic import Network
from nas.space import Genes
from nas.supernet import Course

BANDS, EACH = 3, 7
SEEDS = 2


def run(experiment: Experiment, outcome: contract.Outcome) -> None:
    net = experiment.supernet()
    bands = in_bands(experiment, BANDS, EACH)
    rows: list[dict[str, Any]] = []
    for band, members in enumerate(bands):
        for at, genes in enumerate(members):
            rows.append({"band": band, **_row(experiment, net, genes, band, at)})
    _report(rows, outcome)


def _row(
    experiment: Experiment, net: Network, genes: Genes, band: int, at: int
) -> dict[str, float]:
    name = {"part": "ranks", "band": band, "network": at}

    def inherited(_: Path) -> dict[str, Any]:
        child = experiment.child(net, genes)
        return experiment.judged(child, child.arch.resolution, test=False)

    found = {"supernet": experiment.row({**name, "how": "supernet"}, inherited)["val_accuracy"]}
    for seed in range(SEEDS):
        own = replace(experiment, seed=seed)  # as long as the supernet: a fifth ranks otherwise

        def trained(state: Path, own: Experiment = own) -> dict[str, Any]:
            single = alone(own, genes, Course(own.task, own.recipe), state)
            return own.judged(single, single.arch.resolution, test=False)

        row = experiment.row({**name, "how": "alone", "of": seed, "steps": own.steps}, trained)
        found[f"alone{seed}"] = row["val_accuracy"]
    return {**found, "macs": experiment.macs(genes), "params": experiment.params(genes)}


def _report(rows: list[dict[str, Any]], outcome: contract.Outcome) -> None:
    column = {name: np.array([row[name] for row in rows]) for name in rows[0]}
    truth = np.mean([column[f"alone{seed}"] for seed in range(SEEDS)], axis=0)
    pairs = {
        "supernet": (column["supernet"], truth),
        "MACs": (column["macs"], truth),
        "parameters": (column["params"], truth),
        "seed against seed": (column["alone0"], column["alone1"]),
    }
    shown = []
    for name, (x, y) in pairs.items():
        every = _tau(x, y)
        inside = [_tau(x[at], y[at]) for at in (column["band"] == b for b in range(BANDS))]
        shown.append([name, every, float(np.mean(inside)), min(inside)])
        label = f"tau_{name.replace(' ', '_').lower()}"
        outcome.figures |= {label: every, f"{label}_in_bands": float(np.mean(inside))}
    print(f"Kendall's tau with accuracy alone, {len(rows)} networks")
    print(contract.table(["by", "all", "within 10 % of MACs", "worst band"], shown))


def _tau(x: np.ndarray, y: np.ndarray) -> float:
    """Kendall's tau-b; 0 where one side does not vary at all."""
    tau = float(stats.kendalltau(x, y).statistic)
    return 0.0 if np.isnan(tau) else tau
