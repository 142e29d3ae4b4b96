"""EnergyTable: op lists in, millijoules per call with an interval out.

The same sum over operators as a latency table's terms (constant + counts, MACs and bytes of each
family), fitted to measured energies of whole networks; no datasheet bounds it. Only devices whose
energy somebody measured have one: `<device>.energy.json` beside the latency table.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, NonNegativeFloat, ValidationError

from hw_profiles import device as devices
from hw_profiles.device import Device
from hw_profiles.families import COARSE, shares
from hw_profiles.latency import Array, Interval, first_problem, transfer_intervals
from hw_profiles.models import calibrate
from hw_profiles.models.calibrate import Design, Ridge
from hw_profiles.op import Op
from nas.errors import NasctlError

Samples = Sequence[tuple[Sequence[Op], float]]
_strict = ConfigDict(frozen=True, extra="forbid")


@dataclass(frozen=True, slots=True)
class EnergyEstimate:
    """`low_mj` to `high_mj` is the 90 % interval."""

    value_mj: float
    low_mj: float
    high_mj: float
    source: Literal["calibrated", "analytic"]  # analytic: with terms that were never measured


class EnergyTerms(BaseModel):
    model_config = _strict
    mj_per_op: NonNegativeFloat
    mj_per_gmac: NonNegativeFloat
    mj_per_mb: NonNegativeFloat


class EnergyTable(BaseModel):
    """Of one device, runtime and precision, batch 1. `same` is the interval on the spaces in
    `fitted_on`, `cross` on others."""

    model_config = _strict
    device: str
    runtime: str
    precision: str
    unit: Literal["mJ"] = "mJ"
    origin: str
    licence: str = ""
    fitted_on: tuple[str, ...]
    constant_mj: NonNegativeFloat
    terms: dict[str, EnergyTerms]
    fitted_kinds: tuple[str, ...]  # kinds of operator in the networks; others borrow their terms
    same: Interval
    cross: Interval

    def interval(self, space: str) -> Interval:
        return self.same if space in self.fitted_on else self.cross

    def columns(self, op: Op) -> Array:
        """This operator's millijoules [1]; additive over operators."""
        (share,) = shares(op, devices.ITEMSIZE[self.precision])
        if (terms := self.terms.get(share.family)) is None:
            raise NasctlError(
                f"no energy for operator '{op.kind}'", where=f"energy table of {self.device}"
            )
        mj = terms.mj_per_op + terms.mj_per_gmac * share.gmacs + terms.mj_per_mb * share.mb
        return np.array([mj])

    def combine(self, columns: Array, space: str) -> tuple[Array, Array, Array]:
        """(value, low, high) in mJ of networks whose summed columns are `columns[..., 1]`."""
        value = columns[..., 0] + self.constant_mj
        interval = self.interval(space)
        return value, value * interval.low, value * interval.high

    def estimate(self, ops: Iterable[Op], space: str) -> EnergyEstimate:
        every = list(ops)
        total = sum((self.columns(op) for op in every), start=np.zeros(1))
        value, low, high = (float(part) for part in self.combine(total, space))
        known = all(op.kind in self.fitted_kinds for op in every)
        return EnergyEstimate(value, low, high, "calibrated" if known else "analytic")

    def save(self, path: Path) -> None:
        path.write_text(self.model_dump_json(indent=1) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, path: Path) -> EnergyTable:
        try:
            return cls.model_validate_json(path.read_text(encoding="utf-8"))
        except (OSError, ValidationError, UnicodeDecodeError) as error:
            why = error.strerror if isinstance(error, OSError) else first_problem(error)
            raise NasctlError(f"unreadable energy table: {why}", where=str(path)) from error


def stored(device: Device) -> EnergyTable | None:
    """The shipped or the user's own table of this device, if there is one."""
    for folder in devices.folders():
        path = folder / f"{device.name}.energy.json"
        if not path.is_file():
            continue
        found = EnergyTable.load(path)
        there = (found.device, found.runtime, found.precision)
        if there == (device.name, device.runtime, device.precision):
            return found  # of another precision it says nothing on this one
    return None


def required(device: Device) -> EnergyTable:
    """Raises NasctlError where nobody measured the device's energy."""
    if (found := stored(device)) is None:
        known = [name for name in devices.names() if stored(devices.load(name))]
        raise NasctlError(
            f"nobody measured the energy of {device.name} in {device.precision}, and none is "
            "invented",
            where="--energy",
            allowed=known,
        )
    return found


def fit(samples: Samples, device: Device, *, space: str, origin: str, licence: str) -> EnergyTable:
    """`samples` are (operators of a whole network, its measured mJ per call) from `space`."""
    energies = np.array([mj for _, mj in samples], dtype=float)
    if len(samples) < calibrate.MIN_NETWORKS or not (np.isfinite(energies) & (energies > 0)).all():
        raise NasctlError(
            f"{len(samples)} networks with energies",
            where=device.name,
            allowed=f"at least {calibrate.MIN_NETWORKS}, all positive",
        )
    # a datasheet's rates are times: they bound no energy
    free = device.model_copy(update={"peak_gmacs_per_s": {}, "bandwidth_gb_per_s": None})
    design = Design.of([ops for ops, _ in samples], free)
    constant, fitted = calibrate.solve(design, energies, Ridge())
    ratios, folds = calibrate.held_out_ratios(design, energies, np.arange(len(samples)), Ridge())
    how = f"{calibrate.FOLDS} folds of {space}"
    elsewhere = transfer_intervals()[f"cross_{device.kind}"]
    owners = design.owners()
    return EnergyTable(
        device=device.name,
        runtime=device.runtime,
        precision=device.precision,
        origin=origin,
        licence=licence,
        fitted_on=(space,),
        constant_mj=constant,
        terms={
            family: EnergyTerms(mj_per_op=a, mj_per_gmac=b, mj_per_mb=c)
            for family in COARSE
            if owners[family]
            for a, b, c in [map(float, fitted[family])]
        },
        fitted_kinds=tuple(sorted({op.kind for ops, _ in samples for op in ops})),
        same=calibrate.interval_of(ratios, folds, how),
        cross=elsewhere.model_copy(
            update={
                "how": f"that of latencies, for want of energies of two spaces: {elsewhere.how}"
            }
        ),
    )
