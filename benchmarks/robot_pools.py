"""Pools of networks in which everything is known: cheap features, architectures and accuracies.

Whatever tasks, data sets and metric columns the tables hold are used: nothing is listed by name
but what is not a metric. Sources, units and encodings: SOURCE.md in each folder of NASCTL_DATA.
"""

from __future__ import annotations

import ast
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
from numpy.typing import NDArray

from nas.pool import Array, Pool, graph

EDGES = ((0, 1), (0, 2), (0, 3), (1, 2), (1, 3), (2, 3))
NOT_METRICS = {"benchmark", "task", "dataset", "arch", "arch_index", "nb201_index"}
NOT_METRICS |= {"val_accuracy", "val_final"}
MODULES = 6  # of a TransNAS macro network, at most
Rows = Sequence[Mapping[str, Any]]


@dataclass(frozen=True)
class Table:
    """A pool with what each of its networks [N] is worth."""

    name: str
    family: str  # search space: what is left out together when settings are chosen
    pool: Pool
    value: Array  # what a query answers: validation
    truth: Array  # what the result is judged by; `value` itself where nothing else is known
    train_s: Array | None = None  # seconds that one query costs
    proxy_s: Mapping[str, float] | None = None  # mean seconds per network of each metric

    def take(self, rows: NDArray[np.int64]) -> Table:
        cost = None if self.train_s is None else self.train_s[rows]
        return replace(
            self,
            pool=self.pool.take(rows),
            value=self.value[rows],
            truth=self.truth[rows],
            train_s=cost,
        )

    def rank(self, row: int) -> int:
        """1 is the best of the pool; equals share the best of their ranks."""
        return 1 + int((self.truth > self.truth[row]).sum())


def load(root: Path) -> list[Table]:
    """Every pool of the folder: NAS-Bench-201 whole, then the sampled ones, then TransNAS whole."""
    sampled = sampled_pools(root / "nbsuitezero_subset" / "nbsuitezero_subset.parquet")
    seconds = {table.name: table.proxy_s for table in sampled}
    tables = nb201(root, seconds.get("nasbench201/cifar10") or {})
    whole = transnas(root / "transnasbench101", {table.name: table for table in sampled})
    return [*tables, *sampled, *whole]


# ---- NAS-Bench-201, the 9,445 networks without unreachable branches ------------------------------


def nb201(root: Path, seconds: Mapping[str, float]) -> list[Table]:
    """One pool per data set whose test accuracies are there. As published, what is queried is
    CIFAR-10 validation after 12 epochs and what is reported is the data set's final test accuracy.
    """
    nets = pq.read_table(root / "nb201_accuracy" / "nb201_accuracy.parquet").to_pydict()
    metrics = pq.read_table(root / "nb201_zerocost" / "nb201_zerocost.parquet").to_pylist()
    digits = np.array([nets[f"op_{a}_{b}"] for a, b in EDGES]).T.astype(np.int64)
    tables = []
    for column in nets:
        if not column.endswith("_hp200_test_acc"):
            continue
        dataset = column.removesuffix("_hp200_test_acc")
        # a data set without metrics of its own borrows CIFAR-10's, as a transferred search would
        rows = _complete(metrics, dataset) or _complete(metrics, "cifar10")
        index = np.array([row["arch_index"] for row in rows])
        features, names = _metrics(rows)
        tables.append(
            Table(
                f"nasbench201-live/{dataset}",
                "nasbench201",
                _cells(digits[index], EDGES, 5, features, names, index),
                np.array(nets["cifar10valid_hp12_val_acc"], float)[index],
                np.array(nets[column], float)[index],
                np.array(nets["cifar10valid_hp12_cost_s"], float)[index],
                seconds,
            )
        )
    return tables


def _complete(metrics: Rows, dataset: str) -> list[Mapping[str, Any]]:
    """The data set's rows with more than zen, which alone was computed for all 15,625."""
    own = [row for row in metrics if row["dataset"].lower().replace("-", "_") == dataset]
    names = [name for name in metrics[0] if name not in NOT_METRICS]
    return [row for row in own if sum(row[name] is not None for name in names) > 2]


# ---- NAS-Bench-Suite-Zero, at most 725 networks per task -----------------------------------------


