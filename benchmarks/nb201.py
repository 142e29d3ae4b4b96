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

from hw_profiles.op import Op, Tape, Wire
from nas.search import Problem
from nas.space import Gene, Genes, SearchSpace

#: options of an edge from the cheapest up, and their ids in the accuracy table
OPS = {"none": 1, "skip_connect": 0, "avg_pool_3x3": 4, "nor_conv_1x1": 3, "nor_conv_3x3": 2}
EDGES = ((0, 1), (0, 2), (0, 3), (1, 2), (1, 3), (2, 3))  # in the accuracy table's column order
STAGES = ((16, 32), (32, 16), (64, 8))  # channels and pixels of the three stages of cells
CELLS = 5  # per stage


@dataclass(frozen=True)
class Cell:
    ops: tuple[int, ...]  # option of each edge


class Space(SearchSpace):
    """One gene per edge. `ops` lists convolutions alone: enough for MACs and parameters."""

    arch_type = Cell

    def __init__(self) -> None:
        self.genes = tuple(Gene(f"edge{a}{b}.op", tuple(range(len(OPS)))) for a, b in EDGES)
        self.slots = {"rest": (), **{gene.name: (gene.name,) for gene in self.genes}}

    def decode(self, genes: Genes) -> Cell:
        return Cell(tuple(self.values(genes).values()))

    def ops(self, arch: Cell) -> list[Op]:
        tape = Tape(3, 32)
        tape.slot = "rest"
        x = tape.conv(tape.input, STAGES[0][0], kernel=3, norm=True)
        for before, (channels, pixels) in zip((None, *STAGES), STAGES, strict=False):
            tape.slot = "rest"
            if before is not None:
                x = _reduction(tape, Wire(x.at, *_shape(before)), channels)
            for gene, option in zip(self.genes, arch.ops, strict=True):
                kernel = {3: 1, 4: 3}.get(option)  # options that compute
                tape.slot = gene.name
                for _ in range(CELLS if kernel else 0):
                    source = Wire(x.at, channels, pixels, pixels)
                    tape.conv(source, channels, kernel=kernel or 1, norm=True, act="relu")
        tape.slot = "rest"
        tape.linear(tape.gap(Wire(x.at, *_shape(STAGES[-1]))), 10)
        return tape.ops

    def build(self, arch: Cell) -> Any:
        raise NotImplementedError("a table of results has no networks")


def _shape(stage: tuple[int, int]) -> tuple[int, int, int]:
    return stage[0], stage[1], stage[1]


def _reduction(tape: Tape, x: Wire, channels: int) -> Wire:
    """The residual block that halves the image between two stages."""
    y = tape.conv(x, channels, kernel=3, stride=2, norm=True, act="relu")
    y = tape.conv(y, channels, kernel=3, norm=True)
    tape.conv(tape.avgpool(x), channels)
    return y


@dataclass(frozen=True)
class Table:
    """Arrays [5, 5, 5, 5, 5, 5], indexed by the genes of `Space`."""

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

        return Problem(Space(), latency, evaluate, budget_ms, seed)


def load(accuracy: Path, hardware: Path, device: str) -> Table:
    """CIFAR-10 on `device`: edgegpu (a Jetson TX2), raspi4, pixel3, eyeriss or fpga."""
    nets = pq.read_table(accuracy / "nb201_accuracy.parquet").to_pydict()
    column = f"cifar10_{device}_latency_ms"
    measured = pq.read_table(
        hardware / "nb201_hw.parquet", columns=["arch_index", column]
    ).to_pydict()
    ids = list(OPS.values())
    edges = [np.array(nets[f"op_{a}_{b}"]) for a, b in EDGES]
    at = tuple(np.array([ids.index(int(op)) for op in edge]) for edge in edges)
    by_index = dict(zip(measured["arch_index"], measured[column], strict=True))
    columns = (
        np.array(nets["cifar10_hp200_val_acc"]) / 100,
        np.array(nets["cifar10_hp200_test_acc"]) / 100,
        np.array([by_index[index] for index in nets["arch_index"]]),
    )
    filled = [np.full((len(OPS),) * len(EDGES), np.nan) for _ in columns]
    for array, values in zip(filled, columns, strict=True):
        array[at] = values
    assert not np.isnan(np.array(filled)).any(), "every network has every figure"
    return Table(*filled)
