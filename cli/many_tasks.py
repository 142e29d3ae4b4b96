"""`nasctl search --tasks class,box`: several tasks in one search, a verified file for each."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cli import accelerator, budgets, console
from nas.errors import BudgetMissed, UsageError, unknown

if TYPE_CHECKING:
    from cli.many_tasks_stages import Job

SPACE = "fbnetv5"
FEW_INSIDE = 0.01  # of a distribution's draws: too few to choose among
#: what of `nasctl search` is for the networks of one task
ALONE = (
    *("strategy", "evaluations", "params", "memory_bytes", "energy_mj"),
    *("supernet", "alone", "storage", "study_name"),
)
STEPS, QUICK = 1500, 300  # of the supernet
OWN, QUICK_OWN = 2000, 400  # of each task's network, alone


def search(job: Job, *, force: bool, quiet: bool) -> dict[str, Any]:
    """The verb; returns the report's content, which it shows unless it is to be `quiet`.

    Raises BudgetMissed after all files are written, if a measured one is above its budget.
    """
    content = execute(job, force=force)
    if not quiet:
        say_outcome(content, job.run.folder)
    for name, row in content["tasks"].items():
        if row["missed"]:
            raise BudgetMissed(
                f"the file of {name} took {console.format_ms(row['measured']['median_ms'])}, its "
                f"budget is {console.format_ms(row['budget']['most'])}",
                where=str(job.run.path("report.json")),
                next="Ask for a little less.",
            )
    return content


def prepare(
    given: dict[str, Any], typed: Mapping[str, str | None], folder: Path | None, *, quick: bool
) -> Job:
    """Everything validated and loaded: names before data, data before any work. `typed` are the
    budgets as typed, latency and macs; a spec's are among those `given`."""
    from hw_profiles import device
    from nas import multitask, run

    names = given.pop("tasks")
    names = [part.strip() for part in names.split(",")] if isinstance(names, str) else names
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise UsageError(f"tasks = {names}", where="--spec", allowed='a list, as ["class", "box"]')
    if len(set(names)) < len(names):
        raise UsageError("a task is named twice", where="--tasks")
    if given.setdefault("space", SPACE) != SPACE:
        raise UsageError(
            f"space '{given['space']}' answers one task", where="--space, --tasks", allowed=SPACE
        )
    for name in ALONE:
        if given.pop(name, None) not in (None, False):
            flag = name.removesuffix("_bytes").removesuffix("_mj").replace("_", "-")
            raise UsageError("is of searches for one task", where=f"--{flag}", next="Leave it out.")
    if not given.get("data"):
        raise UsageError("no data with several tasks", where="--data", allowed=multitask.FORMS)
    board = device.load(str(given.get("hw", "cpu")))
    most = {name: _budgets(text, name, names) for name, text in typed.items()}
    from cli.many_tasks_stages import Job, TasksSpec
    from cli.train import cores
    from nas.run import validated

    told = {"latency_ms": most["latency"], "macs": most["macs"]}
    fields = {**given, "tasks": names, **{field: value for field, value in told.items() if value}}
    rough = validated(TasksSpec, {"epochs": 1, "finetune": 1, "threads": 1, **fields})
    accelerator.named(rough.train_on)  # raises, before data are read
    for flag, of in (("--latency", rough.latency_ms), ("--macs", rough.macs)):
        if strange := sorted(of.keys() - set(names)):
            raise unknown("task", strange[0], names, where=flag)
        if rough.together and of and (len(set(of.values())) > 1 or set(of) != set(names)):
            raise UsageError("one network has one budget", where=flag, allowed="as 5ms, for all")
    if both := rough.latency_ms.keys() & rough.macs.keys():
        raise UsageError(f"two budgets for {min(both)}", where="--latency, --macs")
    console.say(rough.data, "data")
    task = multitask.load(rough.data, size=rough.size).only(names)
    per_epoch = len(task.train) / rough.batch
    steps, own = (QUICK, QUICK_OWN) if quick else (STEPS, OWN)
    defaults = {"epochs": steps / per_epoch, "finetune": own / per_epoch, "threads": cores()}
    defaults = {name: float(f"{value:.3g}") for name, value in defaults.items()}
    spec = validated(TasksSpec, {**defaults, "threads": cores(), **fields})
    if spec.batch > len(task.train) // 5:  # a fifth of them is for the distributions
        what = f"{spec.batch} images per step, but {len(task.train)} training images"
        raise UsageError(what, where="--batch", allowed=f"up to {len(task.train) // 5}")
    name = f"{SPACE}-{task.name}-{board.name}-{run.digest(run.stated(spec))[:8]}"
    job = Job(spec, run.Run(folder or Path("runs") / name.replace(":", "-")), task, board)
    assert job.trainer is None or callable(job.trainer)  # raises for what names nothing
    return job