def sampled_pools(path: Path) -> list[Table]:
    groups: dict[tuple[str, str], list[Mapping[str, Any]]] = defaultdict(list)
    for row in pq.read_table(path).to_pylist():
        groups[row["benchmark"], row["task"]].append(row)
    tables = []
    for (benchmark, task), rows in groups.items():
        features, names = _metrics(rows)
        archs = [ast.literal_eval(row["arch"]) for row in rows]
        seconds = {name: float(np.mean([_seconds(row, name) for row in rows])) for name in names}
        value = np.array([row["val_accuracy"] for row in rows], float)
        pool = _pool(benchmark, archs, features, names)
        name = f"{benchmark}/{task}"
        tables.append(Table(name, benchmark, pool, value, value, proxy_s=seconds))
    return tables


def _seconds(row: Mapping[str, Any], name: str) -> float:
    took = row.get(f"t_{name}_s")
    return np.nan if took is None else float(took)


# ---- TransNAS-Bench-101, every network -----------------------------------------------------------


def transnas(folder: Path, sampled: Mapping[str, Table]) -> list[Table]:
    """All networks of each task with the few metrics known for all, MACs and parameters (counted
    from the sampled networks, exactly: `_counts`), and the pool of 2,128 with thirteen metrics."""
    groups: dict[tuple[str, str], list[Mapping[str, Any]]] = defaultdict(list)
    for row in pq.read_table(folder / "transnasbench101.parquet").to_pylist():
        groups[row["benchmark"], row["task"]].append(row)
    tables = []
    for (benchmark, task), rows in groups.items():
        features, names = _metrics(rows)
        archs = [ast.literal_eval(row["arch"]) for row in rows]
        known = sampled.get(f"{benchmark}/{task}")
        if known is not None:
            counted, which = _counts(benchmark, archs, known.pool)
            features, names = np.column_stack([features, counted]), (*names, *which)
        pool = _pool(benchmark, archs, features, names)
        value = np.array([row["val_final"] for row in rows], float)
        tables.append(Table(f"{benchmark}-whole/{task}", benchmark, pool, value, value))
    for path in sorted(folder.glob("tnb101_micro_*_13proxies.parquet")):
        rows = pq.read_table(path).to_pylist()
        features, names = _metrics(rows)
        archs = [ast.literal_eval(row["arch"]) for row in rows]
        pool = _pool("transbench101_micro", archs, features, names)
        value = np.array([row["val_final"] for row in rows], float)
        task = path.stem.removeprefix("tnb101_micro_").removesuffix("_13proxies")
        name = f"transbench101_micro-valid/{task}"
        tables.append(Table(name, "transbench101_micro", pool, value, value))
    return tables


def _counts(benchmark: str, archs: Sequence[Any], known: Pool) -> tuple[Array, tuple[str, ...]]:
    """MACs (M) and parameters (M) [N, k] of networks whose counts were not stored.

    Both are sums over a network's parts (an operator on an edge; a module at its width and
    resolution), so least squares on the sampled networks recovers them to float32 rounding. NaN
    where a network has a part that none of those has; a count that is no such sum is left out.
    """
    names = tuple(name for name in ("flops", "params") if name in known.names)
    table = [known.features[:, known.names.index(name)] for name in names]
    truth = np.array(table).reshape(len(names), len(known)).T
    here = {_identity(benchmark, arch): at for at, arch in enumerate(archs)}
    at = np.array([here[int(one)] for one in known.ids])  # an id names the architecture
    parts = [_parts(benchmark, arch) for arch in archs]
    columns = {part: i for i, part in enumerate(sorted({p for some in parts for p in some}))}
    design = np.zeros((len(archs), len(columns)))
    for row, some in enumerate(parts):
        for part in some:
            design[row, columns[part]] += 1
    weights, *_ = np.linalg.lstsq(design[at], truth, rcond=None)
    exact = np.isclose(design[at] @ weights, truth, rtol=1e-4, atol=1e-4).all(axis=0)
    covered = design[at].sum(axis=0) > 0
    unseen = design[:, ~covered].sum(axis=1) > 0
    counts = np.where(unseen[:, None], np.nan, design @ weights)[:, exact]
    return counts, tuple(name for name, fits in zip(names, exact, strict=True) if fits)


def _parts(benchmark: str, arch: Sequence[int]) -> list[tuple[int, int, int]]:
    """Micro: (edge, operator, 0). Macro: (module, doublings of the width and halvings of the image
    before it), and the head behind them as module 0."""
    if benchmark == "transbench101_micro":
        return [(edge, op, 0) for edge, op in enumerate(arch)]
    parts, wider, smaller = [], 0, 0
    for module in arch:
        parts.append((module, wider, smaller))
        wider, smaller = wider + (module in (3, 4)), smaller + (module in (2, 4))
    return [*parts, (0, wider, smaller)]


# ---- architectures -------------------------------------------------------------------------------


