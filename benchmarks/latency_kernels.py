"""Single kernels at sizes that nobody measured: TensorRT's convolutions on a V100.

For every library of the table (fp32, fp16, ...) and kind of convolution, whole levels of one
dimension (every row with c_in = 96, say) are held out, a model is fitted on the rest and asked for
the held-out rows. Several draws of levels. A random split is shown beside it to say how much it
flatters: there every held-out kernel has measured neighbours on all sides.

forest    a random forest on the raw dimensions, what nn-Meter uses
nearest   the time of the nearest measured kernel in log shape
roofline  the best rates seen in training: max(MACs / peak, bytes / bandwidth)
ceiling   keys that were measured twice: how well the second measurement "predicts" the first

Libraries, kinds and levels are whatever the table has; every table in the folder is read.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as arrow
import pyarrow.parquet as parquet
from numpy.typing import NDArray
from scipy.spatial import cKDTree

from benchmarks import contract
from hw_profiles import interpolate
from hw_profiles.latency import Array
from hw_profiles.op import Op

Mask = NDArray[np.bool_]
FOLDER = "v100_conv_lut"
DIMENSIONS = ("batch", "c_in", "h_in", "w_in", "c_out", "kernel", "stride", "elt_fused")
HELD_OUT = ("c_in", "h_in", "c_out")
SHARE = 0.2  # of the levels of a dimension, held out in one draw
DRAWS = 3
QUICK_ROWS = 2500  # per cell
AIMS = {"c_in": 80.0, "h_in": 80.0, "c_out": 85.0}


@dataclass(frozen=True)
class Cell:
    """One library and kind of convolution: its kernels and their milliseconds (whole batch)."""

    library: str
    kind: str
    columns: Array  # rows x DIMENSIONS
    ms: Array

    @property
    def name(self) -> str:
        return f"{self.library} {self.kind}"

    def level(self, dimension: str) -> Array:
        return self.columns[:, DIMENSIONS.index(dimension)]

    def rows(self, chosen: NDArray[np.generic]) -> Cell:
        return Cell(self.library, self.kind, self.columns[chosen], self.ms[chosen])

    def ops(self) -> list[Op]:
        depthwise = self.kind == "Depthwise"
        made = []
        for _, c_in, h, w, c_out, kernel, stride, fused in self.columns.astype(int).tolist():
            groups = c_in if depthwise else 1
            kind = "dwconv" if depthwise else "conv"
            reads = (-1, -1) if fused else (-1,)
            made.append(Op(kind, c_in, c_out, h, w, kernel, stride, groups, reads=reads))
        return made


def cells(folder: Path) -> list[Cell]:
    """Every library and kind of every table in the folder; failed measurements are dropped."""
    table = arrow.concat_tables(parquet.read_table(path) for path in sorted(folder.glob("*.parquet")))
    text = {name: np.array(table[name].to_pylist()) for name in ("library", "conv_type")}
    columns = np.column_stack([table[name].to_numpy() for name in DIMENSIONS]).astype(float)
    ms = table["latency_ms"].to_numpy().astype(float)
    found = []
    for library in np.unique(text["library"]):
        for kind in np.unique(text["conv_type"][text["library"] == library]):
            mine = (text["library"] == library) & (text["conv_type"] == kind) & (ms > 0)
            found.append(Cell(str(library), str(kind), columns[mine], ms[mine]))
    return found


@dataclass(frozen=True)
class Result:
    """measured / predicted of one method on one draw's held-out rows of one cell."""

    split: str  # the dimension whose levels were held out, or "random"
    draw: int
    cell: Cell
    method: str
    ratios: Array
    inside: Mask  # held-out level between training levels, not beyond them


def held_out(cell: Cell, dimension: str, draw: int) -> Mask:
    """Rows whose level of `dimension` is unseen in this draw."""
    levels = np.unique(cell.level(dimension))
    rng = np.random.default_rng(draw)
    chosen = rng.choice(levels, max(1, round(SHARE * len(levels))), replace=False)
    return np.isin(cell.level(dimension), chosen)


def ours(train: Cell, test: Cell, draw: int) -> Array:
    model = interpolate.fit(
        train.ops(), train.ms, batch=train.level("batch"), rng=np.random.default_rng(draw)
    )
    return model.predict(test.ops(), batch=test.level("batch"))[0]


def forest(train: Cell, test: Cell, draw: int) -> Array:
    from sklearn.ensemble import RandomForestRegressor  # 0.8 s to import

    model = RandomForestRegressor(20, max_samples=0.7, random_state=draw)
    return np.exp(model.fit(train.columns, np.log(train.ms)).predict(test.columns))


def nearest(train: Cell, test: Cell, draw: int) -> Array:
    _, at = cKDTree(np.log2(train.columns + 1)).query(np.log2(test.columns + 1))
    return train.ms[at]


def roofline(train: Cell, test: Cell, draw: int) -> Array:
    def work(cell: Cell) -> Array:
        ops = cell.ops()
        each = np.array([[op.macs, op.bytes()] for op in ops], dtype=float)
        return each * cell.level("batch")[:, None]

    return (work(test) / (work(train) / train.ms[:, None]).max(axis=0)).max(axis=1)


METHODS = {"ours": ours, "forest": forest, "nearest": nearest, "roofline": roofline}


def results(cell: Cell, split: str, draw: int) -> Iterator[Result]:
    if split == "random":
        test = np.random.default_rng(draw).random(len(cell.ms)) < SHARE
        inside = np.ones(int(test.sum()), dtype=bool)
    else:
        test = held_out(cell, split, draw)
        seen, levels = cell.level(split)[~test], cell.level(split)[test]
        inside = (seen.min() < levels) & (levels < seen.max())
    train, rest = cell.rows(~test), cell.rows(test)
    for name, method in METHODS.items():
        yield Result(split, draw, cell, name, rest.ms / method(train, rest, draw), inside)


def within(ratios: Array, share: float) -> float:
    """Percent of predictions within +-share of what was measured."""
    return 100 * float((np.abs(1 / ratios - 1) <= share).mean())


def mape(ratios: Array) -> float:
    return 100 * float(np.abs(1 / ratios - 1).mean())
