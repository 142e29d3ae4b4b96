"""Which channel counts a target runs well: a sweep of seconds, kept beside the device's profile.

Kernels work on whole tiles of channels, and how wide a tile is depends on the machine, the runtime
and the precision: with fp32 on AVX-512, 63 channels are half as slow again as 64, while some int8
kernels are faster at 127 than at 128. So it is measured: a chain of four 3x3 convolutions at 28x28,
at many widths, interleaved. What counts is the time per multiply-add, against the straight line
between the multiples of 16: pruning from one to a width above the line saves less than it removes.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import BaseModel, ConfigDict, PositiveFloat, PositiveInt, ValidationError

from hw_profiles import device as devices
from hw_profiles.device import Device
from hw_profiles.op import Op, Tape
from hw_profiles.protocol import Timing
from nas.errors import NasctlError

COARSE = 16  # multiples of it are the line that other widths are held against
WIDTHS = (48, 50, 52, 54, 56, 58, 60, 62, 63, 64, 65, 66, 68, 70, 72, 74, 76, 77, 78, 79, 80)
TILES = (1, 2, 4, 8, COARSE)
#: the median excess in time per multiply-add that a tile's own widths may have, relative
TOLERANCE = 0.05


class Alignment(BaseModel):
    """What a sweep found. `ms` has one entry per width."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    device: str
    runtime: str
    precision: str
    threads: PositiveInt
    ms: dict[PositiveInt, PositiveFloat]
    noise: float  # relative: how far two sessions were apart, width by width
    doubtful: tuple[int, ...] = ()  # widths whose time is not known well
    provenance: dict[str, str] = {}

    @property
    def excess(self) -> dict[int, float]:
        """By tile: the median excess of widths that are multiples of it and of no larger one."""
        return excess(self.ms)

    @property
    def tile(self) -> int:
        """The smallest tile such that its own widths, and those of all larger ones, run at most
        TOLERANCE above the line: what kept widths should be multiples of."""
        found = self.excess
        fine = [t for t in TILES if all(found[u] <= TOLERANCE for u in TILES if t <= u < COARSE)]
        return fine[0]

    def save(self, folder: Path) -> Path:
        """Beside the device's table, one file per device with one entry per setting."""
        path = folder / f"{self.device}.alignment.json"
        entries = [entry for entry in _entries(path) if _key(entry) != _key(self.model_dump())]
        entries.append(self.model_dump(mode="json"))
        folder.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
        temporary.write_text(json.dumps(entries, indent=1) + "\n", encoding="utf-8")
        os.replace(temporary, path)  # a reader sees the old file or the new one
        return path


def fitted(
    device: str, runtime: str, precision: str, threads: int, sessions: Sequence[Sequence[Timing]]
) -> Alignment:
    """From timings of the chains of WIDTHS, in two sessions or more: how fast each was as a whole
    cancels."""
    logs = np.log([[timing.median_ms for timing in timings] for timings in sessions])
    apart = logs - logs.mean(1, keepdims=True)
    both = zip(WIDTHS, *sessions, strict=True)
    return Alignment(
        device=device,
        runtime=runtime,
        precision=precision,
        threads=threads,
        ms=dict(zip(WIDTHS, np.exp(logs.mean(0)).tolist(), strict=True)),
        noise=float(np.ptp(apart, axis=0).mean()),
        doubtful=tuple(width for width, *timings in both if any(t.noisy for t in timings)),
    )


def chain(channels: int) -> list[Op]:
    """Four 3x3 convolutions with ReLU at 28x28, `channels` in and out."""
    tape = Tape(channels=channels, size=28)
    x = tape.input
    for _ in range(4):
        x = tape.conv(x, channels, kernel=3, bias=True, act="relu")
    return tape.ops


def excess(ms: Mapping[int, float]) -> dict[int, float]:
    """By tile: how much more time per multiply-add its own widths take than the line between the
    multiples of COARSE, relative, the median of them."""
    widths = np.array(sorted(ms))
    rate = np.array([ms[width] for width in widths.tolist()]) / widths**2
    coarse = widths % COARSE == 0
    line = np.interp(widths, widths[coarse], rate[coarse])
    over = rate / line - 1
    largest = np.array([max(t for t in TILES if width % t == 0) for width in widths.tolist()])
    return {t: float(np.median(over[largest == t])) if t < COARSE else 0.0 for t in TILES}


def stored(device: Device, precision: str | None = None, threads: int = 1) -> Alignment | None:
    """What was measured for this device in this setting, the user's own folder first."""
    wanted = (device.runtime, precision or device.precision, threads)
    for folder in devices.folders():
        for entry in _entries(folder / f"{device.name}.alignment.json"):
            if _key(entry) == wanted:
                return Alignment.model_validate(entry)
    return None


def tile(device: Device, precision: str | None = None, threads: int = 1) -> tuple[int, str]:
    """The divisor of channel counts on this device and where it comes from: a sweep, or the
    device's file."""
    found = stored(device, precision, threads)
    return (found.tile, "measured") if found else (device.tile, "device file")


def _key(entry: Mapping[str, Any]) -> tuple[str, str, int]:
    return entry["runtime"], entry["precision"], entry["threads"]


def _entries(path: Path) -> Sequence[dict[str, Any]]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        return [Alignment.model_validate(entry).model_dump(mode="json") for entry in found]
    except FileNotFoundError:
        return []
    except (ValueError, TypeError, ValidationError) as error:
        raise NasctlError(
            f"damaged file of alignments ({str(error).splitlines()[0]})",
            where=str(path),
            next="Delete it and measure again.",
        ) from error
