"""Pruning methods to compare with, one file each: `prune(job, settings, known) -> Steps`.

All prune the same units to the same widths and stop at the same target; they differ in what they
think a channel is worth, and in which channels compete. With a record `known` (of `job.inputs()`)
a method that was killed goes on to the same network.
"""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Protocol

from compress.job import Job, Settings, Steps
from compress.record import Record
from nas.errors import unknown


class Method(Protocol):
    def __call__(
        self, job: Job, settings: Settings = ..., known: Record | None = None
    ) -> Steps: ...


def names() -> list[str]:
    found = Path(__file__).parent.glob("*.py")
    return sorted(path.stem for path in found if not path.stem.startswith("_"))


def load(name: str) -> Method:
    """The method of a file here; raises UsageError, naming the nearest, where there is none."""
    if name not in names():
        raise unknown("pruning method", name, names())
    return importlib.import_module(f"{__name__}.{name}").prune
