"""What board owners already have, read into operators and milliseconds.

trtexec      hw_profiles/trtexec.py
nn-Meter     the JSON files of its predictor builder (docs/builder of microsoft/nn-Meter)
our tables   those of other people, refused for another device, runtime, precision or batch

Nothing is guessed. What a file does not say is asked of the caller and checked where the file shows
it; a layer that no Op describes is listed with the reason and its time. One bad number refuses the
whole file: who can vouch for the others?
"""

from __future__ import annotations

import functools
import hashlib
import json
import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from scipy.stats import binom

from hw_profiles.device import Device
from hw_profiles.latency import LatencyTable, Measurement, analytic, transfer_intervals
from hw_profiles.models import interpolate
from hw_profiles.op import Op
from nas.errors import NasctlError, unknown

UNITS_MS = {"ms": 1.0, "us": 1e-3}  # what one of it is in milliseconds
NN_METER_ACTS = ("relu", "relu6", "hswish")  # a clip is one comparison more in the same epilogue
NN_METER_MAPS = {  # theirs -> our kind, activation, what it reads
    "add": ("add", "", (-1, -1)),
    "addrelu": ("add", "relu", (-1, -1)),
    "relu": ("act", "relu", (-1,)),
    "hswish": ("act", "hswish", (-1,)),
    "global-avgpool": ("gap", "", (-1,)),
}


@dataclass(frozen=True, slots=True)
class Kernel:
    """One timed operator. `op.reads` has a second entry where a residual add is fused into it."""

    layer: str
    op: Op
    ms: float
    n: int  # calls


@dataclass(frozen=True, slots=True)
class Skipped:
    layer: str
    ms: float
    why: str


@dataclass(frozen=True, slots=True)
class Kernels:
    """What a file says about single operators; times are for the batch that it was read with."""

    found: tuple[Kernel, ...]
    skipped: tuple[Skipped, ...]

    @property
    def share(self) -> float:
        """How much of the file's time the operators are that were understood."""
        known = sum(kernel.ms for kernel in self.found)
        return known / (known + sum(layer.ms for layer in self.skipped))

    def measured(self, ops: Iterable[Op]) -> dict[Op, Measurement]:
        """Entries of a latency table for those of `ops` that were timed, alone and unfused.

        The spread is the range over kernels of the same operator: the files give none of their own.
        """
        times = defaultdict(list)
        for kernel in self.found:
            if not kernel.op.fuses_add:
                times[kernel.op.deployed()].append(kernel)
        entries = {}
        for op in ops:
            if alike := times.get(op.deployed()):
                ms = [kernel.ms for kernel in alike]
                calls = sum(kernel.n for kernel in alike)
                entries[op] = Measurement(float(np.median(ms)), max(ms) - min(ms), calls)
        return entries


def kernel_table(kernels: Kernels, device: Device, rng: np.random.Generator) -> LatencyTable:
    """A table of `device` from its kernels alone: timed ones as they are, sizes between them
    interpolated, everything else as its datasheet (or its relative) says.

    Nobody held it against a whole network, so its interval is that of tables used on a space that
    they were not fitted on. `nasctl profile` on a few networks does better.
    """
    base = analytic(device)
    single = [kernel for kernel in kernels.found if not kernel.op.fuses_add]
    kinds = Counter(interpolate.family(kernel.op) for kernel in single)
    enough = [
        kernel
        for kernel in single
        if kinds[interpolate.family(kernel.op)] >= interpolate.MIN_KERNELS
    ]
    model = None
    if enough:
        ops, ms = [kernel.op for kernel in enough], [kernel.ms for kernel in enough]
        model = interpolate.fit(ops, ms, rng=rng)
    wide = transfer_intervals()[f"cross_{device.kind}"]
    return base.model_copy(
        update={
            "origin": f"{len(kernels.found)} kernels timed one by one; the rest {base.origin}",
            "measured": kernels.measured({kernel.op.deployed() for kernel in single}),
            "kernels": model,
            "intervals": {**base.intervals, "measured": wide, "interpolated": wide},
        }
    )


# ---- nn-Meter ------------------------------------------------------------------------------------


def nn_meter(path: Path, *, unit: str, configs: Path | None = None) -> Kernels:
    """Kernels that nn-Meter's builder profiled, batch 1.

    `unit` (ms or us) is the backend's, and no file states it. A file that was profiled without
    DETAIL has no dimensions: then `configs` is the file of sampled configurations beside it.
    Entries of 0 are nn-Meter's mark of a failed run and are skipped.
    """
    if unit not in UNITS_MS:
        raise unknown("unit", unit, UNITS_MS)
    found, skipped = [], []
    sampled = read_json(configs) if configs else {}
    for kind, name, entry in _entries(path):
        where = f"{path}, {kind} {name}"
        config = entry.get("config") or sampled.get(kind, {}).get(name, {}).get("config")
        if not isinstance(config, dict):
            raise NasctlError(
                "has no 'config'", where=where, next="Profile with DETAIL: TRUE, or give configs."
            )
        ms = _mean(entry.get("latency"), where) * UNITS_MS[unit]
        op = _nn_meter_op(kind, config, where)
        if isinstance(op, Op) and ms > 0:
            found.append(Kernel(f"{kind} {name}", op, ms, 1))
        else:
            why = op if isinstance(op, str) else "was not measured"
            skipped.append(Skipped(f"{kind} {name}", ms, why))
    if not found:
        raise NasctlError("has no kernel that is understood", where=str(path))
    return Kernels(tuple(found), tuple(skipped))


