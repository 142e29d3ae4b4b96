"""Training-free proxies on NAS-Bench-201: against stored values, against accuracy, and their cost.

Part 1: NETWORKS random cells that both stored tables know (FEWER for the four slowest proxies), a
batch of CIFAR-10 training images; Spearman with the tables' own values (each by itself: they used
other batches), with test accuracy after 200 epochs (arXiv 2001.00326), and with MACs. Part 2: TOP
random cells of the tenth with the highest accuracy, where proxies are needed and fail; not for the
slowest. Part 3: processor seconds per network, each proxy alone and the gradient family from shared
passes.

Finished networks are in results/proxies.scores.jsonl, timings in results/proxies.rows.jsonl; a run
that was stopped goes on there. `--quick` keeps nothing.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import torch
from numpy.typing import NDArray

from benchmarks import contract
from nas import proxies, scores, tasks
from nas import space as spaces
from nas.correlation import Interval, gain, interval
from nas.passes import Batch, measure
from nas.search_spaces import nasbench201
from nas.space import Genes, SearchSpace

NETWORKS, TOP, TIMED, QUICK = 200, 24, 2, 10
BATCH, SEED = 32, 0
SLOW, FEWER = ("grasp", "ntk", "zen", "zico"), 40  # two thirds of the time
FAMILY = ("grad_norm", "snip", "plain", "fisher", "jacob_cov", "epe_nas", "naswot", "swap")
#: our name -> the tables'; az_complexity is macs
STORED = {
    **{name: name for name in ("epe_nas", "fisher", "grad_norm", "grasp", "l2_norm", "params")},
    **{name: name for name in ("plain", "snip", "synflow", "zen")},
    **{"jacob_cov": "jacov", "naswot": "nwot", "macs": "flops"},
}
#: what two implementations agreed on over 40 cells (with `suite`), less some slack
AGREES = {
    **{"params": 0.999, "synflow": 0.99, "macs": 0.99, "naswot": 0.95, "grad_norm": 0.9},
    **{"snip": 0.9, "l2_norm": 0.9, "jacob_cov": 0.85, "fisher": 0.85, "grasp": 0.8},
}
#: Spearman of the stored values with test accuracy, 9,445 cells (zerocost)
PUBLISHED = {
    **{"epe_nas": 0.771, "fisher": 0.551, "macs": 0.769, "grad_norm": 0.599, "grasp": 0.537},
    **{"jacob_cov": 0.798, "l2_norm": 0.745, "naswot": 0.810, "params": 0.798, "plain": -0.350},
    **{"snip": 0.602, "synflow": 0.775, "zen": 0.114},
}
Values = dict[int, dict[str, float]]  # by the benchmark's number of a network


def stored(folder: Path, name: str, where: tuple[str, str], index: str) -> Values:
    """The CIFAR-10 rows of a table of metrics, under our names; NaN where it has none."""
    rows = pq.read_table(folder / f"{name}.parquet").to_pylist()
    found = {}
    for row in rows:
        if row[where[0]] == where[1] and row.get("benchmark", "nasbench201") == "nasbench201":
            values = {ours: row.get(theirs) for ours, theirs in STORED.items()}
            found[row[index]] = {k: np.nan if v is None else float(v) for k, v in values.items()}
    return found


def main(arguments: list[str] | None = None) -> int:
    options = contract.parser(__doc__).parse_args(arguments)
    outcome = contract.Outcome("proxies")
    names = ("cifar10", "nb201_accuracy", "nb201_zerocost", "nbsuitezero_subset")
    folders = {name: contract.data(name) for name in names}
    missing = [name for name, folder in folders.items() if folder is None]
    if missing:
        return outcome.skip(f"NASCTL_DATA/{missing[0]} is absent")
    torch.set_num_threads(1)
    found = {name: folder for name, folder in folders.items() if folder is not None}
    tables = {
        "suite": stored(
            found["nbsuitezero_subset"], "nbsuitezero_subset", ("task", "cifar10"), "nb201_index"
        ),
        "zerocost": stored(
            found["nb201_zerocost"], "nb201_zerocost", ("dataset", "cifar10"), "arch_index"
        ),
    }
    table = pq.read_table(found["nb201_accuracy"] / "nb201_accuracy.parquet").to_pydict()
    test = np.array(table["cifar10_hp200_test_acc"])[np.argsort(table["arch_index"])]
    batch = scores.batch_of(tasks.load(str(found["cifar10"])), BATCH, SEED)
    study = Study(batch, test, tables, quick=options.quick)
    study.agreement(outcome)
    study.speed(outcome)
    return outcome.finish(save=options.save and not options.quick)


class Study:
    """What the parts share: the batch, the truth and the tables."""

    def __init__(
        self, batch: Batch, test: NDArray[np.float64], tables: dict[str, Values], *, quick: bool
    ) -> None:
        self.batch, self.test, self.tables, self.quick = batch, test, tables, quick
        self.space: SearchSpace = spaces.load("nasbench201")
        some = [name for name in STORED if name not in SLOW]
        named = some if quick else proxies.names()
        self.names = tuple(name for name in named if name != "az_complexity")
        live = [k for k, row in tables["zerocost"].items() if np.isfinite(row["naswot"])]
        rng = np.random.default_rng(SEED)
        both = np.array(sorted(set(live) & set(tables["suite"])))
        self.cells = rng.permutation(both)[: QUICK if quick else NETWORKS]
        best = np.argsort(-test, kind="stable")[: len(test) // 10]
        pool = np.array(sorted(set(best.tolist()) & set(live)))
        self.top = rng.permutation(pool)[: QUICK if quick else TOP]

    def file(self, name: str) -> Path | None:
        return None if self.quick else contract.RESULTS / name

    def scored(self, numbers: NDArray[np.int64], slow: int) -> dict[str, NDArray[np.float64]]:
        """Values [N] by proxy; NaN where missing, and beyond the first `slow` for the slow ones."""
        found = {name: np.full(len(numbers), np.nan) for name in self.names}
        for is_slow, n in ((False, len(numbers)), (True, min(slow, len(numbers)))):
            chosen = tuple(name for name in self.names if (name in SLOW) == is_slow)
            genes = np.array([nasbench201.genes_at(int(number)) for number in numbers[:n]])
            values = scores.matrix(self._rows(chosen, genes), genes, chosen)
            for name, column in zip(chosen, values.T, strict=True):
                found[name][:n] = column
        return found

    def _rows(self, names: tuple[str, ...], genes: Genes) -> Iterator[scores.Row]:
        job = scores.Job(self.space, self.batch, names)
        rows = scores.scored(job, genes, path=self.file("proxies.scores.jsonl"))
        for at, row in enumerate(rows, 1):
            print(f"\r{at} of {len(genes)} networks", end="", file=sys.stderr, flush=True)
            yield row
        print(file=sys.stderr)

    def agreement(self, outcome: contract.Outcome) -> None:
        ours, top = self.scored(self.cells, FEWER), self.scored(self.top, 0)
        truth, rows = self.test[self.cells], []
        sizes = np.array([ours[name] for name in proxies.BASELINES])
        for name, values in ours.items():
            figures: dict[str, Any] = {"networks": float(np.isfinite(values).sum())}
            for which, table in self.tables.items():
                theirs = np.array([table[int(k)].get(name, np.nan) for k in self.cells])
                figures[which] = interval(values, theirs).value
            accuracy = interval(values, truth)
            figures |= {"accuracy": accuracy.value, "low": accuracy.low, "high": accuracy.high}
            figures["macs"] = interval(values, ours["macs"]).value
            figures["gain_low"] = gain(values, sizes, truth).low
            decile = interval(top[name], self.test[self.top])
            figures |= {"top": decile.value, "top_low": decile.low, "top_high": decile.high}
            found = {f"{name}.{k}": v for k, v in figures.items() if np.isfinite(v)}
            outcome.figures.update(found)
            rows.append((name, *figures.values()))
            _aim(outcome, name, figures["suite"], accuracy)
        header = ("proxy", "networks", *self.tables, "accuracy", "low", "high", "macs")
        print(contract.table((*header, "gain low", "top", "low", "high"), rows))

    def speed(self, outcome: contract.Outcome) -> None:
        path = self.file("proxies.rows.jsonl")
        rows = contract.Rows(path) if path else None
        found = []
        for number in self.cells[: 1 if self.quick else TIMED].tolist():
            key = {"part": "speed", "network": number, "batch": BATCH}
            row = rows.get(key) if rows else None
            if row is None:
                row = self._timed(number)
                if rows:
                    rows.add(key, row)
            found.append(row)
        names = FAMILY if self.quick else self.names
        alone = {name: float(np.median([row[name] for row in found])) for name in names}
        ratios = [sum(row[name] for name in FAMILY) / row["shared"] for row in found]
        print(contract.table(("proxy", "seconds alone"), list(alone.items())))
        print(
            f"gradient family: shared passes {np.median(ratios):.2f}x faster ({min(ratios):.2f} "
            f"to {max(ratios):.2f})"
        )
        outcome.figures.update({f"{name}.seconds": value for name, value in alone.items()})
        outcome.figures["family.seconds"] = float(np.median([row["shared"] for row in found]))
        outcome.figures["family.speedup"] = float(np.median(ratios))
        outcome.figures["family.speedup_least"] = min(ratios)
        aim = "gradient family from shared passes, against one at a time, >= 2x"
        outcome.aim("shared", aim, round(float(np.median(ratios)), 2), np.median(ratios) >= 2)

    def _timed(self, number: int) -> dict[str, float]:
        """Processor seconds on one network, the least of two turns."""
        genes = nasbench201.genes_at(number)
        net = scores.fresh(self.space, genes, SEED)
        named = FAMILY if self.quick else self.names
        sets: dict[str, tuple[str, ...]] = {name: (name,) for name in named}
        sets["shared"] = FAMILY
        taken: dict[str, list[float]] = {name: [] for name in sets}
        for _ in range(2):
            for name, chosen in sets.items():
                values = {each: proxies.load(each) for each in chosen}
                began = time.process_time()
                measure(net, self.batch, values)
                taken[name].append(time.process_time() - began)
        return {name: min(times) for name, times in taken.items()}


def _aim(outcome: contract.Outcome, name: str, as_stored: float, accuracy: Interval) -> None:
    if name in AGREES:
        aim = f"Spearman with the stored values >= {AGREES[name]}"
        outcome.aim(f"{name} as stored", aim, round(as_stored, 3), as_stored >= AGREES[name])
    if name in PUBLISHED:
        aim = f"95 % interval holds {PUBLISHED[name]}, the table's own over 9,445 cells"
        met = accuracy.low <= PUBLISHED[name] <= accuracy.high
        outcome.aim(f"{name} with accuracy", aim, round(accuracy.value, 3), met)


if __name__ == "__main__":
    sys.exit(main())
