"""Single kernels at sizes that nobody measured: TensorRT's convolutions on a V100.

For every library of the table (fp32, fp16, ...) and kind of convolution, whole levels of one
dimension (every row with c_in = 96, say) are held out, a model is fitted on the rest and asked for
the held-out rows. Several draws of levels. A random split is shown beside it to say how much it
flatters: there every held-out kernel has measured neighbours on all sides.

forest    a random forest on the dimensions, MACs and bytes, much like nn-Meter's
nearest   the time of the nearest measured kernel in log shape
roofline  the best rates seen in training: max(MACs / peak, bytes / bandwidth)
ceiling   keys that were measured twice: how well the second measurement "predicts" the first

Libraries, kinds and levels are whatever the table has; every table in the folder is read.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as arrow
import pyarrow.parquet as parquet
from numpy.typing import NDArray
from scipy.spatial import cKDTree

from benchmarks import contract
from hw_profiles.latency import Array
from hw_profiles.models import interpolate
from hw_profiles.op import Op

Mask = NDArray[np.bool_]
FOLDER = "v100_conv_lut"
DIMENSIONS = ("batch", "c_in", "h_in", "w_in", "c_out", "kernel", "stride", "elt_fused")
HELD_OUT = ("c_in", "h_in", "c_out")
SHARE = 0.2  # of the levels of a dimension, held out in one draw
DRAWS = 2
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
    table = arrow.concat_tables(
        parquet.read_table(path) for path in sorted(folder.glob("*.parquet"))
    )
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
    cell: str
    method: str
    ratios: Array
    inside: Mask  # held-out level between training levels, not beyond them
    covered: Mask  # the error is within the spread that was promised; empty without a promise


def held_out(cell: Cell, dimension: str, draw: int) -> Mask:
    """Rows whose level of `dimension` is unseen in this draw."""
    levels = np.unique(cell.level(dimension))
    rng = np.random.default_rng(draw)
    chosen = rng.choice(levels, max(1, round(SHARE * len(levels))), replace=False)
    return np.isin(cell.level(dimension), chosen)


def ours(train: Cell, test: Cell, draw: int) -> tuple[Array, Array | None]:
    model = interpolate.fit(
        train.ops(), train.ms, batch=train.level("batch"), rng=np.random.default_rng(draw)
    )
    return model.predict(test.ops(), batch=test.level("batch"))


def work(cell: Cell) -> Array:
    """MACs and bytes of each kernel, whole batch."""
    each = np.array([[op.macs, op.bytes()] for op in cell.ops()], dtype=float)
    return each * cell.level("batch")[:, None]


def forest(train: Cell, test: Cell, draw: int) -> tuple[Array, Array | None]:
    from sklearn.ensemble import RandomForestRegressor  # 0.8 s to import

    known, asked = (np.column_stack([cell.columns, work(cell)]) for cell in (train, test))
    model = RandomForestRegressor(20, max_samples=0.7, random_state=draw)
    return np.exp(model.fit(known, np.log(train.ms)).predict(asked)), None


def nearest(train: Cell, test: Cell, draw: int) -> tuple[Array, Array | None]:
    _, at = cKDTree(np.log2(train.columns + 1)).query(np.log2(test.columns + 1))
    return train.ms[at], None


def roofline(train: Cell, test: Cell, draw: int) -> tuple[Array, Array | None]:
    rates = (work(train) / train.ms[:, None]).max(axis=0)
    return (work(test) / rates).max(axis=1), None


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
        ms, spread = method(train, rest, draw)
        ratios = rest.ms / ms
        covered = np.abs(ratios - 1) <= spread if spread is not None else np.zeros(0, dtype=bool)
        yield Result(split, draw, cell.name, name, ratios, inside, covered)


def within(ratios: Array, share: float) -> float:
    """Percent of predictions within +-share of what was measured."""
    return 100 * float((np.abs(1 / ratios - 1) <= share).mean()) if len(ratios) else float("nan")


def mape(ratios: Array) -> float:
    return 100 * float(np.abs(1 / ratios - 1).mean())


def pooled(found: Sequence[Result]) -> Array:
    return np.concatenate([result.ratios for result in found])


def figures(mine: Sequence[Result]) -> dict[str, float]:
    """Of all rows; beside it the worst draw, and levels between and beyond the known ones."""
    draws = [pooled([r for r in mine if r.draw == draw]) for draw in {r.draw for r in mine}]
    ratios, inside = pooled(mine), np.concatenate([r.inside for r in mine])
    return {
        "within10": within(ratios, 0.1),
        "within10_worst_draw": min(within(draw, 0.1) for draw in draws),
        "within5": within(ratios, 0.05),
        "mape": mape(ratios),
        "within10_inside": within(ratios[inside], 0.1),
        "within10_outside": within(ratios[~inside], 0.1),
    }


def report_methods(outcome: contract.Outcome, found: Sequence[Result]) -> None:
    """Per split and method, all cells together."""
    rows = []
    for split in dict.fromkeys(result.split for result in found):
        for method in METHODS:
            mine = [r for r in found if (r.split, r.method) == (split, method)]
            values = figures(mine)
            rows.append([split, method, sum(len(r.ratios) for r in mine), *values.values()])
            key = f"kernels.{split}.{method}"
            known = {name: value for name, value in values.items() if np.isfinite(value)}
            outcome.figures |= {f"{key}.{name}": value for name, value in known.items()}
    header = ("held out", "method", "rows", "+-10 %", "worst draw", "+-5 %", "MAPE %")
    print(contract.table((*header, "+-10 % inside", "outside"), rows))


def report_cells(outcome: contract.Outcome, found: Sequence[Result]) -> None:
    """Per cell: ours, the forest and how often the promised spread held."""
    rows = []
    for cell in dict.fromkeys(result.cell for result in found):
        for split in dict.fromkeys(result.split for result in found):
            chosen = [r for r in found if (r.cell, r.split) == (cell, split)]
            mine = [r for r in chosen if r.method == "ours"]
            rival = pooled([r for r in chosen if r.method == "forest"])
            ratios, inside = pooled(mine), np.concatenate([r.inside for r in mine])
            coverage = 100 * float(np.concatenate([r.covered for r in mine]).mean())
            shares = (within(ratios, 0.1), within(ratios[inside], 0.1), within(rival, 0.1))
            rows.append([cell, split, len(ratios), *shares, mape(ratios), coverage])
            key = f"kernels.{cell.replace(' ', '.')}.{split}"
            outcome.figures[f"{key}.within10"] = shares[0]
            outcome.figures[f"{key}.forest_within10"] = shares[2]
            outcome.figures[f"{key}.coverage"] = coverage
    header = ("library", "held out", "rows", "+-10 %", "inside", "forest +-10 %", "MAPE %")
    print(contract.table((*header, "spread holds %"), rows))


def report_ceiling(outcome: contract.Outcome, every: Sequence[Cell]) -> None:
    """Keys measured twice: the last measurement against the first."""
    for cell in every:
        _, first, key = np.unique(cell.columns, axis=0, return_index=True, return_inverse=True)
        last = np.zeros(len(first), dtype=int)
        last[key.ravel()] = np.arange(len(cell.ms))
        twice = first != last
        if not twice.any():
            continue
        ratios = cell.ms[last[twice]] / cell.ms[first[twice]]
        shares = within(ratios, 0.1), within(ratios, 0.05)
        outcome.figures[f"kernels.{cell.name.replace(' ', '.')}.ceiling10"] = shares[0]
        print(
            f"ceiling, {cell.name}: {len(ratios)} kernels measured twice agree within 10 % for "
            f"{shares[0]:.1f} %, within 5 % for {shares[1]:.1f} %"
        )


def smaller(every: Sequence[Cell]) -> list[Cell]:
    """The largest cell at its commonest batch, kernel and stride: few rows, as dense as all."""
    cell = max(every, key=lambda each: len(each.ms))
    for dimension in ("batch", "kernel", "stride"):
        levels, counts = np.unique(cell.level(dimension), return_counts=True)
        cell = cell.rows(cell.level(dimension) == levels[np.argmax(counts)])
    return [cell]


def part(outcome: contract.Outcome, quick: bool) -> None:
    """Print the tables, add figures and aims that start with `kernels.` to the outcome."""
    folder = contract.data(FOLDER)
    if folder is None:
        print(f"skipped: NASCTL_DATA has no folder {FOLDER}")
        return
    every = cells(folder)
    found: list[Result] = []
    for cell in smaller(every) if quick else every:
        for split in (*HELD_OUT[: 1 if quick else None], "random"):
            for draw in range(1 if quick or split == "random" else DRAWS):
                found += results(cell, split, draw)
    print("\nkernels at unmeasured levels, all libraries")
    report_methods(outcome, found)
    print("\nkernels, per library")
    report_cells(outcome, found)
    report_ceiling(outcome, every)
    if quick:  # few rows and one split can neither meet nor miss an aim
        return
    for split, aim in AIMS.items():
        got = outcome.figures[f"kernels.{split}.ours.within10"]
        outcome.aim(f"kernels.{split}.within10", f">= {aim:g} %", got, got >= aim)
