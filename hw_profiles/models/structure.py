"""describe: what a latency predictor may know about a network, folded from its op list.

One row of numbers per network, the same columns for every search space. A row has three parts:

work    per role of operator: how many, their MACs and bytes, and the square roots of these, which
        stand between "every operator costs the same" and "cost is in proportion to size"; the
        costliest chain of operators that wait for one another; how many could run side by side
chains  which role reads which, and whether as its only reader: decides if a runtime can fuse them
joins   which roles are read side by side, and which results are joined: what a runtime can merge

Sizes are in `work` only: chains and joins count. Roles instead of kinds, because a pointwise
convolution is fused and merged by other rules than a spatial one.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from functools import lru_cache
from itertools import combinations
from operator import add

import numpy as np

from hw_profiles.latency import Array
from hw_profiles.op import INPUT, KINDS, Op
from nas.errors import NasctlError

ROLES = ("pointwise", "spatial", "dwconv", "linear", "pool", "add", "mul", "concat", "act")
JOINS = ("add", "mul", "concat")
AS = {"embed": "add", "position": "add", "layernorm": "act", "attention": "linear"}
POOLS = ("avgpool", "maxpool", "gap", "upsample")  # a map of another size
MEASURES = ("ops", "gmacs", "mb", "root_gmacs", "root_mb")
_PAIRS = len(ROLES) ** 2

Row = tuple[float, ...]

WORK = slice(0, (len(ROLES) + 1) * len(MEASURES) + 2)
CHAINS = slice(WORK.stop, WORK.stop + 2 * _PAIRS)
JOINED = slice(CHAINS.stop, CHAINS.stop + 2 * _PAIRS)
WIDTH = JOINED.stop


def describe(networks: Sequence[Sequence[Op]]) -> Array:
    """(networks, WIDTH); the slices WORK, CHAINS and JOINED are its parts."""
    rows = np.empty((len(networks), WIDTH))
    for at, ops in enumerate(networks):
        if not ops:
            raise NasctlError("a network without operators", where=f"network {at}")
        rows[at, WORK] = _work(ops)
        rows[at, CHAINS], rows[at, JOINED] = _wiring(ops)
    return rows


@lru_cache(maxsize=100_000)
def _role(op: Op) -> int:
    if op.kind not in KINDS:
        raise NasctlError(f"cannot describe operator '{op.kind}'", allowed=KINDS)
    if op.kind == "conv":
        return ROLES.index("pointwise" if op.kernel == 1 else "spatial")
    return ROLES.index("pool" if op.kind in POOLS else AS.get(op.kind, op.kind))


@lru_cache(maxsize=100_000)
def _cost(op: Op) -> Row:
    """One operator's share of every measure."""
    gmacs, mb = op.macs * 1e-9, op.bytes() * 1e-6
    return 1.0, gmacs, mb, gmacs**0.5, mb**0.5


def _work(ops: Sequence[Op]) -> Array:
    sums = np.zeros((len(ROLES), len(MEASURES)))
    for op, times in Counter(ops).items():
        sums[_role(op)] += np.multiply(times, _cost(op))
    chain, abreast = _longest(ops)
    return np.concatenate([sums.ravel(), chain, abreast])


def _longest(ops: Sequence[Op]) -> tuple[Row, Row]:
    """(the costliest chain by each measure, (most ops in one step, steps with several ops))."""
    ends: list[Row] = []
    for op in ops:
        before = [ends[read] for read in set(op.reads) if read != INPUT]
        waits: Sequence[float] = before[0] if before else (0.0,) * len(MEASURES)
        if len(before) > 1:
            waits = tuple(map(max, *before))
        ends.append(tuple(map(add, _cost(op), waits)))
    steps = Counter(end[0] for end in ends)
    several = sum(count > 1 for count in steps.values())
    return tuple(map(max, *ends)) if len(ends) > 1 else ends[0], (max(steps.values()), several)


def _wiring(ops: Sequence[Op]) -> tuple[Array, Array]:
    """Counts of (writer, alone or shared, reader), and of pairs that share an input or a join."""
    roles = [_role(op) for op in ops]
    readers: list[list[int]] = [[] for _ in ops]
    joined: Counter[int] = Counter()
    for op, role in zip(ops, roles, strict=True):
        sources = [read for read in set(op.reads) if read != INPUT]
        for read in sources:
            readers[read].append(role)
        if ROLES[role] in JOINS:
            joined.update(_pairs([roles[read] for read in sources], _PAIRS))
    chains: Counter[int] = Counter()
    for role, found in zip(roles, readers, strict=True):
        shared = len(found) > 1
        chains.update((role * 2 + shared) * len(ROLES) + reader for reader in found)
        joined.update(_pairs(found, 0))
    return _counts(chains), _counts(joined)


def _pairs(roles: Sequence[int], offset: int) -> list[int]:
    return [offset + a * len(ROLES) + b for a, b in combinations(sorted(roles), 2)]


def _counts(found: Counter[int]) -> Array:
    row = np.zeros(2 * _PAIRS)
    row[list(found)] = list(found.values())
    return row
