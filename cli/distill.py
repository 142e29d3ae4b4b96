"""`nasctl distill`: a family of students of a transformer, ranked without training each."""

from __future__ import annotations

import contextlib
import json as jsons  # `json` is a flag
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cli import console, options
from nas.errors import UsageError

if TYPE_CHECKING:
    from cli.distilling import Distilling
    from cli.torchrun import Group


def command(
    teacher: Annotated[str, typer.Option(help="Folder of a BERT, or its name in the hub cache.")],
    text: Annotated[str, typer.Option(help="Plain UTF-8 text: a file, or several: a,b.")],
    subspaces: Annotated[
        str, typer.Option(help="Of tiny, small, base; or a .toml of your own.")
    ] = "tiny,small",
    hw: Annotated[str, typer.Option(help="Device name or a .toml file.")] = "cpu",
    sequence: Annotated[int | None, typer.Option(help="Tokens per sequence. [128]")] = None,
    epochs: Annotated[float | None, typer.Option(help="Passes over the text. [1]")] = None,
    batch: Annotated[int | None, typer.Option(help="Sequences per step. [64]")] = None,
    lr: Annotated[float | None, typer.Option(help="Peak learning rate. [0.001]")] = None,
    loss: Annotated[str | None, typer.Option(help="kl, mse or scores. [kl]")] = None,
    relation_heads: Annotated[int | None, typer.Option(help="[the teacher's heads]")] = None,
    bf16: Annotated[bool, typer.Option("--bf16", help="Forward passes in bfloat16.")] = False,
    finetune: Annotated[
        Path | None, typer.Option(help="Sentences and labels (tsv, csv, parquet) of a task.")
    ] = None,
    test: Annotated[Path | None, typer.Option(help="Likewise, to judge on.")] = None,
    tuning_epochs: Annotated[float | None, typer.Option(help="Of fine-tuning. [3]")] = None,
    tuning_lr: Annotated[float | None, typer.Option(help="Of fine-tuning. [0.0002]")] = None,
    seed: options.Seed = None,
    threads: Annotated[int | None, typer.Option(help="Of the processor. [all cores]")] = None,
    train_on: options.TrainOn = None,
    run: options.Run = None,
    force: options.Force = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Say what would be done and for how long, and stop.")
    ] = False,
    json: options.Json = False,
) -> None:
    """Distil a transformer into sub-spaces of students, rank every student, deliver the best.

    No student is trained by itself; pick others by `nasctl search --space bert --supernet RUN`. The
    same command goes on where it was interrupted; under torchrun, on any number of processes.
    """
    flags = {
        "teacher": teacher,
        "text": text.split(","),
        "subspaces": subspaces.split(","),
        "hw": hw,
        "sequence": sequence,
        "epochs": epochs,
        "batch": batch,
        "lr": lr,
        "loss": loss,
        "relation_heads": relation_heads,
        "bf16": bf16,
        "finetune": finetune and str(finetune),
        "test": test and str(test),
        "tuning_epochs": tuning_epochs,
        "tuning_lr": tuning_lr,
        "seed": seed,
        "threads": threads,
        "train_on": train_on,
    }
    if (finetune is None) != (test is None):
        raise UsageError("one without the other", where="--finetune, --test")
    given = {name: value for name, value in flags.items() if value is not None}
    from cli import torchrun

    with torchrun.joined() as group:
        distilling = prepare(given, run)
        _agree(distilling, group)
        content = plan(distilling) if dry_run else execute(distilling, group, force=force)
        if not group.workers.first:
            return
        if json:
            console.emit_json(content)
        elif not dry_run:
            say_outcome(content, distilling.run.folder)


def prepare(given: dict[str, Any], folder: Path | None) -> Distilling:
    """Everything validated and loaded: names before data, data before any work."""
    from cli.train import cores
    from hw_profiles import device

    board = device.load(given["hw"])
    from cli.distilling import Distilling, DistilSpec
    from nas.run import Run, digest, stated, validated

    spec = validated(DistilSpec, {"threads": cores(), **given})
    import torch

    from compress import teacher

    torch.set_num_threads(spec.threads)
    found = teacher.load(spec.teacher)
    name = f"distill-{Path(spec.teacher).name}-{digest(stated(spec))[:8]}"
    distilling = Distilling(spec, Run(folder or Path("runs") / name), found, board)
    # whatever is wrong with these is known before any work
    assert distilling.spaces and distilling.lesson and distilling.key and distilling.accelerator
    _ = distilling.task
    return distilling


