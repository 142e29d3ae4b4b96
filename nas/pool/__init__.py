"""Searching a finite pool of networks whose cheap features are known: one file per method.

A file gives one function, `search(pool, budget, seed)`: a generator that yields the row to query
next and is sent what the expensive objective said (higher is better; NaN: it failed, the query is
spent). It asks for distinct rows, `budget` of them or all there are, and is a function of its
arguments and of the answers, so that replaying a history (`next_query`) gives the next query and
nothing but the history need be kept. Hard budgets (latency first) are the caller's: a pool holds
only what is inside them.

Imports without torch.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from nas.errors import NasctlError, unknown

Array = NDArray[np.float64]
Search = Generator[int, float, None]
NOT_METHODS = {"__init__", "graph", "scales", "single"}  # the other files of this folder


@dataclass(frozen=True)
class Pool:
    """N networks. Rows may come in any order: methods see them in the order of their ids.

    Raises NasctlError where the shapes disagree or an id occurs twice.
    """

    features: Array  # [N, m] any scale, any sign; NaN or infinite: missing
    names: tuple[str, ...]  # [m]
    encoding: NDArray[np.float32]  # [N, F] of the architecture (one-hot genes); F may be 0
    ids: NDArray[np.int64]  # [N] distinct: whose tie it is
    graph: Array = field(default_factory=lambda: np.zeros((0, 0)))  # [N, H] of `nas.pool.graph`

    def __post_init__(self) -> None:
        n, m = self.features.shape
        if self.graph.size == 0:
            object.__setattr__(self, "graph", np.zeros((n, 0)))
        lengths = {len(self.encoding), len(self.ids), len(self.graph), n}
        if len(lengths) > 1 or m != len(self.names) or len(np.unique(self.ids)) != n:
            raise NasctlError(
                f"{n} rows of {m} features do not go with {len(self.names)} names, "
                f"{len(self.encoding)} encodings and {len(np.unique(self.ids))} distinct ids",
                where="pool",
            )

    def __len__(self) -> int:
        return len(self.features)

    def take(self, rows: NDArray[np.int64]) -> Pool:
        """The networks in these rows, in this order."""
        return replace(
            self,
            features=self.features[rows],
            encoding=self.encoding[rows],
            ids=self.ids[rows],
            graph=self.graph[rows],
        )


#: (pool with ascending ids, budget <= its length, seed) -> its queries
Method = Callable[[Pool, int, int], Search]
#: what was asked and answered, in order: (row, value), NaN or None where the objective failed
History = Sequence[tuple[int, float | None]]


def queries(method: Method, pool: Pool, budget: int, seed: int) -> Search:
    """The rows of `pool` that `method` asks for, at most `budget` and at most all of them.

    Sorting by id here is why the order of a pool's rows means nothing to any method.
    """
    if not len(pool):
        return
    order = np.argsort(pool.ids)
    sorted_pool = pool if (np.diff(order) == 1).all() else pool.take(order)
    inner = method(sorted_pool, min(budget, len(pool)), seed)
    answer = None
    while True:
        try:
            at = next(inner) if answer is None else inner.send(answer)
        except StopIteration:
            return
        value = yield int(order[at])
        answer = value if value is not None and math.isfinite(value) else math.nan


def next_query(method: Method, pool: Pool, budget: int, seed: int, history: History) -> int | None:
    """The row to query after `history`, or None when the budget is spent.

    Raises NasctlError if `history` is not what this search would have asked.
    """
    search = queries(method, pool, budget, seed)
    asked = next(search, None)
    for row, value in history:
        if asked != row:
            raise NasctlError(
                f"the history queried row {row} where this search queries {asked}",
                where="pool",
                next="It belongs to another pool, budget, seed or version: start a new search.",
            )
        try:
            asked = search.send(math.nan if value is None else value)
        except StopIteration:
            asked = None
    return asked


def run(
    method: Method, pool: Pool, objective: Callable[[int], float | None], budget: int, seed: int
) -> list[tuple[int, float]]:
    """Query `objective(row)` until the budget is spent: (row, value) in order, NaN where it
    failed."""
    found: list[tuple[int, float]] = []
    search = queries(method, pool, budget, seed)
    try:
        row = next(search)
        while True:
            said = objective(row)
            found.append((row, math.nan if said is None else said))
            row = search.send(found[-1][1])
    except StopIteration:
        return found


def best(found: Sequence[tuple[int, float]]) -> int:
    """The row of the highest value, the first one found of equals.

    Raises NasctlError where every query failed.
    """
    alive = [(value, -at) for at, (_, value) in enumerate(found) if math.isfinite(value)]
    if not alive:
        raise NasctlError(f"all {len(found)} evaluations failed", where="objective")
    return found[-max(alive)[1]][0]


def names() -> list[str]:
    """Every method, by file name."""
    stems = {path.stem for path in Path(__file__).parent.glob("*.py")} - NOT_METHODS
    return sorted(stem.replace("_", "-") for stem in stems)


def load(name: str) -> Method:
    """The `search` of method `name`."""
    if name not in names():
        raise unknown("pool search", name, names(), where="--method")
    method: Method = importlib.import_module(f"nas.pool.{name.replace('-', '_')}").search
    return method
