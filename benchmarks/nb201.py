"""NAS-Bench-201 as a search problem in which everything is known: 15,625 networks, each trained by
its authors (CIFAR-10) and measured by HW-NAS-Bench on several devices. Nothing is interpolated.

Sources and units: SOURCE.md in NASCTL_DATA/nb201_accuracy and NASCTL_DATA/hwnasbench.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
from numpy.typing import NDArray

from nas.search import Problem
from nas.search_spaces import nasbench201
from nas.space import Genes

#: ids of the operators of `nasbench201.OPS` in the accuracy table
IDS = (1, 0, 4, 3, 2)


@dataclass(frozen=True)
class Table:
    """Arrays [5, 5, 5, 5, 5, 5], indexed by the genes of `nasbench201.Space`."""

    validation: NDArray[np.float64]  # share of images that are right, after 200 epochs, one run
    test: NDArray[np.float64]  # the same on test images, mean of the seeds
    latency_ms: NDArray[np.float64]

    def problem(self, budget_ms: float | None, seed: int) -> Problem:
        """A measured latency is its own upper end; the table has no cross-entropy, so what is
        minimised in its place is the share of validation images that are wrong."""

        def latency(genes: Genes) -> tuple[Any, Any]:
            value = self.latency_ms[tuple(genes.T)]
            return value, value

        def evaluate(genes: Genes) -> tuple[float, float]:
            accuracy = float(self.validation[tuple(genes)])
            return 1 - accuracy, accuracy

        return Problem(nasbench201.Space(), latency, evaluate, budget_ms, seed)


def load(accuracy: Path, hardware: Path, device: str) -> Table:
    """CIFAR-10 on `device`: edgegpu (a Jetson TX2), raspi4, pixel3, eyeriss or fpga."""
    nets = pq.read_table(accuracy / "nb201_accuracy.parquet").to_pydict()
    column = f"cifar10_{device}_latency_ms"
    measured = pq.read_table(
        hardware / "nb201_hw.parquet", columns=["arch_index", column]
    ).to_pydict()
    edges = [np.array(nets[f"op_{a}_{b}"]) for a, b in nasbench201.EDGES]
    at = tuple(np.array([IDS.index(int(op)) for op in edge]) for edge in edges)
    by_index = dict(zip(measured["arch_index"], measured[column], strict=True))
    columns = (
        np.array(nets["cifar10_hp200_val_acc"]) / 100,
        np.array(nets["cifar10_hp200_test_acc"]) / 100,
        np.array([by_index[index] for index in nets["arch_index"]]),
    )
    filled = [np.full((len(IDS),) * len(nasbench201.EDGES), np.nan) for _ in columns]
    for array, values in zip(filled, columns, strict=True):
        array[at] = values
    assert not np.isnan(np.array(filled)).any(), "every network has every figure"
    return Table(*filled)
