"""`nasctl train`: a supernet in a run directory, by one process or by many."""

from __future__ import annotations

import contextlib
import os
import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

import typer

from cli import console, options
from nas.errors import UsageError

if TYPE_CHECKING:
    from cli.torchrun import Group
    from cli.training import Training
    from nas.run import Spec
    from nas.supernet import Recipe
    from nas.tasks import Task


class Effort(NamedTuple):
    """How long things take where nothing was said."""

    steps: int  # of training: of the supernet, or of each network that is judged by its own
    evaluations: int  # of a search, whose spec has the same defaults
    finetune: int  # steps of the chosen network alone


EFFORT, QUICK = Effort(1500, 128, 0), Effort(300, 32, 0)
ALONE, QUICK_ALONE = Effort(100, 12, 2000), Effort(40, 6, 400)


def command(
    data: options.Data = None,
    space: options.Space = None,
    width: options.Width = None,
    size: options.Size = None,
    epochs: options.Epochs = None,
    batch: options.Batch = None,
    lr: options.Rate = None,
    floor: Annotated[
        float | None,
        typer.Option(help="Decay to this share of --lr and stay, as BigNAS. [linear to zero]"),
    ] = None,
    policy: Annotated[
        str | None, typer.Option(help="Random networks: uniform, bestup or worstup. [uniform]")
    ] = None,
    loss: Annotated[
        str | None, typer.Option(help="What they learn from: mixed, kl, alpha or labels. [mixed]")
    ] = None,
    dropout: Annotated[float | None, typer.Option(help="Of the largest's features. [0]")] = None,
    drop_connect: Annotated[float | None, typer.Option(help="Of its blocks. [0]")] = None,
    operations: Annotated[
        int | None, typer.Option(help="Random augmentations per image, beside crop and flip. [0]")
    ] = None,
    cutout: Annotated[float | None, typer.Option(help="Side of a hole, as a share. [0]")] = None,
    ema: Annotated[
        float | None, typer.Option(help="Decay of the average of weights used at the end. [none]")
    ] = None,
    accumulate: Annotated[
        int, typer.Option(min=1, help="Micro-batches per process and step, to save memory.")
    ] = 1,
    seed: options.Seed = None,
    threads: Annotated[
        int | None, typer.Option(help="Of this machine, shared by its processes. [all cores]")
    ] = None,
    train_on: options.TrainOn = None,
    spec: options.Spec = None,
    run: options.Run = None,
    quick: options.Quick = False,
    force: options.Force = False,
    dry_run: options.DryRun = False,
    json: options.Json = False,
) -> None:
    """Train a supernet, every network of which works without retraining.

    Search it with `nasctl search --supernet RUN`. The same command goes on where it was
    interrupted; under torchrun, on any number of processes.
    """
    flags = {
        "data": data,
        "space": space,
        "width": width,
        "size": size,
        "epochs": epochs,
        "batch": batch,
        "lr": lr,
        "floor": floor,
        "policy": policy,
        "loss": loss,
        "dropout": dropout,
        "drop_connect": drop_connect,
        "operations": operations,
        "cutout": cutout,
        "ema": ema,
        "seed": seed,
        "threads": threads,
        "train_on": train_on,
    }
    from cli import torchrun
    from nas import run as runs

    given = runs.given_fields(flags, spec)
    with torchrun.joined() as group:
        training = prepare(given, run, quick=quick)
        recipe = _shared(training, group, accumulate)
        if dry_run:
            outcome = plan(training, recipe, group)
        else:
            outcome = train(training, recipe, group, force=force)
        if json and group.workers.first:
            console.emit_json(outcome)


def cores() -> int:
    """How many cores this process may use: fewer than the machine has under taskset or cgroups."""
    return len(os.sched_getaffinity(0))


def prepare(given: dict[str, Any], folder: Path | None, *, quick: bool) -> Training:
    """Everything validated and loaded: names before data, data before any work."""
    from nas import run as runs

    spec, task = resolved(given, quick=quick)
    name = f"{spec.space}-{Path(spec.data).stem}-{spec.digest(*runs.TRAINING)[:8]}"
    run = runs.Run(folder or Path("runs") / name.replace(":", "-"))
    from cli.training import Training, space_for

    return Training(spec, run, task, space_for(spec, task))


