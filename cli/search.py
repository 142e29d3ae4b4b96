"""`nasctl search`: from task, board and budget to a trained, verified ONNX file."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cli import budgets, console, options
from cli.train import resolved
from nas.errors import NasctlError, UsageError

if TYPE_CHECKING:
    from cli.judges import Judge
    from cli.stages import Job
    from hw_profiles.device import Device
    from nas.run import Run, Spec
    from nas.search import Candidate
    from nas.tasks import Task


def command(
    data: options.Data = None,
    hw: Annotated[
        str | None,
        typer.Option(help="Device (see `nasctl devices`), .toml file, or several: a,b. [cpu]"),
    ] = None,
    latency: Annotated[
        str | None,
        typer.Option(
            help="Budget, as 5ms (per device: 5ms,2ms; per task: class=5ms); none: the knee."
        ),
    ] = None,
    macs: Annotated[str | None, typer.Option(help="Budget, as 200MMACs.")] = None,
    params: Annotated[str | None, typer.Option(help="Budget, as 2Mparams.")] = None,
    memory: Annotated[
        str | None, typer.Option(help="Budget of activations at their peak, as 8MB.")
    ] = None,
    space: options.Space = None,
    tasks: Annotated[
        str | None,
        typer.Option(help="One network for each, as class,box (--space fbnetv5)."),
    ] = None,
    together: Annotated[
        bool, typer.Option("--together", help="One network for all --tasks, with their heads.")
    ] = False,
    trainer: Annotated[
        str | None,
        typer.Option(help="Trains each task's network: my_pkg.my_mod:train, of (net, task)."),
    ] = None,
    width: options.Width = None,
    size: options.Size = None,
    epochs: options.Epochs = None,
    batch: options.Batch = None,
    lr: options.Rate = None,
    evaluations: Annotated[int | None, typer.Option(help="Networks to evaluate. [128]")] = None,
    energy: Annotated[
        str | None, typer.Option(help="Budget per call, as 40mJ; where energies were measured.")
    ] = None,
    strategy: Annotated[
        str | None,
        typer.Option(
            help="robot, predictor, coarse-to-fine, evolution, nsga2 or random; gumbel, proxyless "
            "or reinforce train the weights too. [robot; of a supernet: predictor]"
        ),
    ] = None,
    finetune: Annotated[
        float | None, typer.Option(help="Epochs of training the chosen network alone. [0]")
    ] = None,
    seed: options.Seed = None,
    threads: Annotated[int | None, typer.Option(help="For training. [all cores]")] = None,
    train_on: options.TrainOn = None,
    supernet: Annotated[str | None, typer.Option(help="Search a finished run's supernet.")] = None,
    alone: Annotated[
        bool | None,
        typer.Option(
            "--alone/--no-alone",
            help="Judge each network by its own training, --epochs long, instead of a supernet.",
        ),
    ] = None,
    storage: Annotated[str | None, typer.Option(help="Optuna storage URL to share.")] = None,
    study_name: Annotated[str | None, typer.Option(help="In that storage. [nasctl]")] = None,
    licence: options.Licence = None,
    spec: options.Spec = None,
    run: options.Run = None,
    quick: options.Quick = False,
    force: options.Force = False,
    dry_run: options.DryRun = False,
    json: options.Json = False,
) -> None:
    """Search a network for a task and a board within a latency budget, and verify the file.

    The same command goes on where it was interrupted.
    """
    flags = {
        "data": data,
        "hw": hw,
        "space": space,
        "width": width,
        "size": size,
        "epochs": epochs,
        "batch": batch,
        "lr": lr,
        "evaluations": evaluations,
        "strategy": strategy,
        "params": budgets.parse(params, budgets.PARAMS, "--params"),
        "memory_bytes": budgets.parse(memory, budgets.MEMORY, "--memory"),
        "energy_mj": budgets.parse(energy, budgets.ENERGY, "--energy"),
        "finetune": finetune,
        "seed": seed,
        "threads": threads,
        "train_on": train_on,
        "supernet": supernet,
        "alone": alone,
        "storage": storage,
        "study_name": study_name,
        "licence": options.parse_licence(licence) or None,
    }
    from nas import run as runs

    several = {"tasks": tasks, "trainer": trainer, "together": together or None}
    given = runs.given_fields({**flags, **several}, spec)
    if "tasks" in given:
        from cli import many_tasks

        all_of = many_tasks.prepare(given, {"latency": latency, "macs": macs}, run, quick=quick)
        if dry_run:
            report = many_tasks.plan(all_of)
        else:
            report = many_tasks.search(all_of, force=force, quiet=json)
        return console.emit_json(report) if json else None
    for name in ("trainer", "together"):
        if given.get(name):
            raise UsageError(
                "is of searches for several tasks", where=f"--{name}", next="Name them: --tasks."
            )
    if macs is not None:
        given["macs"] = budgets.parse(macs, budgets.MACS, "--macs")
    latencies = [console.parse_latency(text) for text in latency.split(",")] if latency else []
    names = str(given.get("hw", "cpu")).split(",")
    if given.get("space") == "bert":
        _refuse({"--run": run, "--quick": quick, "--force": force, "--dry-run": dry_run})
        return _student(given, latencies, json=json)
    if len(names) > 1:
        from cli import boards

        jobs = boards.prepare(given, names, latencies, run, quick=quick)
        report = boards.plan(jobs) if dry_run else boards.search(jobs, force=force)
    else:
        if len(latencies) > 1:
            raise UsageError(f"{len(latencies)} budgets for one device", where="--latency")
        job = prepare(
            {**given, **({"latency_ms": latencies[0]} if latencies else {})}, run, quick=quick
        )
        report = plan(job) if dry_run else locked_search(job, force=force)
    if json:
        console.emit_json(report)
    return None


def _refuse(flags: Mapping[str, object]) -> None:
    """Raises UsageError for the first that was typed: a search of students has none of these, it
    works in the folder of their distillation."""
    for flag, value in flags.items():
        if value:
            raise UsageError("means nothing for --space bert", where=flag, next="Leave it out.")


def _student(given: dict[str, Any], latencies: list[float | None], *, json: bool) -> None:
    if len(latencies) > 1:
        raise UsageError(f"{len(latencies)} budgets for one student", where="--latency")
    from cli import distill, students

    content = students.search({**given, **({"latency_ms": latencies[0]} if latencies else {})})
    if json:
        console.emit_json(content)
    else:
        distill.say_outcome(content, Path(given["supernet"]))
    students.require(content)


def prepare(
    given: dict[str, Any], folder: Path | None, *, quick: bool, task: Task | None = None
) -> Job:
    """Everything validated and loaded: names before data, data before any work."""
    from hw_profiles import device
    from nas import run as runs
    from nas import strategies

    board = device.load(str(given.get("hw", "cpu")))
    strategies.load(str(given.get("strategy", "robot")))
    given = _judged(given)
    if strategies.learns(given["strategy"]):
        from cli import learning

        learning.check(given)
    spec, task = resolved(given, quick=quick, task=task)
    name = f"{spec.space}-{Path(spec.data).stem}-{board.name}-{spec.digest()[:8]}"
    run = runs.Run(folder or Path("runs") / name.replace(":", "-"))
    return _job(spec, run, task, board)


def _judged(given: dict[str, Any]) -> dict[str, Any]:
    """Who judges, where that was not said: a supernet where there is one already, where workers are
    to share the search, or where a strategy was named that asks for many evaluations."""
    if given.get("alone") and given.get("supernet"):
        raise UsageError("networks are judged by the one or the other", where="--alone, --supernet")
    alone = given.get("alone")
    if alone is None:
        shared = given.get("supernet") or given.get("storage")
        alone = not shared and given.get("strategy", "robot") == "robot"
    return {"strategy": "robot" if alone else "predictor", **given, "alone": alone}


@contextlib.contextmanager
def resume(folder: Path, latency_ms: float | None) -> Iterator[tuple[Job, Judge, list[Candidate]]]:
    """The job of a finished run with another budget, its supernet and its evaluated networks.

    Holds the run's lock, so that no search can be writing there at the same time.
    """
    from cli.training import require_search
    from nas import run as runs

    run = runs.Run(folder)
    with run.locked():
        said = run.manifest()["spec"]
        require_search(said, folder)
        own = said.get("supernet") is None and not said.get("alone")
        for stage in ("train", "search") if own else ("search",):
            if not run.unchanged(stage):
                raise NasctlError(
                    f"stage '{stage}' is not finished, or its files were changed since",
                    where=str(folder),
                    next="Run its `nasctl search` again first.",
                )
        yield _resumed(run, latency_ms)


def _resumed(run: Run, latency_ms: float | None) -> tuple[Job, Judge, list[Candidate]]:
    from cli import judges, stages
    from hw_profiles import device
    from nas import run as runs
    from nas import study, tasks

    spec = runs.make_spec({**run.manifest()["spec"], "latency_ms": latency_ms, "train_on": "cpu"})
    task = tasks.load(spec.data, size=spec.size)
    job = _job(spec, run, task, device.load(spec.hw))
    stages.check_inputs(job)
    judge = judges.made(job)
    candidates = study.finished(run.path(stages.JOURNAL), spec.storage, spec.study_name)
    return job, judge, candidates


def _job(spec: Spec, run: Run, task: Task, board: Device) -> Job:
    import torch

    from cli.stages import Job
    from cli.training import space_for

    torch.set_num_threads(spec.threads)
    return Job(spec, run, task, space_for(spec, task), board)


def locked_search(job: Job, *, force: bool) -> dict[str, Any]:
    """The main job; returns the report's content."""
    with job.run.locked(job.spec, force=force):
        return _search(job)


