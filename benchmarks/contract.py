"""What every benchmark does alike: arguments, the data folder, rows that survive a kill, the end.

`python -m benchmarks.NAME [--quick] [--save]` prints a table for people and, as its last line, one
JSON object: {"benchmark", "figures", "aims", "seconds", "machine"}. Without its data a benchmark
says so in one line, leaves figures empty and exits 0.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hw_profiles import lines

RESULTS = Path(__file__).parent / "results"
DATA = "NASCTL_DATA"


def parser(doc: str | None) -> argparse.ArgumentParser:
    """With the two flags that every benchmark has; a benchmark adds its own."""
    first_line = (doc or "").strip().splitlines()[0]
    made = argparse.ArgumentParser(description=first_line)
    made.add_argument("--quick", action="store_true", help="a smaller run, under a minute")
    made.add_argument("--save", action="store_true", help="also write benchmarks/results/NAME.json")
    return made


def data(folder: str) -> Path | None:
    """NASCTL_DATA/folder, or None where it is absent."""
    root = os.environ.get(DATA)
    path = Path(root, folder) if root else None
    return path if path and path.is_dir() else None


def machine() -> dict[str, Any]:
    model = platform.processor()
    info = Path("/proc/cpuinfo")
    if info.is_file():
        lines = [line for line in info.read_text().splitlines() if line.startswith("model name")]
        model = lines[0].split(":", 1)[1].strip() if lines else model
    return {
        "system": platform.system(),
        "processor": model,
        "cores": os.cpu_count(),
        "python": platform.python_version(),
    }


@dataclass
class Outcome:
    """What a benchmark found; `seconds` counts from when it was made."""

    benchmark: str
    figures: dict[str, float] = field(default_factory=dict)
    aims: dict[str, dict[str, Any]] = field(default_factory=dict)
    started: float = field(default_factory=time.perf_counter)

    def aim(self, name: str, aim: str, got: float, met: bool) -> None:
        self.aims[name] = {"aim": aim, "got": got, "met": bool(met)}

    def finish(self, save: bool = False) -> int:
        """Prints the last line; the returned 0 is the exit code."""
        record = {
            "benchmark": self.benchmark,
            "figures": {name: round(float(value), 6) for name, value in self.figures.items()},
            "aims": self.aims,
            "seconds": round(time.perf_counter() - self.started, 1),
            "machine": machine(),
        }
        if save:
            RESULTS.mkdir(exist_ok=True)
            path = RESULTS / f"{self.benchmark}.json"
            path.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
        print(json.dumps(record))
        return 0

    def skip(self, why: str) -> int:
        print(f"skipped: {why}")
        self.figures.clear()
        return self.finish()


def table(header: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """Right-aligned columns under a header; floats with three significant digits."""
    cells = [list(header), *([_cell(value) for value in row] for row in rows)]
    widths = [max(len(row[at]) for row in cells) for at in range(len(header))]
    return "\n".join(
        "  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True))
        for row in cells
    )


def _cell(value: object) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)


class Rows:
    """Finished rows of a long run in a JSON-lines file: each is on disk before the next starts, and
    a run that was stopped goes on where it stopped. A line torn by a kill is dropped."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.done: dict[str, dict[str, Any]] = {}
        if not path.is_file():
            return
        for line in lines.whole(path):
            row = json.loads(line)
            self.done[self._name(row["key"])] = row["value"]

    @staticmethod
    def _name(key: Mapping[str, Any]) -> str:
        return json.dumps(key, sort_keys=True)

    def get(self, key: Mapping[str, Any]) -> dict[str, Any] | None:
        return self.done.get(self._name(key))

    def add(self, key: Mapping[str, Any], value: dict[str, Any]) -> None:
        lines.append(self.path, {"key": dict(key), "value": value})
        self.done[self._name(key)] = value
