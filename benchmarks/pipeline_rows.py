"""What the parts of `benchmarks.pipeline` share: verbs as they are typed, and the machine that a
row is of."""

from __future__ import annotations

import contextlib
import io
import os
from collections.abc import Sequence
from pathlib import Path

from cli import main
from hw_profiles import engines, runtimes
from nas.errors import BudgetInfeasible, BudgetMissed, NasctlError

ATTEMPTS = 3  # at what a busy machine makes fail or doubtful
TOLD = (BudgetInfeasible.exit_code, BudgetMissed.exit_code)  # by the files that are left


def typed(words: Sequence[object], left: Path) -> tuple[int, str]:
    """Run a verb as it is typed: its exit code and what it prints. A budget or a bound that was
    missed is told by the file `left`; where a measured one left none, the verb is repeated and goes
    on. Raises NasctlError where none is left in the end, and for whatever else it ends with."""
    for _ in range(ATTEMPTS):
        with contextlib.redirect_stdout(io.StringIO()) as said:
            code = main.run([str(word) for word in words])
        if code != BudgetMissed.exit_code or left.is_file():
            break
    if code == main.INTERRUPTED:
        raise KeyboardInterrupt
    if code and not (code in TOLD and left.is_file()):
        raise NasctlError(f"nasctl {words[0]} ended with {code}", where=str(left.parent))
    return code, said.getvalue()


def machine() -> dict[str, str]:
    """In every key: what milliseconds depend on."""
    return {**engines.processor(), "onnxruntime": runtimes.load_module("onnxruntime").version()}


def load() -> list[float]:
    """In every row: how busy the machine was."""
    return [round(each, 2) for each in os.getloadavg()]
