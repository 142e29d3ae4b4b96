"""LatencyTable: op lists in, milliseconds with an interval and a source out.

A network costs a constant plus the sum over its operators of

    overhead + MACs / throughput + bytes / bandwidth        (one set of terms per family)

times what was learned on top of that (`models.additive`), unless an operator was measured itself or
lies between kernels that were (`kernels`). Times are for the device, runtime, precision and batch
in the table's header. An interval is where 90 % of the measured / predicted ratios fell on networks
that the fit did not see; docs/methods/latency.md has the evidence and the limits.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    PrivateAttr,
    ValidationError,
    field_serializer,
    field_validator,
    model_validator,
)

from hw_profiles import device as devices
from hw_profiles import families
from hw_profiles.device import Device
from hw_profiles.families import Share
from hw_profiles.models.additive import Additive
from hw_profiles.models.interpolate import Model as Kernels
from hw_profiles.op import Op, to_row
from nas.errors import NasctlError

Source = Literal["measured", "calibrated", "interpolated", "analytic"]
Array = NDArray[np.float64]
SOURCES: tuple[Source, ...] = ("measured", "calibrated", "interpolated", "analytic")
INTERVALS_FILE = "intervals.json"
LEAST = 0.05  # no correction takes more than 95 % of an operator's time away

_strict = ConfigDict(frozen=True, extra="forbid")


@dataclass(frozen=True, slots=True)
class Measurement:
    median_ms: float
    spread_ms: float
    n: int


@dataclass(frozen=True, slots=True)
class Estimate:
    """`low_ms` to `high_ms` is the 90 % interval; `source` the weakest one that contributes."""

    value_ms: float
    low_ms: float
    high_ms: float
    source: Source
    shares: dict[Source, float]


class Interval(BaseModel):
    """Where measured / predicted lies 90 % of the time; `coverage` was met on unseen networks."""

    model_config = _strict
    low: NonNegativeFloat
    high: PositiveFloat
    n: PositiveInt
    coverage: float | None = None
    how: str

    @model_validator(mode="after")
    def _ordered(self) -> Interval:
        if self.low > self.high:
            raise ValueError(f"low {self.low} is above high {self.high}")
        return self


class Terms(BaseModel):
    model_config = _strict
    overhead_ms: NonNegativeFloat = 0.0
    ms_per_gmac: NonNegativeFloat = 0.0
    ms_per_mb: NonNegativeFloat = 0.0
    roofline: bool = False  # compute and memory overlap: the slower of the two counts
    note: str = ""

    def ms(self, share: Share) -> float:
        compute, memory = share.gmacs * self.ms_per_gmac, share.mb * self.ms_per_mb
        both = max(compute, memory) if self.roofline else compute + memory
        return share.ops * self.overhead_ms + both


class LatencyTable(BaseModel):
    """Everything known about one (device, runtime, precision, batch). `intervals` has the keys
    same (spaces in `fitted_on`), cross (any other space), measured, interpolated and analytic."""

    model_config = _strict
    device: str
    runtime: str
    precision: str
    batch: PositiveInt = 1
    unit: Literal["ms"] = "ms"
    includes: str = ""  # what the timed region contains
    origin: str
    licence: str = ""
    #: on what, when and how it was measured, and its errors on held-out networks
    provenance: dict[str, str | int | float] = {}
    fitted_on: tuple[str, ...] = ()  # spaces of the networks that were measured; () is analytic
    fitted_kinds: tuple[str, ...] = ()  # kinds of operator in them; terms of others are analytic
    tile: NonNegativeInt = 0  # of output channels, with the finer families; 0: by kind
    constant_ms: NonNegativeFloat = 0.0
    intervals: dict[str, Interval]
    terms: dict[str, Terms]
    learned: Additive | None = None  # what the terms get wrong, operator by operator
    measured: dict[Op, Measurement] = Field(default={})
    kernels: Kernels | None = None  # learned from operators timed one by one
    _between: dict[Op, float] = PrivateAttr(default_factory=dict)  # what they said, for speed

    @field_validator("measured", mode="plain")
    @classmethod
    def _read_measured(cls, value: Any) -> dict[Op, Measurement]:
        if isinstance(value, dict):
            return value
        try:
            return {Op(**row["op"]): Measurement(**row["time"]) for row in value}
        except (TypeError, KeyError) as error:
            raise ValueError(f"a row of measured ops: {error}") from error

    @field_serializer("measured")
    def _write_measured(self, measured: dict[Op, Measurement]) -> list[dict[str, Any]]:
        return [{"op": to_row(op), "time": asdict(time)} for op, time in measured.items()]

    @model_validator(mode="after")
    def _every_source_has_an_interval(self) -> LatencyTable:
        needed = {"analytic"} | ({"same", "cross"} if self.fitted_on else set())
        needed |= {"measured"} if self.measured else set()
        needed |= {"interpolated"} if self.kernels else set()
        if missing := sorted(needed - set(self.intervals)):
            raise ValueError(f"no interval for {', '.join(missing)}")
        if self.precision not in devices.ITEMSIZE:
            raise ValueError(f"unknown precision {self.precision}")
        return self

    @property
    def constant_source(self) -> Source:
        return "calibrated" if self.fitted_on else "analytic"

    @property
    def source(self) -> Source:
        """What its numbers are at best: measured operators, a calibrated fit, or datasheets."""
        if self.measured:
            return "measured"
        return "calibrated" if self.fitted_on else "analytic"

    def interval(self, space: str) -> Interval:
        """Where the bounds of an estimate for `space` come from: its calibrated part, if any."""
        if not self.fitted_on:
            return self.intervals["analytic"]
        return self.intervals["same" if space in self.fitted_on else "cross"]

    def columns(self, op: Op) -> Array:
        """This operator's milliseconds in the column of their source; additive over operators."""
        row = np.zeros(len(SOURCES))
        for known in (op, op.deployed()):
            if known in self.measured:
                row[SOURCES.index("measured")] = self.measured[known].median_ms
                return row
        if self.kernels is not None and self.kernels.covers(op):
            if op not in self._between:
                self._between[op] = float(self.kernels.predict([op])[0][0])
            row[SOURCES.index("interpolated")] = self._between[op]
            return row
        parts = families.shares(op, devices.ITEMSIZE[self.precision], self.tile)
        if missing := [share.family for share in parts if share.family not in self.terms]:
            raise NasctlError(
                f"no latency for operator '{op.kind}' ({missing[0]})",
                where=f"latency table of {self.device}",
                allowed=self.terms,
            )
        source: Source = "calibrated" if op.kind in self.fitted_kinds else "analytic"
        ms = sum(self.terms[share.family].ms(share) for share in parts)
        if self.learned is not None and source == "calibrated":
            ms *= max(LEAST, 1 + float(self.learned.correction([op])[0]))
            source = source if op in self.learned else "interpolated"
        row[SOURCES.index(source)] = ms
        return row

    def combine(self, columns: Array, space: str) -> tuple[Array, Array, Array]:
        """(value, low, high) in ms of networks whose summed columns are `columns[..., 4]`."""
        total = np.array(columns, dtype=float)
        total[..., SOURCES.index(self.constant_source)] += self.constant_ms
        low, high = self._bounds(space)
        return total.sum(-1), total @ low, total @ high

    def _bounds(self, space: str) -> tuple[Array, Array]:
        fitted = "same" if space in self.fitted_on else "cross"
        # an operator between measured ones was in networks that the fit was held to account for
        between = "interpolated" if "interpolated" in self.intervals else fitted
        keys = ("measured", fitted, between, "analytic")
        # A source without an interval is one that this table never produces (see the validator).
        found = [self.intervals.get(key) for key in keys]
        low = np.array([interval.low if interval else 0.0 for interval in found])
        return low, np.array([interval.high if interval else 0.0 for interval in found])

    def estimate(self, ops: Iterable[Op], space: str) -> Estimate:
        known: dict[tuple[Op, bool], Array] = {}  # most networks repeat their operators
        total = np.zeros(len(SOURCES))
        for op in ops:
            key = (op, op.fuses_add)  # which equality does not see
            if key not in known:
                known[key] = self.columns(op)
            total += known[key]
        value, low, high = (float(part) for part in self.combine(total, space))
        total[SOURCES.index(self.constant_source)] += self.constant_ms
        shares = {
            source: float(part / value)
            for source, part in zip(SOURCES, total, strict=True)
            if part > 0
        }
        weakest = max(shares, key=SOURCES.index)
        return Estimate(value, low, high, weakest, shares)

    def save(self, path: Path) -> None:
        """Atomically: a reader sees the old file or the new one."""
        temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
        temporary.write_text(self.model_dump_json(indent=1) + "\n", encoding="utf-8")
        os.replace(temporary, path)

    @classmethod
    def load(cls, path: Path) -> LatencyTable:
        try:
            return cls.model_validate_json(path.read_text(encoding="utf-8"))
        except OSError as error:
            raise NasctlError(
                f"cannot read the latency table: {error.strerror}", where=str(path)
            ) from error
        except (ValidationError, UnicodeDecodeError) as error:
            raise NasctlError(
                f"damaged latency table: {first_problem(error)}",
                where=str(path),
                next="Delete it and measure again, or restore it.",
            ) from error


