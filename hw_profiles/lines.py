"""Append-only files of JSON lines that survive a kill: a profile's timings, a benchmark's rows."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path

from nas.errors import NasctlError


def append(path: Path, row: Mapping[str, object]) -> None:
    """Add one line and wait until it is on the disk. Raises NasctlError where it does not fit."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise NasctlError(
            f"cannot write: {error.strerror or error}",
            where=str(path),
            next="Its earlier lines are intact: make space, then give the same command.",
        ) from error


def whole(path: Path) -> list[bytes]:
    """The lines of the file; one that a kill tore is cut off, in the file too."""
    content = path.read_bytes()
    kept = content[: content.rfind(b"\n") + 1]
    if kept != content:
        with path.open("r+b") as file:
            file.truncate(len(kept))
    return kept.splitlines()