def resolved(given: dict[str, Any], *, quick: bool, task: Task | None = None) -> tuple[Spec, Task]:
    """The spec with every default filled in, and the task (`task`, if it is loaded already).

    Raises UsageError naming what is wrong in what was given.
    """
    from nas import run as runs
    from nas import space as spaces

    # what depends on the data is filled in below; everything typed is validated here
    rough = runs.make_spec({"epochs": 1, "threads": cores(), **given})
    rough.recipe(rough.batch)
    if "." not in rough.space and rough.space not in spaces.names():
        spaces.load(rough.space)  # raises, before torch is imported
    from cli import accelerator
    from nas import tasks

    accelerator.named(rough.train_on)  # likewise, before data are read

    if task is None:
        console.say(rough.data, "data")
        task = tasks.load(rough.data, size=rough.size)
    spec = runs.make_spec({**_defaults(rough, len(task.train), quick=quick), **given})
    if spec.batch > len(task.train):
        what = f"{spec.batch} images per step, but {len(task.train)} training images"
        raise UsageError(what, where="--batch")
    return spec, task


def _defaults(spec: Spec, n_train: int, *, quick: bool) -> dict[str, Any]:
    """The defaults that depend on the data, the machine and --quick."""
    full, short = (ALONE, QUICK_ALONE) if spec.alone else (EFFORT, QUICK)
    effort = short if quick else full

    def epochs(steps: int) -> float:
        return float(f"{steps * spec.batch / n_train:.3g}")

    return {
        "epochs": epochs(effort.steps),
        "evaluations": effort.evaluations,
        "finetune": epochs(effort.finetune),
        "threads": cores(),
    }


def _shared(training: Training, group: Group, accumulate: int) -> Recipe:
    """The recipe, once every process is known to have the same one and the same data."""
    from importlib import metadata

    import torch

    recipe = replace(training.recipe, accumulate=accumulate)
    group.workers.shards(recipe.batch, accumulate)  # raises if there are too many
    inputs = {name: metadata.version(name) for name in ("nasctl", "torch")}
    described = {name: str(training.description[name]) for name in ("space", "width", "data")}
    group.agree({**inputs, **described, "recipe": str(recipe), "accumulate": str(accumulate)})
    torch.set_num_threads(max(1, training.spec.threads // group.on_this_machine))
    return recipe


def _say_inputs(training: Training, recipe: Recipe, group: Group) -> None:
    task, size = training.task, group.workers.size
    console.say(
        f"{len(task.train)} train, {len(task.val)} validation, {len(task.test)} test; "
        f"{task.channels} x {task.size} x {task.size}, {task.n_classes} classes"
    )
    console.say(str(training.run.folder), "run")
    console.say(f"{training.spec.space}, {training.space.count():.3g} networks", "supernet")
    shards = size * recipe.accumulate
    if shards > 1:
        console.say(
            f"{size} processes, {recipe.accumulate} micro-batches each: batch norms see "
            f"{recipe.batch / shards:.3g} of a step's {recipe.batch} images",
            "shards",
        )


def train(training: Training, recipe: Recipe, group: Group, *, force: bool) -> dict[str, Any]:
    """Train, unless the run has that supernet already. The first process reads and writes it."""
    from cli.training import STATE, SUPERNET, train_supernet
    from nas.run import TRAINING

    _say_inputs(training, recipe, group)
    run, key = training.run, training.train_key
    with contextlib.ExitStack() as held:

        def decide() -> str:
            held.enter_context(run.locked(training.spec, fields=TRAINING, force=force))
            return "done" if run.done("train", key) else "train"

        todo, began = group.follow_first(decide), time.monotonic()
        if todo == "train":
            train_supernet(training, recipe)
        if not group.workers.first:
            return {}
        if todo == "train":
            run.finish("train", key, time.monotonic() - began, [SUPERNET])
        run.path(STATE).unlink(missing_ok=True)
        seconds = run.manifest()["stages"]["train"]["seconds"]
    console.say(f"{training.supernet_path}, {console.format_seconds(seconds)} of training", "file")
    console.say(f"nasctl search --supernet {run.folder}", "next")
    return {
        "run": str(run.folder),
        "supernet": str(training.supernet_path),
        "steps": recipe.steps,
        "seconds": seconds,
        "trained_now": todo == "train",
        **training.description,
    }


def plan(training: Training, recipe: Recipe, group: Group) -> dict[str, Any]:
    """What would be done and for how long, from steps timed now on all processes."""
    from cli.training import step_seconds
    from nas.run import TRAINING

    began = time.monotonic()
    _say_inputs(training, recipe, group)
    step_s, _ = step_seconds(training, recipe)
    seconds = step_s * recipe.steps
    console.say(f"{recipe.steps} steps, {console.format_seconds(seconds)}", "in all")
    return {
        "spec": training.spec.model_dump(include=set(TRAINING)),
        "run": str(training.run.folder),
        "processes": group.workers.size,
        "accumulate": recipe.accumulate,
        "steps": recipe.steps,
        "estimated_total_seconds": round(seconds, 1),
        "estimate_took_seconds": round(time.monotonic() - began, 1),
    }
