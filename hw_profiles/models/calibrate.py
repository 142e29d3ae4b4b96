"""fit: measured whole networks in, a LatencyTable out.

Weighted (relative error) non-negative least squares over counts, MACs and bytes per family of
operators plus one constant per network. No coefficient may promise more than the device's
datasheet: rates are bounded by its peak and its bandwidth where these are known. What these terms
get wrong, operator by operator, is learned on top (`additive`). The interval of the table comes
from networks that were held out of both.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import nnls

from hw_profiles.device import Device
from hw_profiles.families import COARSE, FAMILIES, shares
from hw_profiles.latency import LEAST, Array, Interval, LatencyTable, Terms
from hw_profiles.latency import transfer_intervals as transfer
from hw_profiles.models.additive import Hyper, Process
from hw_profiles.op import Op
from nas.errors import NasctlError

Index = NDArray[np.intp]
MIN_NETWORKS = 10
CHAINS = "chains"  # the name of the random networks, which are of no space
FOLDS = 5
QUANTILES = (0.05, 0.95)
#: whose terms a family takes when the measured networks cannot tell its own; the first found
STAND_INS = {
    "conv": ("dwconv", "linear"),
    "dwconv": ("conv", "linear"),
    "linear": ("conv",),
    "pool": ("join", "conv"),
    "join": ("pool", "conv"),
    "act": ("join", "pool"),
    "pointwise": ("conv", "linear"),
    "grouped": ("conv", "pointwise"),
    "ragged": ("dwconv", "conv"),
    "gap": ("pool", "join"),
    "mul": ("join", "pool"),
    "upsample": ("join", "pool"),
    "epilogue": ("act", "join"),
}


@dataclass(frozen=True)
class Ridge:
    """What decides where the data leave it open which term a cost belongs to.

    In a cell-based space they leave much open: every cell is repeated in each stage, so counts,
    MACs and bytes of an operator rise together. A term is penalised by the square of its share of
    the latency, a rate by its multiple of `slack` times the datasheet's (a GPU that needs 10 ms for
    what its datasheet does in 0.04 ms is waiting for launches, not computing), and an activation
    more than the convolution beside it, into which runtimes fuse it. The penalties are far below
    any measurement's noise. benchmarks/latency_transfer.py compares this with simpler rules.
    """

    constant: float = 1e-7
    term: float = 1e-5
    bytes: float = 1e-5
    act: float = 1e-2
    slack: float | None = 30.0

    def of(self, family: str, whole: Array, floor: Array) -> Array:
        """Per coefficient of a family; `whole` are the ones that would explain all the latency."""
        if family == "act":
            return self.act / whole**2
        penalty = np.array([self.term, self.term, self.bytes]) / whole**2
        if self.slack is None:
            return penalty
        known = floor > 0
        penalty[known] = self.term / (self.slack * floor[known]) ** 2
        return penalty


@dataclass(frozen=True)
class Design:
    """Per network and family: how many operators, their GMACs and their MB."""

    features: Array  # networks x families x 3
    floor: Array  # 3: what the datasheet says that one operator, GMAC and MB cost at least

    @classmethod
    def of(cls, networks: Sequence[Sequence[Op]], device: Device, tile: int = 0) -> Design:
        features = np.zeros((len(networks), len(FAMILIES), 3))
        rows: dict[Op, list[tuple[int, Array]]] = {}
        for at, ops in enumerate(networks):
            for op in ops:
                if op not in rows:
                    rows[op] = _rows(op, device.itemsize, tile)
                for family, row in rows[op]:
                    features[at, family] += row
        compute = 1e3 / device.peak if device.peak else 0.0
        memory = 1 / device.bandwidth_gb_per_s if device.bandwidth_gb_per_s else 0.0
        return cls(features, np.array([0.0, compute, memory]))

    def owners(self) -> dict[str, str]:
        """Family -> the family whose terms it has: its own where the networks differ in it."""
        spread = np.ptp(self.features, axis=0)
        varies = (spread > 1e-9 * np.abs(self.features).max(axis=0)).any(axis=1)
        own = {family for family, differs in zip(FAMILIES, varies, strict=True) if differs}
        owners = {family: family for family in own}
        for family in (family for family in FAMILIES if family not in own):
            owners[family] = next((other for other in STAND_INS[family] if other in own), "")
        return owners

    def rows(self, chosen: NDArray[Any]) -> Design:
        return Design(self.features[chosen], self.floor)


def _rows(op: Op, itemsize: int, tile: int) -> list[tuple[int, Array]]:
    return [
        (FAMILIES.index(family), np.array(amounts))
        for family, *amounts in shares(op, itemsize, tile)
    ]


def solve(design: Design, times: Array, ridge: Ridge) -> tuple[float, dict[str, Array]]:
    """(constant, family -> [ms per operator, per GMAC, per MB]); all non-negative."""
    owners = design.owners()
    own = [family for family in FAMILIES if owners[family] == family]
    pooled = np.zeros((len(times), len(own), 3))
    promised = np.zeros(len(times))
    for at, family in enumerate(FAMILIES):
        promised += design.features[:, at] @ design.floor
        if owners[family]:
            pooled[:, own.index(owners[family])] += design.features[:, at]
    terms = np.column_stack([np.ones(len(times)), pooled.reshape(len(times), -1)])
    relative = terms / times[:, None]
    mean = relative.mean(axis=0)
    whole = np.divide(1.0, mean, out=np.full_like(mean, np.inf), where=mean > 0)
    penalty = [ridge.constant / whole[:1] ** 2]
    for at, family in enumerate(own):
        penalty.append(ridge.of(family, whole[1 + 3 * at : 4 + 3 * at], design.floor))
    weights = _nnls(relative, 1 - promised / times, np.concatenate(penalty), whole)
    coefficients = weights[1:].reshape(-1, 3) + design.floor
    fitted = {
        family: coefficients[own.index(owner)] if owner else design.floor
        for family, owner in owners.items()
    }
    return float(weights[0]), fitted


def _nnls(terms: Array, goal: Array, penalty: Array, whole: Array) -> Array:
    """Non-negative ridge regression; columns that are zero everywhere get weight 0."""
    used = np.isfinite(whole)
    scale = whole[used]
    ridge = np.sqrt(len(goal) * penalty[used]) * scale  # in proportion to n, so that n is neutral
    system = np.vstack([terms[:, used] * scale, np.diag(ridge)])
    weights = np.zeros(terms.shape[1])
    weights[used] = scale * nnls(system, np.concatenate([goal, np.zeros(len(ridge))]))[0]
    return weights


def predict(design: Design, constant: float, fitted: dict[str, Array]) -> Array:
    coefficients = np.stack([fitted[family] for family in FAMILIES])
    return constant + np.einsum("nft,ft->n", design.features, coefficients)


def held_out_ratios(
    design: Design, times: Array, groups: Index, ridge: Ridge
) -> tuple[Array, Index]:
    """(measured / predicted by a fit on the other folds, the fold of each network)."""
    folds = folds_of(groups)
    ratios = np.empty(len(times))
    for fold in range(FOLDS):
        inside = folds == fold
        constant, fitted = solve(design.rows(~inside), times[~inside], ridge)
        ratios[inside] = times[inside] / predict(design.rows(inside), constant, fitted)
    return ratios, folds


def folds_of(groups: Index) -> Index:
    """The fold of each network; those of one group are in one fold."""
    unique, index = np.unique(groups, return_inverse=True)
    order = np.random.default_rng(0).permutation(len(unique))
    return np.asarray((order % FOLDS)[index])


def interval_of(ratios: Array, groups: Index, how: str) -> Interval:
    """The 90 % interval of all ratios; its coverage by setting it without each group in turn."""
    hits = 0
    for group in np.unique(groups):
        low, high = quantiles(ratios[groups != group])
        inside = ratios[groups == group]
        hits += int(((low <= inside) & (inside <= high)).sum())
    low, high = quantiles(ratios)
    return Interval(low=low, high=high, n=len(ratios), coverage=hits / len(ratios), how=how)


def quantiles(ratios: Array) -> tuple[float, float]:
    """5 % and 95 %, rounded outwards: few networks give a wide interval, not a lucky one."""
    low = np.quantile(ratios, QUANTILES[0], method="lower")
    return float(low), float(np.quantile(ratios, QUANTILES[1], method="higher"))


@dataclass(frozen=True)
class Wholes:
    """Networks as counts of their distinct operators, and what each operator is alone."""

    counts: Array  # networks x operators
    ops: tuple[Op, ...]
    each: Design  # of every operator alone

    @classmethod
    def of(cls, networks: Sequence[Sequence[Op]], device: Device, tile: int) -> Wholes:
        at = {op: n for n, op in enumerate(dict.fromkeys(op for ops in networks for op in ops))}
        counts = np.zeros((len(networks), len(at)))
        for row, ops in enumerate(networks):
            np.add.at(counts[row], [at[op] for op in ops], 1.0)
        return cls(counts, tuple(at), Design.of([[op] for op in at], device, tile))

    def design(self) -> Design:
        return Design(np.einsum("nu,uft->nft", self.counts, self.each.features), self.each.floor)


def fit(
    samples: Sequence[tuple[Sequence[Op], float]],
    device: Device,
    *,
    space: str,
    source_text: str,
    chains: Sequence[tuple[Sequence[Op], float]] = (),
    ridge: Ridge = Ridge(),
) -> LatencyTable:
    """`samples` are (operators of a whole network, its measured ms) from the space named; `chains`
    the same of random networks (`hw_profiles.chains`), which hold for any other space."""
    both = [*samples, *chains]
    times = np.array([ms for _, ms in both], dtype=float)
    networks = [tuple(ops) for ops, _ in both]
    distinct = {ops: at for at, ops in enumerate(dict.fromkeys(networks))}
    if len(distinct) < MIN_NETWORKS:
        raise NasctlError(
            f"{len(distinct)} different networks are too few to fit a latency table",
            where=device.name,
            allowed=f"at least {MIN_NETWORKS}",
        )
    if not (np.isfinite(times) & (times > 0)).all():
        raise NasctlError("every measured latency must be positive", where=device.name)
    many = space == CHAINS or len(chains) >= MIN_NETWORKS
    tile = device.tile if many else 0  # of one space's networks the finer terms would be guesses
    wholes = Wholes.of(networks, device, tile)
    design = wholes.design()
    constant, fitted = solve(design, times, ridge)
    expected = predict(design, constant, fitted)
    shares = wholes.counts * predict(wholes.each, 0.0, fitted) / expected[:, None]
    process = Process.of(shares, wholes.ops)
    hyper = process.choose(times / expected - 1, np.random.default_rng(0))
    groups = np.array([distinct[ops] for ops in networks])
    ratios, folds = _held_out(process, hyper, design, times, groups, ridge)
    mine = np.arange(len(both)) < len(samples)
    same = interval_of(ratios[mine], folds[mine], f"{FOLDS} folds of {space}, grouped by network")
    # what no fitted network contains takes another family's terms: the transfers tested just that
    cross = transfer()[f"cross_{device.kind}"]
    other = cross
    if len(chains) >= MIN_NETWORKS:
        how = f"{FOLDS} folds of random networks of common blocks"
        other = interval_of(ratios[~mine], folds[~mine], how)
    return LatencyTable(
        device=device.name,
        runtime=device.runtime,
        precision=device.precision,
        origin=source_text,
        fitted_on=(space,),
        tile=tile,
        fitted_kinds=tuple(sorted({op.kind for ops in distinct for op in ops})),
        constant_ms=constant,
        terms=_terms(design, fitted, FAMILIES if tile else COARSE),
        learned=process.fit(hyper, times / expected - 1),
        intervals={
            "same": same,
            # random networks are of no space: what held for them holds for any
            "cross": same if space == CHAINS else other,
            "analytic": cross,
        },
    )


def _held_out(
    process: Process, hyper: Hyper, design: Design, times: Array, groups: Index, ridge: Ridge
) -> tuple[Array, Index]:
    """(measured / predicted by a fit on the other folds, the fold of each network).

    Terms and corrections are fitted without the fold; the hyper-parameters, and how a network's
    time is shared out among its operators, are those of the whole set.
    """
    folds = folds_of(groups)
    ratios = np.empty(len(times))
    for fold in range(FOLDS):
        unseen, seen = np.flatnonzero(folds == fold), np.flatnonzero(folds != fold)
        if not len(unseen):
            continue
        constant, fitted = solve(design.rows(seen), times[seen], ridge)
        known = times[seen] / predict(design.rows(seen), constant, fitted) - 1
        factor = 1 + process.predict(hyper, known, seen, unseen)
        factor = np.maximum(LEAST, factor)  # as the table does, operator by operator
        expected = predict(design.rows(unseen), constant, fitted)
        ratios[unseen] = times[unseen] / (expected * factor)
    return ratios, folds


def _terms(design: Design, fitted: dict[str, Array], names: Sequence[str]) -> dict[str, Terms]:
    owners = design.owners()
    terms = {}
    for family in names:
        overhead, compute, memory = (float(value) for value in fitted[family])
        if not (owners[family] or compute or memory):
            continue  # no datasheet and no stand-in: an unknown operator, which is an error
        terms[family] = Terms(
            overhead_ms=overhead,
            ms_per_gmac=compute,
            ms_per_mb=memory,
            note=""
            if owners[family] == family
            else f"those of {owners[family] or 'the datasheet'}",
        )
    return terms
