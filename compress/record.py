"""What a pruning has measured so far, in an append-only file: the loop itself is deterministic, so
run again with the same record it comes to the same networks without measuring anything twice."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from hw_profiles import lines
from nas.errors import NasctlError


class Record:
    """Measured values by key, on disk before they are used; without a path, in memory only.

    `inputs` names what all values depend on: the file of other inputs is refused. A line torn by a
    kill is cut off.
    """

    def __init__(self, path: Path | None = None, inputs: str = "") -> None:
        self.path = path
        self._known: dict[str, Any] = {}
        if path is None:
            return
        if path.exists() and (found := lines.whole(path)):
            self._read(found, path, inputs)
        else:
            lines.append(path, {"inputs": inputs})

    def _read(self, found: list[bytes], path: Path, inputs: str) -> None:
        try:
            first, *rest = map(json.loads, found)
            there = first["inputs"]
            self._known = {row["key"]: row["value"] for row in rest}
        except (ValueError, KeyError, TypeError) as error:
            raise NasctlError(
                f"damaged record of a pruning ({error})",
                where=str(path),
                next="Delete it to begin again.",
            ) from error
        if there != inputs:
            raise NasctlError(
                f"is the record of another pruning: {there} there, {inputs} here",
                where=str(path),
                next="Begin again without it (nasctl: --force), or name another file.",
            )

    def of(self, key: str, measure: Callable[[], Any]) -> Any:
        """The value of `key`, JSON-able; measured if it is not known."""
        if key not in self._known:
            value = measure()
            if self.path is not None:
                lines.append(self.path, {"key": key, "value": value})
            self._known[key] = value
        return self._known[key]
