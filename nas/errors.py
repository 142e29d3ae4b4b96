"""Every error that a user can meet. Imports nothing of ours, so every package may import it.

NasctlError                exit 1  something expected went wrong (data, files, a device)
├── UsageError             exit 2  what was typed
├── BudgetInfeasible       exit 3  no network of the space meets the budget
├── BudgetMissed           exit 4  the estimate met the budget, the measurement did not
└── ParityFailed           exit 5  the exported file does not compute what the network computes

One error is one line: what happened, where, what is allowed and what to do next. Only `cli.main`
catches it; anything else that escapes is a bug and shows its traceback.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class NasctlError(Exception):
    """What went wrong, where (a flag, a file, a field), what is allowed and what to do next."""

    exit_code = 1

    def __init__(
        self, what: str, *, where: str = "", allowed: str | Iterable[str] = "", next: str = ""
    ) -> None:
        self.what, self.where, self.next = what, where, next
        self.allowed = allowed if isinstance(allowed, str) else ", ".join(allowed)
        super().__init__(str(self))

    def __str__(self) -> str:
        line = f"{self.where}: {self.what}" if self.where else self.what
        if self.allowed:
            line += f"; allowed: {self.allowed}"
        if self.next:
            line += f". {self.next}"
        return " ".join(line.split())


class UsageError(NasctlError):
    exit_code = 2


class BudgetInfeasible(NasctlError):
    exit_code = 3


class BudgetMissed(NasctlError):
    exit_code = 4


class ParityFailed(NasctlError):
    exit_code = 5


def unknown(kind: str, name: str, known: Iterable[str], *, where: str = "") -> UsageError:
    """The error for a name that is not in a list, with the nearest name that is."""
    known = sorted(known)
    close = difflib.get_close_matches(name.lower(), known, n=1, cutoff=0.5)
    hint = f"Did you mean {close[0]}?" if close else ""
    return UsageError(f"unknown {kind} '{name}'", where=where, allowed=known, next=hint)
