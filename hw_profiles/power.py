"""Energy that this machine used, as far as it tells.

Where it is read: RAPL's counter of the processor packages (powercap, which most systems let only
root read); the INA3221 power monitors of Jetson modules; `nvidia-smi` for other NVIDIA cards. The
last two give watts, which are integrated over the time of work, without that of the readings: what
falls between two of them is only seen as their mean. Virtual machines mostly tell nothing.
"""

from __future__ import annotations

import statistics
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from nas.errors import NasctlError

#: what names the whole module's input on Jetson carrier boards; others are parts of it
JETSON_INPUTS = ("VDD_IN", "POM_5V_IN")
POLL_S = 0.02  # between readings of a sensor of watts
LEAST_S = 0.5  # of work: shorter loops are lost in a sensor's own averaging


@dataclass(frozen=True)
class Sensor:
    """`read` gives joules since some start (`counts`) or watts now."""

    name: str
    read: Callable[[], float]
    counts: bool


@dataclass(frozen=True)
class Energy:
    """Of one call, everything that the sensor sees; `idle_mj` is what the same time costs without
    work."""

    mj: float
    idle_mj: float
    sensor: str
    calls: int


def sensor(kind: str, root: Path = Path("/")) -> Sensor | None:
    """The one that sees a device of this kind (cpu or gpu), or None: a Jetson's module has both in
    it, elsewhere a processor's counter says nothing of a card. `root` is for tests."""
    return _ina3221(root) or (_nvidia() if kind == "gpu" else _rapl(root))


def per_call(
    call: Callable[[], object],
    found: Sensor,
    *,
    seconds: float = 3.0,
    clock: Callable[[], float] = time.perf_counter,
    sleep: Callable[[float], object] = time.sleep,
) -> Energy:
    """Calls in a row for about `seconds`, between two idle periods of a third of that."""
    seconds = max(seconds, LEAST_S)

    def rest() -> None:
        sleep(POLL_S)

    watts = [_watts(rest, found, seconds / 3, clock)[0]]
    busy, calls, took = _watts(call, found, seconds, clock)
    watts.append(_watts(rest, found, seconds / 3, clock)[0])
    each_s = took / calls
    return Energy(1e3 * busy * each_s, 1e3 * statistics.fmean(watts) * each_s, found.name, calls)


def _watts(
    work: Callable[[], object], found: Sensor, seconds: float, clock: Callable[[], float]
) -> tuple[float, int, float]:
    """(mean watts, calls, seconds) of doing `work` again and again."""
    first = last = found.read()
    joules, calls, reading = 0.0, 0, 0.0
    began = polled = clock()
    while clock() - began - reading < seconds or not calls:
        work()
        calls += 1
        now = clock()
        if not found.counts and now - polled >= POLL_S:
            value = found.read()
            joules += (now - polled) * (last + value) / 2
            polled, last = clock(), value
            reading += polled - now  # nothing works meanwhile: neither time nor energy of ours
    end = clock()
    value = found.read()
    took = end - began - reading
    joules = value - first if found.counts else joules + (end - polled) * (last + value) / 2
    return joules / took, calls, took


def _rapl(root: Path) -> Sensor | None:
    zones = sorted((root / "sys/class/powercap").glob("intel-rapl:?"))
    packages = [zone for zone in zones if _text(zone / "name").startswith("package")]
    if not packages or any(_number(zone / "energy_uj") is None for zone in packages):
        return None
    return Sensor(f"RAPL, {len(packages)} processor package(s)", _Rapl(packages).joules, True)


class _Rapl:
    """The packages' counters as one that never wraps around (each does, at a range of its own)."""

    def __init__(self, zones: list[Path]) -> None:
        self.zones = zones
        self.last = [_known(zone / "energy_uj") for zone in zones]
        self.total = 0.0

    def joules(self) -> float:
        for at, zone in enumerate(self.zones):
            now = _known(zone / "energy_uj")
            more = now - self.last[at]
            self.total += more if more >= 0 else more + _known(zone / "max_energy_range_uj")
            self.last[at] = now
        return self.total / 1e6


def _ina3221(root: Path) -> Sensor | None:
    for label in sorted((root / "sys/class/hwmon").glob("hwmon*/in?_label")):
        chip, rail = label.parent, label.name[2]
        if _text(chip / "name") != "ina3221" or _text(label) not in JETSON_INPUTS:
            continue
        volts, amperes = chip / f"in{rail}_input", chip / f"curr{rail}_input"
        if _number(volts) is not None and _number(amperes) is not None:
            return Sensor(f"INA3221, {_text(label)}", partial(_product, volts, amperes), False)
    return None


def _product(milli_volts: Path, milli_amperes: Path) -> float:
    """In watts."""
    return _known(milli_volts) * _known(milli_amperes) / 1e6


def _nvidia() -> Sensor | None:
    try:
        _nvidia_watts()
    except NasctlError:
        return None
    return Sensor("nvidia-smi, first card", _nvidia_watts, False)


def _nvidia_watts() -> float:
    command = ["nvidia-smi", "--query-gpu=power.draw", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(command, capture_output=True, timeout=10, check=True)
        return float(done.stdout.split()[0])
    except (OSError, subprocess.SubprocessError, ValueError, IndexError) as error:
        raise NasctlError("the card does not say its power", where="nvidia-smi") from error


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError):
        return ""


def _known(path: Path) -> float:
    if (value := _number(path)) is None:
        raise NasctlError("the sensor does not answer any more", where=str(path))
    return value


def _number(path: Path) -> float | None:
    try:
        return float(_text(path))
    except ValueError:
        return None