def _budgets(text: str | None, flag: str, names: list[str]) -> dict[str, float]:
    """'5ms' for every task or 'class=3ms,box=5ms' for each of some."""
    if text is None:
        return {}
    read = _latency if flag == "latency" else _macs
    if "=" not in text:
        return dict.fromkeys(names, read(text))
    found: dict[str, float] = {}
    for part in text.split(","):
        name, _, value = (piece.strip() for piece in part.partition("="))
        if name in found:
            raise UsageError(f"names {name} twice", where=f"--{flag}")
        found[name] = read(value)
    return found


def _latency(text: str) -> float:
    return console.parse_latency(text) or 0.0


def _macs(text: str) -> float:
    return budgets.parse(text, budgets.MACS, "--macs") or 0.0


def plan(job: Job) -> dict[str, Any]:
    """What would be done and for how long, from two steps timed now. Raises BudgetInfeasible
    where a table tells that no network fits; this machine's is measured by the search itself."""
    from cli import many_tasks_stages as stages

    _say_inputs(job)
    if not job.device.local:
        stages.asked(job, stages.latency_table(job))
    else:
        console.say("whether any network fits is told once this machine is measured", "budget")
    step_s = stages.step_seconds(job)
    parts = {
        "profile": 45.0 if job.device.local else 0.0,
        "search": step_s * job.schedule.steps,
        "own training": step_s * job.own_schedule.steps * len(job.parts),
        "deliver": 20.0 * len(job.parts),
    }
    for name, seconds in parts.items():
        console.say(console.format_seconds(seconds), name)
    console.say(f"{console.format_seconds(sum(parts.values()))}, into {job.run.folder}", "in all")
    return {
        "spec": job.spec.model_dump(),
        "run": str(job.run.folder),
        "steps": job.schedule.steps,
        "estimated_seconds": {name: round(seconds, 1) for name, seconds in parts.items()},
        "estimated_total_seconds": round(sum(parts.values()), 1),
    }


def execute(job: Job, *, force: bool) -> dict[str, Any]:
    """Search, train each task's network, deliver; what is finished already is not repeated."""
    from cli import many_tasks_delivery as delivery
    from cli import many_tasks_stages as stages

    began = time.monotonic()
    with job.run.locked(job.spec, force=force):
        if force:
            stages.forget(job)
        _say_inputs(job)
        table = stages.latency_table(job)
        search = stages.asked(job, table)
        shared = stages.learned(job, search)
        finalists = stages.chosen(job, search, shared)
        rows: dict[str, Any] = {}
        for part, found in zip(job.parts, finalists, strict=True):
            console.say("train alone, export, verify", part.title)
            rows |= delivery.delivered(job, table, search, shared, found, part)
        return stages.reported(job, table, search, shared, rows, time.monotonic() - began)


def _say_inputs(job: Job) -> None:
    task = job.task
    console.say(
        f"{len(task.train)} train, {len(task.val)} validation, {len(task.test)} test images of "
        f"{' x '.join(map(str, task.shape))}; tasks {', '.join(job.spec.tasks)}"
    )
    console.say(str(job.run.folder), "run")
    console.say(job.device.summary, "latency")


def say_outcome(content: dict[str, Any], folder: Path) -> None:
    """The report of a search for several tasks, for people."""
    from rich.table import Table

    ms: Callable[[float], str] = console.format_ms
    table = Table("task", "MMACs", "predicted (upper end)", "measured", "budget", "val", "test")
    for name, row in content["tasks"].items():
        predicted, measured, budget = row["predicted"], row["measured"], row["budget"]
        limit = "none" if budget is None else budgets.show(budget["name"], budget["most"])
        table.add_row(
            name,
            f"{row['macs'] / 1e6:.2f}",
            f"{ms(predicted['value_ms'])} ({ms(predicted['high_ms'])}), {predicted['source']}",
            ms(measured["median_ms"]) if measured else "not measured",
            limit,
            f"{row['val']:.4f}",
            "no labels" if row["test"] is None else f"{row['test']:.4f}",
        )
    console.show(table)
    for name, row in content["tasks"].items():
        if row["measured"] and row["measured"]["noisy"]:
            console.say(f"what was measured is in doubt: {row['measured']['noisy']}", name)
    for name, told in content["convergence"].items():
        unsettled = "" if told["entropy"] < 0.1 else ", not settled"
        console.say(
            f"loss {told['loss']:.4g} in its own unit (best constant answer "
            f"{told['constant']:.4g}), entropy {told['entropy']:.2f}{unsettled}, "
            f"{told['labelled']:.0%} of the images labelled",
            name,
        )
        if (share := told["inside"]) is not None and share < FEW_INSIDE:
            console.say(
                f"{share:.1%} of what {name}'s distribution proposes is inside its budget: of the "
                "networks judged, others are drawn at random",
                "note",
            )
        if told["collapsed"]:
            console.say(f"{name} learned nothing in the search: its choice means nothing", "note")
    for name, row in content["tasks"].items():
        console.say(str(folder / row["file"]["path"]), name)