def _search(job: Job) -> dict[str, Any]:
    from cli import deliver, features, judges, learning, stages, summary
    from nas import strategies

    began = time.monotonic()
    task, spec = job.task, job.spec
    console.say(
        f"{len(task.train)} train, {len(task.val)} validation, {len(task.test)} test; "
        f"{task.channels} x {task.size} x {task.size}, {task.n_classes} classes"
    )
    console.say(str(job.run.folder), "run")
    console.say(job.device.summary, "latency")
    stages.check_inputs(job)
    learns = strategies.learns(spec.strategy)
    if learns:
        learning.check_space(job)
    table = stages.latency_table(job)
    stages.make_problem(job, table, lambda genes: (0.0, 0.0))  # an impossible budget ends it here
    if learns:
        learning.learned(job, table)
    judge = judges.made(job)
    problem = features.with_features(job, stages.make_problem(job, table, judge))
    if learns:
        problem = learning.with_policy(job, problem)
    how = f", each trained alone for {spec.epochs:g} epochs" if spec.alone else ""
    console.say(
        f"{spec.strategy}, {spec.evaluations} evaluations on validation images{how}", "search"
    )
    candidates = stages.searched(job, problem, table)
    console.say("extract, export, verify", "deliver")
    report = deliver.deliver(job, table, judge, candidates)
    summary.summarise(report, job.run.folder, time.monotonic() - began)
    return report


