"""Spaces in which every network's value on several tasks is known, addressed by genes.

TransNAS-Bench-101 (CVPR 2021): micro (six edges, four operators) and macro (four to six modules of
four kinds). Landscapes are invented, for choosing settings only: no result is ever quoted on them.
"""

from __future__ import annotations

import ast
import itertools
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
from numpy.typing import NDArray

from nas.mixture import Array
from nas.space import Genes

MODULES = 4  # kinds of module in the macro space
SHORTEST, LONGEST = 4, 6  # networks of the macro space, in modules


@dataclass(frozen=True)
class Table:
    """N networks; `at` maps genes to a network's row, or to -1 where there is none."""

    name: str
    tasks: tuple[str, ...]
    sizes: NDArray[np.int64]  # options of each gene [G]
    at: NDArray[np.int64]  # [options of gene 0, options of gene 1, ...]
    values: Array  # [N, T], higher is better

    @property
    def ranks(self) -> NDArray[np.int64]:
        """[N, T]; 1 is the best, equals share the better rank."""
        ascending = np.sort(-self.values, axis=0)
        found = [
            np.searchsorted(column, -values) + 1
            for column, values in zip(ascending.T, self.values.T, strict=True)
        ]
        return np.stack(found, 1)

    @property
    def regrets(self) -> Array:
        """[N, T] in deviations of the task's values."""
        gaps: Array = (self.values.max(0) - self.values) / self.values.std(0)
        return gaps

    def rows(self, genes: Genes) -> NDArray[np.int64]:
        """Networks [M] of genes [M, G]; -1 where the space has no such network."""
        found: NDArray[np.int64] = self.at[tuple(genes.T)]
        return found

    def best_shared(self) -> int:
        """The network of the best mean rank over the tasks: known to nobody without the table."""
        return int(self.ranks.mean(1).argmin())


def transnas(folder: Path, space: str) -> Table:
    """`space` micro or macro, all tasks that the folder has of it."""
    found: dict[tuple[int, ...], dict[str, float]] = {}
    for row in pq.read_table(folder / "transnasbench101.parquet").to_pylist():
        if row["benchmark"] == f"transbench101_{space}":
            arch = tuple(ast.literal_eval(row["arch"]))
            found.setdefault(arch, {})[row["task"]] = row["val_final"]
    tasks = tuple(sorted(next(iter(found.values()))))
    archs = sorted(found)
    values = np.array([[found[arch][task] for task in tasks] for arch in archs])
    sizes, at = _micro(archs) if space == "micro" else _macro(archs)
    return Table(f"transnas-{space}", tasks, sizes, at, values)


def _micro(archs: list[tuple[int, ...]]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    sizes = np.array(archs).max(0) + 1
    at = np.full(sizes, -1)
    at[tuple(np.array(archs).T)] = np.arange(len(archs))
    return sizes, at


def _macro(archs: list[tuple[int, ...]]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Genes: the number of modules, then six modules of which the first so many count."""
    sizes = np.array([LONGEST - SHORTEST + 1, *(MODULES,) * LONGEST])
    number = {arch: row for row, arch in enumerate(archs)}
    at = np.full(sizes, -1)
    for genes in itertools.product(*map(range, sizes.tolist())):
        modules = tuple(module + 1 for module in genes[1 : 1 + SHORTEST + genes[0]])
        at[genes] = number.get(modules, -1)
    return sizes, at


def landscape(seed: int, tasks: int = 3) -> Table:
    """4^6 networks: half of every task is common, genes interact in pairs and triples, and bad
    networks are very bad."""
    rng, genes, options = np.random.default_rng((seed, 77)), 6, 4
    every = np.array(list(itertools.product(range(options), repeat=genes)))

    def one() -> Array:
        value = np.zeros(len(every))
        for size, weight, count in ((1, 1.0, 6), (2, 0.5, 15), (3, 0.5, 6)):
            for group in rng.permutation(list(itertools.combinations(range(genes), size)))[:count]:
                value += weight * rng.normal(size=(options,) * size)[tuple(every[:, group].T)]
        return value

    common = one()
    mixed = np.stack([common + 0.7 * one() for _ in range(tasks)], 1)
    values = 0.02 * mixed - np.log1p(np.exp(-mixed / 2))
    at = np.arange(len(every)).reshape((options,) * genes)
    names = tuple(f"task{t}" for t in range(tasks))
    return Table(f"landscape-{seed}", names, np.full(genes, options), at, values)
