"""Clock frequencies, temperature and throttling of this machine, as far as it tells; else None.

Where each figure is read. Processor: Linux cpufreq (`scaling_cur_freq`, what the governor set, of
the fastest core that this process may use: the one that works) and x86 throttle counters. NVIDIA
cards: `nvidia-smi`. Jetson: the GPU's devfreq file (what tegrastats prints) and nvpmodel's status
file. Raspberry Pi: the firmware's `get_throttled` word. Virtual machines mostly tell nothing.

This file is also sent to boards: it needs Python 3.8 and its standard library, nothing else.
"""

from __future__ import annotations

import contextlib
import os
import re
import subprocess
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Callable, Iterator, Sequence

#: bits of the firmware's word on a Raspberry Pi, the ones that say "now"
PI_BITS = {0: "under-voltage", 1: "frequency capped", 2: "throttled", 3: "temperature limit"}
#: bits of NVML's nvmlClocksThrottleReason words that mean "slower than asked for"
NVML_BITS = {
    2: "power cap",
    3: "hardware slowdown",
    5: "software thermal slowdown",
    6: "hardware thermal slowdown",
    7: "power brake",
}
#: how GPUs of Jetson modules are named among the devfreq devices
JETSON_GPU = re.compile(r"gpu|g[apv]\d\d?b|gm20b", re.IGNORECASE)
NVIDIA_QUERY = "clocks.sm,temperature.gpu,clocks_throttle_reasons.active"


@dataclass(frozen=True)
class Clocks:
    """One reading. None where the platform does not tell."""

    cpu_mhz: float | None = None
    gpu_mhz: float | None = None
    temperature_c: float | None = None  # of the hottest sensor
    throttled: str | None = None  # what holds the clocks down now; empty when nothing does
    throttle_count: int | None = None  # times that the processor throttled since it started
    mode: str | None = None  # frequency governor and power mode

    def __str__(self) -> str:
        return (
            f"cpu {_shown(self.cpu_mhz)} MHz, gpu {_shown(self.gpu_mhz)} MHz, "
            f"{_shown(self.temperature_c)} C, mode {_shown(self.mode)}, "
            f"throttled {'no' if self.throttled == '' else _shown(self.throttled)}"
        )


def read(root: Path = Path("/")) -> Clocks:
    """What files tell; costs well under a millisecond per core. `root` is for tests."""
    hottest = max((one for one in _temperatures(root)), default=None)
    return Clocks(
        cpu_mhz=_fastest_core(root),
        gpu_mhz=_jetson_gpu(root),
        temperature_c=hottest,
        throttled=_pi_throttled(root),
        throttle_count=_throttle_count(root),
        mode=_mode(root),
    )


def nvidia_smi() -> str | None:
    """The first card's line for NVIDIA_QUERY, or None without a card or its driver."""
    command = ["nvidia-smi", f"--query-gpu={NVIDIA_QUERY}", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(command, capture_output=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return None
    lines = done.stdout.decode(errors="replace").splitlines()
    return lines[0] if done.returncode == 0 and lines else None


def read_nvidia(root: Path = Path("/"), query: Callable[[], str | None] = nvidia_smi) -> Clocks:
    """`read`, with the first NVIDIA card's clock, temperature and slowdowns (some 50 ms)."""
    here = read(root)
    fields = [field.strip() for field in (query() or "").split(",")]
    if len(fields) != 3:
        return here
    mhz, degrees, word = (_number(fields[0]), _number(fields[1]), _number(fields[2], base=16))
    return replace(
        here,  # a Jetson has the tool, too, but it tells nothing
        gpu_mhz=here.gpu_mhz if mhz is None else mhz,
        temperature_c=here.temperature_c if degrees is None else degrees,
        throttled=here.throttled if word is None else _named(int(word), NVML_BITS),
    )


def doubts(readings: Sequence[Clocks], tolerance: float) -> Iterator[str]:
    """Why timings taken between these readings are in doubt: clocks that moved by more than
    `tolerance` (relative), or were held down."""
    for name, values in (
        ("processor", [one.cpu_mhz for one in readings]),
        ("GPU", [one.gpu_mhz for one in readings]),
    ):
        known = [value for value in values if value]
        if known and max(known) / min(known) - 1 > tolerance:
            yield f"the {name}'s clock moved between {min(known):.0f} and {max(known):.0f} MHz"
    reasons = sorted({one.throttled for one in readings if one.throttled})
    if reasons:
        yield f"clocks were held down: {', '.join(reasons)}"
    counts = [one.throttle_count for one in readings if one.throttle_count is not None]
    if counts and counts[-1] > counts[0]:
        yield f"the processor throttled {counts[-1] - counts[0]} times"


def _fastest_core(root: Path) -> float | None:
    paths = [_cpu(root, core) / "cpufreq" / "scaling_cur_freq" for core in cores()]
    khz = [value for value in map(_number_in, paths) if value]
    return max(khz) / 1e3 if khz else None


def _throttle_count(root: Path) -> int | None:
    names = ("core_throttle_count", "package_throttle_count")
    paths = [_cpu(root, core) / "thermal_throttle" / name for core in cores() for name in names]
    counts = [value for value in map(_number_in, paths) if value is not None]
    return int(sum(counts)) if counts else None


def cores() -> list[int]:
    if hasattr(os, "sched_getaffinity"):
        return sorted(os.sched_getaffinity(0))
    return list(range(os.cpu_count() or 1))


def _cpu(root: Path, core: int) -> Path:
    return root / "sys/devices/system/cpu" / f"cpu{core}"


def _jetson_gpu(root: Path) -> float | None:
    for folder in sorted((root / "sys/class/devfreq").glob("*")):
        hertz = _number_in(folder / "cur_freq") if JETSON_GPU.search(folder.name) else None
        if hertz:
            return hertz / 1e6
    return None


def _temperatures(root: Path) -> Iterator[float]:
    for path in (root / "sys/class/thermal").glob("thermal_zone*/temp"):
        millidegrees = _number_in(path)
        if millidegrees is not None and millidegrees > 0:  # absent sensors say 0 or less
            yield millidegrees / 1e3


def _pi_throttled(root: Path) -> str | None:
    word = _text_in(root / "sys/devices/platform/soc/soc:firmware/get_throttled")
    value = _number(word or "", base=16)
    return None if value is None else _named(int(value), PI_BITS)


def _mode(root: Path) -> str | None:
    governor = _text_in(_cpu(root, cores()[0]) / "cpufreq" / "scaling_governor")
    power = _text_in(root / "var/lib/nvpmodel/status")
    parts = [f"governor {governor}" if governor else "", f"nvpmodel {power}" if power else ""]
    return ", ".join(part for part in parts if part) or None


def _named(word: int, bits: dict[int, str]) -> str:
    return ", ".join(name for bit, name in bits.items() if word >> bit & 1)


def _number_in(path: Path) -> float | None:
    return _number(_text_in(path) or "")


def _number(text: str, base: int = 10) -> float | None:
    with contextlib.suppress(ValueError):
        return float(int(text, 16)) if base == 16 else float(text)
    return None


def _text_in(path: Path) -> str | None:
    # sensors that are switched off exist and fail when read
    with contextlib.suppress(OSError, UnicodeDecodeError):
        return path.read_text().strip()
    return None


def _shown(value: object) -> str:
    return f"{value:.0f}" if isinstance(value, float) else str(value or "?")
