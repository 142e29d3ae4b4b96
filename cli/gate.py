"""Is a file over its budget, or slower than an older one? Numbers in, an answer out.

Where a process lies in memory makes a file some per cent faster or slower for as long as the
process lives, so one process decides nothing: every one of several has to say it. A file against
itself seems slower in a process as often as faster, whatever the noise; in PROCESSES of them at
once, by chance, in at most one run of 128. (Callers swap the two in every other process, so that
what comes second has no lasting disadvantage.) Where they do not agree, their middle decides, if
the machine was quiet. On a busy one nothing is decided.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

Answer = Literal["held", "missed", "in doubt"]

PROCESSES = 7
SAME = 0.02  # a relative difference that is none: what the same file repeats to
#: a relative difference that is seen reliably: processes differ by as much (`protocol`)
SEEN = 0.05


@dataclass(frozen=True)
class Span:
    """A figure over several processes: its middle, and between which ends it surely is."""

    low: float
    middle: float
    high: float
    noisy: str = ""  # why the middle is in doubt; empty when it is not

    def answer(self, missed: float, held: float) -> Answer:
        """Missed where all of it is above the first limit; held where all of it is up to the
        second, or the middle is and in no doubt."""
        if self.low > missed:
            return "missed"
        certain = self.high if self.noisy else self.middle
        return "held" if certain <= held else "in doubt"


def slowdown(new_ms: Sequence[float], old_ms: Sequence[float], doubts: Sequence[str]) -> Span:
    """The new file's time over the older one's, from processes that timed both in turn. `doubts`
    has a line of each process, empty where it is sure."""
    ratios = [new / old for new, old in zip(new_ms, old_ms, strict=True)]
    return Span(min(ratios), statistics.median(ratios), max(ratios), _noisy(doubts))


def against(ratio: Span) -> Answer:
    """Is a file slower than the older one?"""
    return ratio.answer(missed=1 + SAME, held=1 + SEEN)


def duration(ms: Sequence[float], fastest_ms: float, doubts: Sequence[str]) -> Span:
    """A file's time from the medians of processes and the fastest round of them all. Other work
    only slows a file down, and may do so in every process: in doubt that round is the low end."""
    noisy = _noisy(doubts)
    low = fastest_ms if noisy else min(ms)
    return Span(low, statistics.median(ms), max(ms), noisy)


def budget(ms: Span, budget_ms: float) -> Answer:
    """Is a file over the budget?"""
    return ms.answer(missed=budget_ms, held=budget_ms)


def _noisy(doubts: Sequence[str]) -> str:
    """The middle of several is in doubt where half of them are."""
    given = [doubt for doubt in doubts if doubt]
    if 2 * len(given) < len(doubts) or not given:
        return ""
    return f"{len(given)} of {len(doubts)} processes in doubt: {given[0]}"