def plan(distilling: Distilling) -> dict[str, Any]:
    """The teacher, its sub-spaces and for how long, without doing anything but a few steps."""
    from cli import distill_plan
    from cli.distilling import described

    content = described(distilling)
    _say_inputs(distilling)
    for name, space in content["subspaces"].items():
        low, high = (value / 1e6 for value in space["macs"])
        console.say(
            f"{space['students']} students of {low:.3g} to {high:.3g} MMACs "
            f"at {distilling.spec.sequence} tokens",
            name,
        )
    content["notes"] = distilling.notes
    for note in distilling.notes:
        console.say(note, "note")
    took = distill_plan.seconds(distilling)
    distill_plan.say(took, tuned=distilling.task is not None)
    content["estimated_seconds"] = {name: round(value, 1) for name, value in took.items()}
    content["estimated_total_seconds"] = round(sum(took.values()), 1)
    return content


def _agree(distilling: Distilling, group: Group) -> None:
    """Raises UsageError if a step has too few sequences for the processes, NasctlError where one of
    them has other inputs; shares the cores out."""
    from importlib import metadata

    import torch

    group.workers.shards(distilling.spec.batch)
    versions = {name: metadata.version(name) for name in ("nasctl", "torch")}
    asked = {"teacher": distilling.teacher.fingerprint, "text": distilling.text_key}
    group.agree({**versions, **asked, "command": distilling.key})
    torch.set_num_threads(max(1, distilling.spec.threads // group.on_this_machine))


def execute(distilling: Distilling, group: Group, *, force: bool) -> dict[str, Any]:
    """Pack, distil, rank, deliver; what is finished already is not repeated. All processes train,
    the first does everything else."""
    from cli import distilling as stages
    from cli import students as choosing
    from nas.errors import NasctlError

    run, key = distilling.run, distilling.key
    with contextlib.ExitStack() as held:

        def decide() -> str:
            held.enter_context(run.locked(distilling.spec, force=force))
            if force:
                stages.forget(distilling)
            _say_inputs(distilling)
            if run.done(stages.STAGE, key):
                return jsons.dumps({"done": True, "sequences": 0, "train": []})
            n, todo = stages.packed(distilling), stages.untrained(distilling)
            return jsons.dumps({"done": False, "sequences": n, "train": todo})

        began = time.monotonic()
        told = jsons.loads(group.follow_first(decide))
        n = told["sequences"]
        if told["train"] and not run.path(stages.TEXT).is_file():
            raise NasctlError(
                "this process does not see the run's text",
                where=str(run.path(stages.TEXT)),
                next="Put --run on a disk that all machines share.",
            )
        if n:
            console.say(f"{n} sequences of {distilling.spec.sequence} tokens", "text")
        for name in told["train"]:
            stages.trained(distilling, name, n)
        if not group.workers.first:
            return {}
        if told["done"]:
            finished: dict[str, Any] = run.read_json(stages.REPORT)
            return finished
        students = [
            choosing.knee(distilling, name, stages.ranked(distilling, name, n))
            for name in distilling.spaces
        ]
        content = choosing.delivered(distilling, students)
        run.write_json(stages.REPORT, content)
        run.finish(stages.STAGE, key, time.monotonic() - began, choosing.files(content))
    return content


def _say_inputs(distilling: Distilling) -> None:
    arch = distilling.teacher.net.arch
    console.say(
        f"{len(arch.layers)} layers, {arch.hidden} channels, {arch.heads} heads, MLP {arch.mlp}",
        "teacher",
    )
    console.say(str(distilling.run.folder), "run")


def say_outcome(content: dict[str, Any], folder: Path) -> None:
    """The students, for people."""
    from rich.table import Table

    table = Table("", "sizes", "relation loss", "MMACs", "M params", "ms", "accuracy", box=None)
    for row in content["students"]:
        arch = row["arch"]
        sizes = f"{len(arch['layers'])} x {arch['hidden']}, {arch['heads']} heads, {arch['mlp']}"
        table.add_row(
            row["name"],
            sizes,
            f"{row['loss']:.4f}" if row["loss"] is not None else "",
            f"{row['macs'] / 1e6:.3g}",
            f"{row['params'] / 1e6:.3g}",
            *_measured(row),
        )
        if row["files"]:
            table.add_row("", "in INT8", "", "", "", *_measured(row["files"]["int8"]))
    console.show(table)
    for name, front in content.get("fronts", {}).items():
        first, last = front[0], front[-1]
        console.say(
            f"{name}: {len(front)} students of {first['macs'] / 1e6:.3g} to "
            f"{last['macs'] / 1e6:.3g} MMACs, relation loss {first['loss']:.4f} to "
            f"{last['loss']:.4f}, each under `fronts` in the report",
            "front",
        )
    for line in content["notes"]:
        console.say(line, "note")
    console.say(str(folder / "students"), "files")


def _measured(of: dict[str, Any]) -> tuple[str, str]:
    """Milliseconds and accuracy of a student or of a file."""
    ms, accuracy = of["latency_ms"], of["accuracy"]
    return (
        f"{ms:.3g}" if ms else "not measured",
        f"{accuracy:.2%}" if accuracy is not None else "no task",
    )