def _metrics(rows: Rows) -> tuple[Array, tuple[str, ...]]:
    """Every metric [N, m] of which at least one network has a value; NaN elsewhere."""
    known = [name for name in rows[0] if name not in NOT_METRICS and not name.startswith("t_")]
    table = np.array([[row[name] for name in known] for row in rows], float)
    kept = np.flatnonzero(np.isfinite(table).any(axis=0))
    return table[:, kept], tuple(known[at] for at in kept)


def _pool(benchmark: str, archs: Sequence[Any], features: Array, names: tuple[str, ...]) -> Pool:
    ids = np.array([_identity(benchmark, arch) for arch in archs])
    if benchmark == "nasbench201":
        return _cells(np.array(archs), EDGES, 5, features, names, ids)
    if benchmark == "transbench101_micro":
        edges = tuple(sorted(EDGES, key=lambda edge: edge[1]))
        return _cells(np.array(archs), edges, 4, features, names, ids)
    if benchmark == "transbench101_macro":
        return _chains(archs, features, names, ids)
    return _darts(archs, features, names, ids)


def _identity(benchmark: str, arch: Any) -> int:
    """A number that names the architecture: its digits read as one number."""
    digits = np.ravel(np.array(arch)).tolist()
    base = 5 if benchmark.startswith(("nasbench201", "transbench101")) else 11
    number = 0
    for digit in digits:
        number = (number * base + int(digit) + (base == 11)) % (2**61 - 1)
    return number


def _one_hot(digits: NDArray[np.int64], options: int) -> NDArray[np.float32]:
    hot = digits[:, :, None] == np.arange(options)
    return hot.reshape(len(digits), -1).astype(np.float32)


def _cells(
    digits: NDArray[np.int64],
    edges: Sequence[tuple[int, int]],
    kinds: int,
    features: Array,
    names: tuple[str, ...],
    ids: NDArray[np.int64],
) -> Pool:
    """Cells of four nodes with an operator on every edge."""
    sources = np.tile([a for a, _ in edges], (len(digits), 1))
    targets = np.array([b for _, b in edges])
    shape = graph.features(sources, targets, digits, nodes=4, kinds=kinds)
    return Pool(features, names, _one_hot(digits, kinds), ids, shape)


def _chains(
    archs: Sequence[Sequence[int]],
    features: Array,
    names: tuple[str, ...],
    ids: NDArray[np.int64],
) -> Pool:
    """Four to six modules in a row; 0 fills up. A chain's graph features are counts alone."""
    digits = np.array([[*arch, *[0] * (MODULES - len(arch))] for arch in archs])
    counts = [(digits == kind).sum(1) for kind in range(1, 5)]
    wider = np.isin(digits, (3, 4)).sum(1)
    smaller = np.isin(digits, (2, 4)).sum(1)
    first = [np.where(digits == kind, np.arange(MODULES), MODULES).min(1) for kind in (2, 3, 4)]
    shape = np.column_stack([*counts, wider, smaller, *first, (digits > 0).sum(1)])
    return Pool(features, names, _one_hot(digits, 5), ids, shape.astype(float))


def _darts(
    archs: Sequence[Any], features: Array, names: tuple[str, ...], ids: NDArray[np.int64]
) -> Pool:
    """Two cells of four inner nodes, each node with two (input, operator) pairs, in any order: so
    an operator is encoded where it is, at (input, node)."""
    pairs = np.array(archs)  # [N, 2, 8, 2]
    inner = np.repeat(np.arange(2, 6), 2)
    encodings, shapes = [], []
    for cell in range(2):
        sources, ops = pairs[:, cell, :, 0], pairs[:, cell, :, 1]
        hot = np.zeros((len(pairs), 6, 6, 7), np.float32)
        for edge, node in enumerate(inner):
            hot[np.arange(len(pairs)), sources[:, edge], node, ops[:, edge]] += 1
        encodings.append(hot.reshape(len(pairs), -1))
        # every inner node is joined into the output: an eighth kind of edge, always there
        joined = np.tile(np.arange(2, 6), (len(pairs), 1))
        both = np.concatenate([sources, joined], 1)
        kinds = np.concatenate([ops, np.full((len(pairs), 4), 7)], 1)
        targets = np.concatenate([inner, np.full(4, 6)])
        shapes.append(graph.features(both, targets, kinds, nodes=7, kinds=8))
    encoding = np.concatenate(encodings, 1)
    shape = np.concatenate(shapes, 1)
    return Pool(features, names, encoding[:, encoding.any(0)], ids, shape[:, np.ptp(shape, 0) > 0])