def _entries(path: Path) -> Iterable[tuple[str, str, dict[str, Any]]]:
    content = read_json(path)
    for kind, entries in content.items() if isinstance(content, dict) else ():
        for name, entry in entries.items() if isinstance(entries, dict) else ():
            if not isinstance(entry, dict):
                raise NasctlError("is not an entry of nn-Meter's", where=f"{path}, {kind} {name}")
            yield kind, name, entry


def _mean(text: object, where: str) -> float:
    """The first number of "mean +- deviation"."""
    mean, sign, deviation = str(text).partition("+-")
    try:
        values = [float(mean), float(deviation)]
    except ValueError:
        values = []
    if not sign or not values or not all(math.isfinite(v) and v >= 0 for v in values):
        raise NasctlError(
            f"latency is '{text}'", where=where, allowed="'mean +- deviation', none negative"
        )
    return values[0]


def _nn_meter_op(kind: str, config: Mapping[str, Any], where: str) -> Op | str:
    """`kind` is like dwconv-bn-relu: the operator first, what is fused after it."""
    size = functools.partial(_size, config, where)
    head, *fused = kind.split("-")
    if kind == "fc":
        return Op("linear", size("CIN"), size("COUT"), 1, 1, bias=True)
    if head in ("conv", "dwconv") and set(fused) <= {"bn", *NN_METER_ACTS}:
        c = size("CIN")
        c_out, groups = (c, c) if head == "dwconv" else (size("COUT"), 1)
        act = next((part.removesuffix("6") for part in fused if part in NN_METER_ACTS), "")
        map_size, kernel, stride = size("HW"), size("KERNEL_SIZE"), size("STRIDES")
        return Op(head, c, c_out, map_size, map_size, kernel, stride, groups, act, "bn" in fused)
    if kind in ("maxpool", "avgpool"):
        c, map_size = size("CIN"), size("HW")
        return Op(kind, c, c, map_size, map_size, size("KERNEL_SIZE"), size("POOL_STRIDES"))
    if kind in NN_METER_MAPS:
        c, map_size = size("CIN"), size("HW")
        ours, act, reads = NN_METER_MAPS[kind]
        return Op(ours, c, c, map_size, map_size, act=act, reads=reads)
    return f"{kind} is not translated"


def _size(config: Mapping[str, Any], where: str, key: str) -> int:
    value = config.get(key)
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise NasctlError(f"{key} is {value!r}", where=where, allowed="a positive integer")
    return value


# ---- our own tables, from other people -----------------------------------------------------------


def fingerprint(table: LatencyTable) -> str:
    """SHA-256 of what the table says, independent of how its file is laid out."""
    content = json.dumps(table.model_dump(mode="json"), sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(content.encode()).hexdigest()


def own(path: Path, device: Device, *, batch: int = 1, sha256: str = "") -> LatencyTable:
    """Somebody else's table of `device`; `sha256` is the fingerprint that its author gave.

    Raises NasctlError for a table of another device, runtime, precision or batch, or when its
    content is not what the author published.
    """
    table = LatencyTable.load(path)
    for field, wanted in (
        ("device", device.name),
        ("runtime", device.runtime),
        ("precision", device.precision),
        ("batch", batch),
    ):
        if (there := getattr(table, field)) != wanted:
            raise NasctlError(f"was measured with {field} {there}, not {wanted}", where=str(path))
    if sha256 and fingerprint(table) != sha256.lower():
        raise NasctlError(
            f"its fingerprint is {fingerprint(table)}, not the one given", where=str(path)
        )
    return table


def revalidate(
    table: LatencyTable, samples: Sequence[tuple[Sequence[Op], float]], space: str
) -> float:
    """Share of a few networks measured here, (operators, ms) each, inside the table's interval.

    Raises NasctlError when so few would be inside a true 90 % interval less than once in a hundred
    times: then the table is of another board, clock or version than it says.
    """
    if not samples:
        raise NasctlError("no network was measured to check the table with", where=table.device)
    estimates = [(table.estimate(ops, space), ms) for ops, ms in samples]
    inside = sum(estimate.low_ms <= ms <= estimate.high_ms for estimate, ms in estimates)
    if binom.cdf(inside, len(samples), 0.9) < 0.01:
        ratio = float(np.median([ms / estimate.value_ms for estimate, ms in estimates]))
        raise NasctlError(
            f"{inside} of {len(samples)} networks are inside the table's 90 % interval; here they "
            f"take {ratio:.2f} times what it says",
            where=table.device,
            next="Measure this board: docs/add_a_device.md says how.",
        )
    return inside / len(samples)


# ---- reading -------------------------------------------------------------------------------------


def read_json(path: Path) -> Any:
    def refuse(word: str) -> None:
        raise NasctlError(f"contains {word}", where=str(path))

    try:
        # not strict: TensorRT separates names in its metadata by bare control characters
        return json.loads(path.read_text(encoding="utf-8"), parse_constant=refuse, strict=False)
    except OSError as error:
        raise NasctlError(f"cannot read it: {error.strerror}", where=str(path)) from error
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise NasctlError(f"damaged or cut off: {error}", where=str(path)) from error


def number(row: Mapping[str, Any], key: str, where: str) -> float:
    """A finite number that is not negative, from a field of a JSON object."""
    value = row.get(key)
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise NasctlError(f"{key} is {value!r}, not a number", where=where)
    if not math.isfinite(value) or value < 0:
        raise NasctlError(f"{key} is {value}", where=where, allowed="finite, not negative")
    return float(value)
