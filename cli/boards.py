"""Several devices in one `nasctl search`: one supernet, then a search and a delivery for each.

Every device has a run directory of its own inside the common one; the first trains the supernet
that the others search, if there is one at all. A device that misses its budget does not stop the
others.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cli import console
from cli import search as one
from nas.errors import BudgetMissed, UsageError
from nas.run import Run, digest

if TYPE_CHECKING:
    from cli.stages import Job


def prepare(
    given: dict[str, Any],
    names: Sequence[str],
    budgets: Sequence[float | None],
    folder: Path | None,
    *,
    quick: bool,
) -> list[Job]:
    """A job per device; one budget is for all of them, otherwise there is one for each."""
    from hw_profiles import device
    from nas import strategies

    boards = [device.load(name.strip()) for name in names]
    if given.get("storage"):
        raise UsageError(
            "several devices cannot share one study", where="--storage", next="One search each."
        )
    if strategies.learns(str(given.get("strategy"))):
        raise UsageError(
            f"--strategy {given['strategy']} learns for one device", where="--hw", next="One each."
        )
    if len({board.name for board in boards}) < len(boards):
        raise UsageError("a device is named twice", where="--hw")
    if len(budgets) not in (0, 1, len(boards)):
        raise UsageError(
            f"{len(budgets)} budgets for {len(boards)} devices",
            where="--latency",
            allowed="one for all, or one for each, separated by commas",
        )
    each = list(budgets) * len(boards) if len(budgets) == 1 else list(budgets)
    specs = [
        {**given, "hw": name.strip()} | ({"latency_ms": each[at]} if each else {})
        for at, name in enumerate(names)
    ]
    first = one.prepare(specs[0], None, quick=quick)
    own = first.run.folder
    every = "+".join(board.name for board in boards)
    name = own.name.removesuffix(first.spec.digest()[:8]).replace(boards[0].name, every)
    root = folder or own.with_name(name + digest(specs)[:8])
    jobs = [replace(first, run=Run(root / boards[0].name))]
    trained = given.get("supernet") or str(jobs[0].run.folder)
    for board, spec in zip(boards[1:], specs[1:], strict=True):
        if not first.spec.alone:
            spec["supernet"] = trained
        jobs.append(one.prepare(spec, root / board.name, quick=quick, task=first.task))
    return jobs


def plan(jobs: Sequence[Job]) -> dict[str, Any]:
    """Device name -> what would be done for it; the supernet is trained for the first alone."""
    plans = {}
    for job in jobs:
        console.say(job.device.name, "device")
        plans[job.device.name] = one.plan(job)
    return plans


def search(jobs: Sequence[Job], *, force: bool) -> dict[str, Any]:
    """Device name -> content of its report. Raises the first BudgetMissed after all are done."""
    from cli import stages

    for job in jobs:  # an impossible budget on any device ends it before any training
        with job.run.locked(job.spec, force=force):
            table = stages.latency_table(job)
            stages.make_problem(job, table, lambda genes: (0.0, 0.0))
    reports: dict[str, Any] = {}
    missed: list[BudgetMissed] = []
    for job in jobs:
        console.say()
        console.say(job.device.name, "device")
        try:
            reports[job.device.name] = one.locked_search(job, force=False)
        except BudgetMissed as error:
            console.say(str(error))
            missed.append(error)
    _compare(jobs, reports)
    if missed:
        raise missed[0]
    return reports


def _compare(jobs: Sequence[Job], reports: dict[str, Any]) -> None:
    """One recommended network per device, on stderr as every summary."""
    console.say()
    for job in jobs:
        if job.device.name not in reports:
            continue
        chosen = reports[job.device.name]["chosen"]
        predicted, measured = chosen["latency"]["predicted"], chosen["latency"]["measured"]
        ms = console.format_ms(measured["median_ms"] if measured else predicted["value_ms"])
        console.say(
            f"{ms} ({'measured' if measured else predicted['source']}), "
            f"{chosen['macs'] / 1e6:.2f} MMACs, {chosen['test_accuracy']:.2%} on test, "
            f"{job.run.path(chosen['file']['path'])}",
            f"{job.device.name}  ",
        )
