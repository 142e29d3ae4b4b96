"""Networks in, latency table out: measure, fit, and say how wrong the fit is.

A profile measures whole networks, never operators or blocks alone: random ones of common blocks
(`chains`), which make the table hold for any space, and random ones of the space that will be
searched, which make it sharp there. Other networks of that space, measured among them, are held out
of the fit and give the error that is printed with the table; `nasctl profile --validate` measures
yet others in processes of another time.

Every finished group of timings is in a JSON-lines file before the next group starts, so a profile
that was stopped goes on without measuring a network twice. A timing in doubt (the machine was busy)
is measured again while there is time, and no table is fitted on those that stay in doubt.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from scipy.stats import kendalltau

from hw_profiles import lines
from hw_profiles.device import Device
from hw_profiles.latency import Array, LatencyTable
from hw_profiles.measure import FRESH, GROUP, require_quiet
from hw_profiles.models import calibrate
from hw_profiles.models.calibrate import CHAINS as CHAINS
from hw_profiles.models.calibrate import MIN_NETWORKS
from hw_profiles.op import Op, to_row
from hw_profiles.protocol import SLOW, Progress, Timing, noise
from nas.errors import NasctlError

Ops = Sequence[Op]
NOISE = 0.03  # relative; no table is made on a machine that repeats itself worse
MIN_HELD_OUT = 10
KEPT = 40  # of the reference's rounds, per group


@dataclass(frozen=True, slots=True)
class Group:
    """What measuring some networks in one session gave."""

    timings: Sequence[Timing]
    reference_ms: Sequence[float]  # the reference's quiet rounds
    pace_ms: float | None = None  # the fastest it was seen, where that is known


Measure = Callable[[Sequence[Ops]], Group]


def digest(ops: Ops) -> str:
    """Names a network in the file of timings: its operators and how they are wired."""
    rows = [{**to_row(op), "reads": op.reads} for op in ops]
    return hashlib.sha256(json.dumps(rows).encode()).hexdigest()[:16]


class Timings:
    """The timings that a profile has so far, in an append-only JSON-lines file.

    `header` says what was measured and how (device, runtime, precision, batch, threads): the file
    of another header is refused. A line torn by a kill is dropped.
    """

    def __init__(self, path: Path, header: Mapping[str, object]) -> None:
        self.path = path
        self.found: dict[str, Timing] = {}
        self.groups: list[tuple[float, list[float]]] = []  # pace, reference, of each
        self.paces: dict[str, float] = {}  # of the group that each network was measured in
        if not path.exists():
            lines.append(path, {"header": header})
            return
        try:
            first, *rows = (json.loads(line) for line in lines.whole(path))
            there = dict(first["header"])
            for row in rows:
                self._add(row)
        except (ValueError, KeyError, TypeError) as error:
            raise NasctlError(
                f"damaged file of timings ({error})",
                where=str(path),
                next="Delete it to measure again.",
            ) from error
        changed = sorted(k for k in {*there, *header} if there.get(k) != header.get(k))
        if changed:
            said = (f"{k} {there.get(k)!r} there, {header.get(k)!r} here" for k in changed)
            raise NasctlError(
                f"holds timings of another profile: {'; '.join(said)}",
                where=str(path),
                next="Use another --out, or delete the file to measure again.",
            )

    def _add(self, row: Mapping[str, Any]) -> None:
        self.found |= {name: Timing(**values) for name, values in row["timings"].items()}
        pace = row.get("pace_ms") or math.nan
        self.groups.append((pace, row["reference_ms"]))
        self.paces |= dict.fromkeys(row["timings"], pace)

    @property
    def pace_ms(self) -> float:
        """The fastest that the reference was seen; infinite where nobody knows."""
        return min((pace for pace, _ in self.groups if pace == pace), default=math.inf)

    def _slow(self, pace: float) -> bool:
        """Was the machine slow for a whole group? Only a faster one shows it."""
        return pace > SLOW * self.pace_ms

    @property
    def noise(self) -> float:
        """The noise floor over all groups so far, relative."""
        calm = (found for pace, found in self.groups if not self._slow(pace))
        return noise([ms for found in calm for ms in found])

    def missing(self, networks: Sequence[Ops]) -> list[Ops]:
        """Those not measured yet, each once, and after them those whose timing is in doubt."""
        names = {digest(ops): ops for ops in networks}
        new = [ops for name, ops in names.items() if name not in self.found]
        doubtful = [ops for name, ops in names.items() if name in self.found and self._doubt(name)]
        return new + doubtful

    @property
    def doubtful(self) -> int:
        return sum(map(self._doubt, self.found))

    def _doubt(self, name: str) -> bool:
        return bool(self.found[name].noisy) or self._slow(self.paces[name])

    def measure(
        self,
        networks: Sequence[Ops],
        measure: Measure,
        *,
        enough: Callable[[], bool] = lambda: False,
        progress: Progress | None = None,
    ) -> None:
        """Measure what is missing, in their order, in groups; stop early when `enough()`.

        Raises NasctlError for a timing that is not a positive number.
        """
        missing = self.missing(networks)
        # several processes even for few networks: each is some per cent off as a whole
        size = min(GROUP, max(1, -(-len(networks) // FRESH)))
        for start in range(0, len(missing), size):
            if enough():
                return
            group = missing[start : start + size]
            result = measure(group)
            for timing in result.timings:
                if not (np.isfinite(timing.median_ms) and timing.median_ms > 0):
                    raise NasctlError(f"measured {timing.median_ms} ms", where=str(self.path))
            names = map(digest, group)
            row = {
                "timings": {
                    name: asdict(timing) for name, timing in zip(names, result.timings, strict=True)
                },
                "reference_ms": list(result.reference_ms[:: 1 + len(result.reference_ms) // KEPT]),
                "pace_ms": result.pace_ms,
            }
            lines.append(self.path, row)
            self._add(row)
            if progress:
                progress((start + len(group)) / len(missing))

    def samples(self, networks: Sequence[Ops]) -> list[tuple[Ops, float]]:
        """(network, its median in ms) of those that were measured and are not in doubt."""
        named = [(ops, digest(ops)) for ops in networks]
        return [
            (ops, self.found[name].median_ms)
            for ops, name in named
            if name in self.found and not self._doubt(name)
        ]


@dataclass(frozen=True)
class Plan:
    """The networks of a profile."""

    space: str  # whose networks `mine` and `held_out` are; "" without one
    mine: Sequence[Ops]
    chains: Sequence[Ops]
    held_out: Sequence[Ops]  # never fitted on

    def order(self) -> list[Ops]:
        """For measuring: at any time about the same share of every set is done, so that a profile
        may end at any time."""
        sets = (self.held_out, self.mine, self.chains)
        placed = [(at / len(part), ops) for part in sets for at, ops in enumerate(part)]
        return [ops for _, ops in sorted(placed, key=lambda pair: pair[0])]


Samples = Sequence[tuple[Ops, float]]  # (operators of a network, its ms)
#: (networks of a space, random networks, device, space) -> table
Fit = Callable[[Samples, Samples, Device, str], LatencyTable]


def calibrated(mine: Samples, chains: Samples, device: Device, space: str) -> LatencyTable:
    """From this device's own measurements alone."""
    return calibrate.fit(mine, device, space=space, source_text="measured", chains=chains)


