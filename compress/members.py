"""Search without training: all members of a trained sub-space, ranked by held-out loss and cost
(AutoDistil, arXiv 2201.12507, section 3.4, "task-agnostic").

A member's loss is that of its slice of the shared weights on text that no step has seen; its cost
is counted from tensor shapes. Both are cheap enough for every member of a sub-space.
"""

from __future__ import annotations

import json
from collections.abc import Generator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from compress.distill import Student
from compress.lessons import read_by
from hw_profiles import lines
from nas import pareto
from nas.errors import BudgetInfeasible
from nas.seen import Seen
from nas.space import Genes, SearchSpace


@dataclass(frozen=True)
class Member:
    """A network of a space, what it costs and how far it is from the teacher."""

    genes: tuple[int, ...]
    loss: float
    macs: int
    params: int


def every(space: SearchSpace) -> Genes:
    """All rows of a space without inactive genes, [N, G]."""
    grid = np.indices(tuple(space.sizes.tolist())).reshape(len(space.genes), -1).T
    return np.unique(space.canonical(grid), axis=0)


@torch.no_grad()
def taught(teacher: Any, batches: Sequence[Tensor], lesson: nn.Module) -> list[Seen]:
    """What the teacher shows of each held-out batch, as far as the lesson reads it: computed once,
    compared with every member."""
    return [read_by(lesson, teacher(x)) for x in batches]


@torch.no_grad()
def loss_of(
    net: Student, arch: Any, lesson: nn.Module, batches: Sequence[Tensor], wanted: Sequence[Seen]
) -> float:
    """Mean over the examples of the held-out batches."""
    total = 0.0
    for x, seen in zip(batches, wanted, strict=True):
        total += float(lesson(net.look(x, arch), seen)) * len(x)
    return total / sum(len(x) for x in batches)


def rank(
    net: Any,
    space: SearchSpace,
    rows: Genes,
    lesson: nn.Module,
    held_out: tuple[Sequence[Tensor], Sequence[Seen]],
    *,
    kept: Path | None = None,
) -> Generator[Member, None, None]:
    """The members `rows` [N, G], one by one; with `kept` each is appended to that file when it is
    known, and those found there are not computed again. The caller answers for the file being of
    these weights."""
    known = _losses(kept) if kept is not None and kept.is_file() else {}
    net.eval()
    costs = space.costs(rows).astype(int).tolist()
    for row, (macs, params) in zip(rows, costs, strict=True):
        genes = tuple(row.tolist())
        if genes not in known:
            known[genes] = loss_of(net, space.decode(row), lesson, *held_out)
            if kept is not None:
                lines.append(kept, {"genes": genes, "loss": known[genes]})
        yield Member(genes, known[genes], macs, params)


def read(space: SearchSpace, kept: Path) -> list[Member]:
    """What `rank` has kept."""
    found = _losses(kept)
    costs = space.costs(np.array(list(found))).astype(int).tolist()
    return [
        Member(genes, loss, macs, params)
        for (genes, loss), (macs, params) in zip(found.items(), costs, strict=True)
    ]


def _losses(kept: Path) -> dict[tuple[int, ...], float]:
    rows = map(json.loads, lines.whole(kept))
    return {tuple(row["genes"]): row["loss"] for row in rows}


def front(members: Sequence[Member], costs: NDArray[np.float64]) -> list[int]:
    """Positions of the members that no other beats in loss and cost, the cheapest first."""
    losses = [member.loss for member in members]
    return pareto.front(np.column_stack([costs, losses])).tolist()


def best_within(members: Sequence[Member], costs: NDArray[np.float64], limit: float) -> int:
    """Position of the member of the lowest loss that costs at most `limit`; a larger limit never
    gives a larger loss. Raises BudgetInfeasible naming the cheapest."""
    inside = [at for at in range(len(members)) if costs[at] <= limit]
    if not inside:
        raise infeasible(limit, float(costs.min()), "ms")
    return min(inside, key=lambda at: (members[at].loss, costs[at], members[at].genes))


def infeasible(limit: float, least: float, quantity: str) -> BudgetInfeasible:
    return BudgetInfeasible(
        f"no student has at most {limit:.4g} {quantity}: the cheapest costs {least:.4g}",
        next="Ask for more, or distil a smaller sub-space.",
    )