def first_problem(error: ValidationError | UnicodeDecodeError) -> str:
    if isinstance(error, UnicodeDecodeError):
        return error.reason
    first = error.errors()[0]
    return f"{'.'.join(map(str, first['loc']))}: {first['msg']}".lstrip(": ")


def table(device: Device) -> LatencyTable:
    """The shipped or the user's own table of this device; without one, the analytic table."""
    return stored(device) or analytic(device)


def stored(device: Device) -> LatencyTable | None:
    """The shipped or the user's own table of this device, if there is one."""
    for folder in devices.folders():
        path = folder / f"{device.name}.table.json"
        if path.is_file():
            found = LatencyTable.load(path)
            there = (found.device, found.runtime, found.precision, found.batch)
            wanted = (device.name, device.runtime, device.precision, 1)
            if there != wanted:
                said, asked = (f"{n} {r} {p}, batch {b}" for n, r, p, b in (there, wanted))
                raise NasctlError(
                    f"is for {said}, not for {asked}",
                    where=str(path),
                    next="Move it away, or profile the device again.",
                )
            return found
    return None


def transfer_intervals() -> dict[str, Interval]:
    """What latency_transfer.py --write measured: cross_cpu, cross_gpu, relative and roofline."""
    path = devices.FOLDER / INTERVALS_FILE
    stored = json.loads(path.read_text(encoding="utf-8"))
    return {key: Interval.model_validate(value) for key, value in stored.items()}


