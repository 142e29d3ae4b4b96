"""What a measurement was made on: machine, system, runtime. The provenance of every table.

This file is also sent to boards: it needs Python 3.8 and its standard library, nothing else.
"""

from __future__ import annotations

import contextlib
import os
import platform
from pathlib import Path
from typing import Dict, Union

from hw_profiles import clocks

Fingerprint = Dict[str, Union[str, int, float]]


def fingerprint(runtime: str, root: Path = Path("/")) -> Fingerprint:
    """Of this machine; "?" where it does not tell. `runtime` is a name with its version; `root` is
    for tests. Nothing in it names a person, an address or a serial number."""
    return {
        "board": _first_line(root / "proc/device-tree/model"),
        "processor": field(root / "proc/cpuinfo", "model name", "Hardware", "CPU part"),
        "architecture": platform.machine(),
        "cores": len(clocks.cores()),
        "memory_mb": _memory_mb(root),
        "system": platform.platform(),
        "l4t": _first_line(root / "etc/nv_tegra_release"),
        "python": platform.python_version(),
        "runtime": runtime,
        "clocks": str(clocks.read(root)),
        "load": round(os.getloadavg()[0], 2),
    }


def _memory_mb(root: Path) -> int:
    kilobytes = field(root / "proc/meminfo", "MemTotal").split()[0]
    return int(kilobytes) // 1024 if kilobytes.isdigit() else 0


def field(path: Path, *names: str) -> str:
    """The first of these fields in a file of `name : value` lines."""
    lines = [line.partition(":") for line in _lines(path)]
    found = {name.strip(): value.strip() for name, _, value in reversed(lines)}
    return next((found[name] for name in names if found.get(name)), "?")


def _first_line(path: Path) -> str:
    lines = _lines(path)
    # device-tree strings end in a zero byte
    return lines[0].strip("\0 ") if lines else "?"


def _lines(path: Path) -> list[str]:
    with contextlib.suppress(OSError):
        return path.read_text(encoding="utf-8", errors="replace").splitlines()
    return []
