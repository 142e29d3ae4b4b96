"""Pruning methods to compare with, one file each: `prune(job, settings) -> Steps`, as PAGCP's.

All prune the same units to the same widths and stop at the same target; they differ in what they
think a channel is worth, and in which channels compete.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from pathlib import Path

from compress.job import Job, Settings, Steps
from nas.errors import unknown

Method = Callable[[Job, Settings], Steps]


def names() -> list[str]:
    found = Path(__file__).parent.glob("*.py")
    return sorted(path.stem for path in found if not path.stem.startswith("_"))


def load(name: str) -> Method:
    """The method of a file here; raises UsageError, naming the nearest, where there is none."""
    if name not in names():
        raise unknown("pruning method", name, names())
    return importlib.import_module(f"{__name__}.{name}").prune
