"""What the verbs share in talking to a person: bars, tables, JSON, quantities, interrupts."""

from __future__ import annotations

import contextlib
import json
import re
import signal
import sys
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

from nas.errors import UsageError

UNITS_MS = {"us": 1e-3, "ms": 1.0, "s": 1e3}


def parse_latency(text: str | None, where: str = "--latency") -> float | None:
    """'5ms', '300us' or '0.1s' in milliseconds; a bare number is refused."""
    if text is None:
        return None
    match = re.fullmatch(r"\s*([0-9]*\.?[0-9]+(?:e-?[0-9]+)?)\s*([a-zµ]*)\s*", text.lower())
    unit = match[2].replace("µ", "u") if match else ""
    if not match or unit not in UNITS_MS:
        what = f"'{text}' has no unit" if match and not match[2] else f"'{text}' is not a latency"
        raise UsageError(what, where=where, allowed="a number with ms, us or s, as in 5ms")
    value = float(match[1]) * UNITS_MS[unit]
    if value <= 0:
        raise UsageError("a budget must be above zero", where=where)
    return value


def parse_seconds(text: str, where: str) -> float:
    """'90s', '15min' or '1h' in seconds; a bare number is refused."""
    match = re.fullmatch(r"\s*([0-9]*\.?[0-9]+)\s*(s|min|h)\s*", text.lower())
    if not match or float(match[1]) <= 0:
        what = f"'{text}' is not a duration"
        raise UsageError(what, where=where, allowed="a number with s, min or h, as in 15min")
    return float(match[1]) * {"s": 1, "min": 60, "h": 3600}[match[2]]


def format_ms(value: float) -> str:
    """Three significant digits in the unit that reads best."""
    if value < 1:
        return f"{value * 1e3:.3g} us"
    return f"{value:.3g} ms" if value < 1e3 else f"{value / 1e3:.3g} s"


def format_seconds(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def say(text: str = "", label: str = "") -> None:
    """A line for people under a bold label, on stderr: stdout carries results."""
    from rich.console import Console
    from rich.text import Text

    # as Text, because a path may hold what rich would read as markup
    line = Text.assemble((f"{label:<10}", "bold"), text)
    Console(stderr=True, highlight=False, soft_wrap=True).print(line)


def show(table: Any) -> None:
    """A rich table on stdout."""
    from rich.console import Console

    Console(highlight=False).print(table)


def emit_json(value: Any) -> None:
    json.dump(value, sys.stdout, indent=1)
    sys.stdout.write("\n")


@contextlib.contextmanager
def bar(description: str, total: float) -> Iterator[Callable[[float, str], None]]:
    """A progress bar with ETA on stderr; yields `update(done, note)`."""
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    columns = (
        TextColumn("  {task.description:<28}"),
        BarColumn(bar_width=30),
        TextColumn("{task.percentage:>3.0f} %"),
        TimeElapsedColumn(),
        TextColumn("eta"),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
    )
    with Progress(*columns, console=Console(stderr=True), refresh_per_second=4) as progress:
        task = progress.add_task(description, total=total, note="")
        yield lambda done, note: progress.update(task, completed=done, note=note)


@contextlib.contextmanager
def deferred_interrupt(*, once: bool = True) -> Iterator[Callable[[], bool]]:
    """Ctrl-C (and SIGTERM) set a flag, which the yielded function reads, so that a loop can stop
    between two steps and save; a second Ctrl-C interrupts at once. Not with `once` off, for
    processes whose launcher passes on the Ctrl-C that they got already."""
    asked = False

    def note(number: int, frame: FrameType | None) -> None:
        nonlocal asked
        if asked and once:
            raise KeyboardInterrupt
        asked = True

    try:
        before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    except ValueError:  # not the main thread (a test, a notebook): leave signals alone
        before = {}
    try:
        yield lambda: asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
