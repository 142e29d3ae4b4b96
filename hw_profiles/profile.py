"""Networks in, latency table out: measure, fit, and say how wrong the fit is.

A profile measures whole networks, never operators or blocks alone: random ones of common blocks
(`chains`), which make the table hold for any space, and random ones of the space that will be
searched, which make it sharp there. Other networks of that space are held out, measured in a
session of their own, and give the error that is printed with the table.

Every finished group of timings is in a JSON-lines file before the next group starts, so a profile
that was stopped goes on without measuring a network twice.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from scipy.stats import kendalltau

from hw_profiles.latency import Array, LatencyTable
from hw_profiles.measure import GROUP, Progress, Timing
from hw_profiles.op import Op
from nas.errors import NasctlError

Ops = Sequence[Op]
#: times a group of networks in one session, interleaved with each other and a reference
Measure = Callable[[Sequence[Ops]], Sequence[Timing]]


def digest(ops: Ops) -> str:
    """Names a network in the file of timings: its operators and how they are wired."""
    rows = [[getattr(op, name) for name in Op.__dataclass_fields__ if name != "slot"] for op in ops]
    return hashlib.sha256(json.dumps(rows).encode()).hexdigest()[:16]


class Timings:
    """The timings that a profile has so far, in an append-only JSON-lines file.

    `header` says what was measured and how (device, runtime, precision, batch, threads): the file
    of another header is refused. A line torn by a kill is dropped.
    """

    def __init__(self, path: Path, header: dict[str, object]) -> None:
        self.path = path
        self.found: dict[str, Timing] = {}
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            self._append({"header": header})
            return
        whole = path.read_bytes()
        kept = whole[: whole.rfind(b"\n") + 1]
        if kept != whole:
            with path.open("r+b") as file:
                file.truncate(len(kept))
        try:
            first, *lines = (json.loads(line) for line in kept.splitlines())
            there = first["header"]
            for line in lines:
                self.found[line.pop("network")] = Timing(**line)
        except (ValueError, KeyError, TypeError) as error:
            raise NasctlError(
                f"damaged file of timings ({error})",
                where=str(path),
                next="Delete it to measure again.",
            ) from error
        if there != header:
            changed = sorted(k for k in header if there.get(k) != header[k])
            said = "; ".join(f"{k} {there.get(k)!r} there, {header[k]!r} here" for k in changed)
            raise NasctlError(
                f"holds timings of another profile: {said}",
                where=str(path),
                next="Use another --out, or delete the file to measure again.",
            )

    def _append(self, *rows: dict[str, object]) -> None:
        with self.path.open("a", encoding="utf-8") as file:
            file.writelines(json.dumps(row) + "\n" for row in rows)
            file.flush()
            os.fsync(file.fileno())

    def of(
        self,
        networks: Sequence[Ops],
        measure: Measure,
        *,
        rng: np.random.Generator,
        progress: Progress | None = None,
    ) -> list[Timing]:
        """Timings of the networks, measuring those that the file lacks in groups drawn at random.

        Raises NasctlError for a timing that is not a positive number.
        """
        names = [digest(ops) for ops in networks]
        missing = [at for at, name in enumerate(names) if name not in self.found]
        missing = list({names[at]: at for at in missing}.values())
        order = rng.permutation(missing).astype(int)
        for start in range(0, len(order), GROUP):
            group = order[start : start + GROUP]
            timings = measure([networks[at] for at in group])
            rows = []
            for at, timing in zip(group, timings, strict=True):
                if not (np.isfinite(timing.median_ms) and timing.median_ms > 0):
                    raise NasctlError(f"measured {timing.median_ms} ms", where=str(self.path))
                self.found[names[at]] = timing
                rows.append({"network": names[at], **asdict(timing)})
            self._append(*rows)
            if progress:
                progress((start + len(group)) / len(order))
        return [self.found[name] for name in names]


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