def plan(job: Job) -> dict[str, Any]:
    """What would be done and for how long, from three steps and one evaluation timed now."""
    from cli import features

    began = time.monotonic()
    seconds_of = _alone if job.spec.alone else _with_supernet
    parts = {
        "profile": 45.0 if job.device.local else 0.0,
        "scores": features.seconds(job),
        **seconds_of(job),
        "deliver": 20.0,
    }
    planned = {
        "spec": job.spec.model_dump(),
        "run": str(job.run.folder),
        "steps": job.recipe.steps,
        "estimated_seconds": {name: round(s, 1) for name, s in parts.items()},
        "estimated_total_seconds": round(sum(parts.values()), 1),
        "estimate_took_seconds": round(time.monotonic() - began, 1),
    }
    for name, seconds in parts.items():
        console.say(console.format_seconds(seconds), name)
    total = console.format_seconds(sum(parts.values()))
    console.say(f"{total}, into {job.run.folder}", "in all")
    return planned


def _with_supernet(job: Job) -> dict[str, float]:
    """Seconds of training, searching and fine-tuning."""
    from cli import judges, learning, training
    from nas import strategies

    spec, recipe = job.spec, job.recipe
    if strategies.learns(spec.strategy):
        step_s, net = learning.step_seconds(job)
    else:
        step_s, net = training.step_seconds(job, recipe)
    judge = judges.Inherited(job, net)
    start = time.monotonic()
    judge(job.space.largest)
    judge(job.space.smallest)
    return {
        "train": 0.0 if spec.supernet else step_s * recipe.steps,
        "search": (time.monotonic() - start) / 2 * spec.evaluations,
        # the largest network's step is at most half of a sandwich step
        "finetune": step_s / 2 * spec.finetune * len(job.task.train) / spec.batch,
    }


def _alone(job: Job) -> dict[str, float]:
    """The same where every network is trained alone, if they are halfway between the ends."""
    from cli import training

    spec, ends = job.spec, (job.space.smallest, job.space.largest)
    step_s = sum(training.step_seconds(job, job.recipe, genes)[0] for genes in ends) / 2
    return {
        "search": step_s * job.recipe.steps * spec.evaluations,
        "finetune": step_s * spec.finetune * len(job.task.train) / spec.batch,
    }