def analytic(device: Device) -> LatencyTable:
    """From datasheets: a roofline, or the table of a measured relative with its rates scaled."""
    if device.peak is None or device.bandwidth_gb_per_s is None:
        raise NasctlError(
            f"device {device.name} has no peak and bandwidth at {device.precision}, "
            "so nothing can be said about it before it is measured",
            where="--hw",
            next="Measure it: docs/add_a_device.md says how.",
        )
    if device.relative:
        relative = devices.load(device.relative)
        if relative.runtime != device.runtime:
            raise NasctlError(
                f"{relative.name} runs {relative.runtime}, {device.name} runs {device.runtime}: "
                "overheads are lent within one runtime only",
                where=f"{device.name}.toml, field 'relative'",
            )
        return scaled(table(relative), relative, device)
    floor = Terms(
        ms_per_gmac=1e3 / device.peak,
        ms_per_mb=1 / device.bandwidth_gb_per_s,
        roofline=True,
    )
    return LatencyTable(
        device=device.name,
        runtime=device.runtime,
        precision=device.precision,
        origin="analytic: datasheet roofline of peak and bandwidth, no overhead; never measured",
        terms=dict.fromkeys(families.COARSE, floor),
        intervals={"analytic": transfer_intervals()["roofline"]},
    )


def scaled(known: LatencyTable, relative: Device, device: Device) -> LatencyTable:
    """The overheads of a measured relative, its rates scaled by the ratio of the datasheets."""
    compute, memory = rate_ratios(relative, device)
    terms = {
        family: Terms(
            overhead_ms=term.overhead_ms,
            ms_per_gmac=term.ms_per_gmac * compute,
            ms_per_mb=term.ms_per_mb * memory,
        )
        for family, term in known.terms.items()
    }
    return LatencyTable(
        device=device.name,
        runtime=device.runtime,
        precision=device.precision,
        origin=f"analytic: overheads fitted on {relative.name}, rates scaled by the datasheets of "
        f"the two; {device.name} itself was never measured. {relative.name}: {known.origin}",
        licence=known.licence,
        tile=known.tile,
        constant_ms=known.constant_ms,
        terms=terms,
        intervals={"analytic": transfer_intervals()["relative"]},
    )


def rate_ratios(known: Device, other: Device) -> tuple[float, float]:
    """What one GMAC and one MB take on `other`, as a multiple of what they take on `known`."""
    if not (known.peak and known.bandwidth_gb_per_s and other.peak and other.bandwidth_gb_per_s):
        raise NasctlError(
            f"no peak and bandwidth to scale {known.name} to {other.name}", where="relative"
        )
    return known.peak / other.peak, known.bandwidth_gb_per_s / other.bandwidth_gb_per_s