def table(
    timings: Timings,
    plan: Plan,
    device: Device,
    provenance: Mapping[str, str | int | float],
    fit: Fit = calibrated,
) -> tuple[LatencyTable, Errors | None]:
    """Fit on what was measured, and the errors on the networks held out (None: too few of them).

    Raises NasctlError when too few timings are beyond doubt, or the machine is too noisy.
    """
    mine, chains = timings.samples(plan.mine), timings.samples(plan.chains)
    held_out = timings.samples(plan.held_out)
    doubtful = timings.doubtful
    samples, others = (mine, chains) if plan.space else (chains, [])
    if len(samples) < MIN_NETWORKS:
        raise NasctlError(
            f"{len(samples)} networks were measured beyond doubt, {doubtful} others were not",
            where=str(timings.path),
            allowed=f"at least {MIN_NETWORKS}",
            next="Stop what else runs there, or give it more time: the same command goes on.",
        )
    require_quiet(timings.noise, NOISE)
    fitted = fit(samples, others, device, plan.space or CHAINS)
    errors = None
    if len(held_out) >= MIN_HELD_OUT:
        networks, measured = zip(*held_out, strict=True)
        errors = validate(fitted, networks, measured, plan.space or CHAINS)
    said = {"noise": timings.noise, **provenance}
    said |= {"pace_ms": timings.pace_ms} if math.isfinite(timings.pace_ms) else {}
    said |= {f"held_out_{name}": value for name, value in asdict(errors).items()} if errors else {}
    held_for = {
        "provenance": said,
        "batch": provenance.get("batch", 1),
        "origin": f"{fitted.origin}: {len(mine)} networks of {plan.space or 'no space'} and "
        f"{len(chains)} random ones; {doubtful} timings in doubt were left out",
    }
    return fitted.model_copy(update=held_for), errors


@dataclass(frozen=True, slots=True)
class Errors:
    """How far predictions were from measurements of networks that the fit did not see."""

    n: int
    mape: float  # percent, as are the next four
    bias: float  # median of predicted / measured - 1
    within_5: float
    within_10: float
    worst: float
    tau: float  # Kendall's, of the order
    inside: float  # percent inside the printed interval

    @classmethod
    def of(cls, predicted: Array, measured: Array, low: Array, high: Array) -> Errors:
        off = 100 * (predicted / measured - 1)
        return cls(
            n=len(off),
            mape=float(np.abs(off).mean()),
            bias=float(np.median(off)),
            within_5=float(100 * (np.abs(off) <= 5).mean()),
            within_10=float(100 * (np.abs(off) <= 10).mean()),
            worst=float(np.abs(off).max()),
            tau=float(kendalltau(measured, predicted).statistic),
            inside=float(100 * ((low <= measured) & (measured <= high)).mean()),
        )


def validate(
    table: LatencyTable, networks: Sequence[Ops], measured_ms: Sequence[float], space: str
) -> Errors:
    """The table's errors on networks of `space` that it was not fitted on."""
    estimates = [table.estimate(ops, space) for ops in networks]
    value, low, high = (
        np.array([getattr(e, name) for e in estimates])
        for name in ("value_ms", "low_ms", "high_ms")
    )
    return Errors.of(value, np.asarray(measured_ms, dtype=float), low, high)
