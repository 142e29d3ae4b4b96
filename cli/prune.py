"""`nasctl prune`: fewer channels, the same tasks, by measured losses and a budget per task."""

from __future__ import annotations

import math
import re
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cli import console, options
from nas.errors import BudgetInfeasible, BudgetMissed, UsageError

if TYPE_CHECKING:
    from cli.pruning import Pruning

EPOCHS, QUICK_EPOCHS = 20.0, 4.0
DEFAULT_DROP = "2%"
_SHARE = re.compile(r"([0-9]*\.?[0-9]+)\s*%")
_TARGET_FORMS = "macs=-60%, params=-50%, latency=-50%, or what is left: macs=20MMACs, latency=3ms"


def command(
    model: Annotated[
        str, typer.Argument(help="my_pkg.my_mod:build, a run of ours or its .safetensors.")
    ],
    target: Annotated[str, typer.Option(help=f"As {_TARGET_FORMS}.")],
    weights: options.Weights = None,
    data: options.OwnData = None,
    size: options.Size = None,
    tasks: options.Tasks = None,
    max_drop: Annotated[
        str, typer.Option(help="Of each task's metric, relative: 2%, or seg=1%,edge=2%.")
    ] = DEFAULT_DROP,
    hw: Annotated[str, typer.Option(help="Device name or a .toml file.")] = "cpu",
    on: Annotated[str, typer.Option(help="local, or ssh://[user@]host[:port].")] = "local",
    method: Annotated[
        str, typer.Option(help="pagcp, or a baseline; a wrong name lists them.")
    ] = "pagcp",
    rounds: Annotated[
        int | None, typer.Option(help="Of pruning, with a little training between. [4]")
    ] = None,
    epochs: Annotated[
        float | None, typer.Option(help="Of training after the last round. [20]")
    ] = None,
    batch: Annotated[int | None, typer.Option(help="Images per step. [64]")] = None,
    lr: Annotated[float | None, typer.Option(help="Peak learning rate. [0.03]")] = None,
    imitation: Annotated[
        float | None, typer.Option(help="Share learnt from the unpruned network. [0.5]")
    ] = None,
    divisor: Annotated[
        int | None, typer.Option(help="Kept widths are multiples of it. [the device's]")
    ] = None,
    seed: options.Seed = None,
    threads: Annotated[int | None, typer.Option(help="Of the processor. [all cores]")] = None,
    train_on: options.TrainOn = None,
    licence: options.Licence = None,
    run: options.Run = None,
    quick: Annotated[bool, typer.Option("--quick", help="4 epochs: a try-out.")] = False,
    force: options.Force = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Say what can be pruned, how long it takes, and stop.")
    ] = False,
    json: options.Json = False,
) -> None:
    """Prune a trained network, of one task or of several, down to a target.

    Every task keeps its own bound. Ends in an ONNX file and the history that rebuilds the network;
    the same command goes on where it was interrupted.
    """
    flags = {
        "model": model,
        "weights": weights and str(weights),
        "data": data,
        "size": size,
        "hw": hw,
        "on": on,
        "method": method,
        "rounds": rounds,
        "epochs": epochs if epochs is not None else QUICK_EPOCHS if quick else EPOCHS,
        "batch": batch,
        "lr": lr,
        "imitation": imitation,
        "divisor": divisor,
        "seed": seed,
        "threads": threads,
        "train_on": train_on,
        "licence": options.parse_licence(licence) or None,
        **parse_target(target),
    }
    given = {name: value for name, value in flags.items() if value is not None}
    pruning = prepare(given, tasks, max_drop, run)
    content = plan(pruning) if dry_run else execute(pruning, force=force)
    if json:
        console.emit_json(content)
    if dry_run:
        return
    if not json:
        say_outcome(content, pruning.run.folder)
    _require_bounds(pruning, content)


# ---- what was typed ------------------------------------------------------------------------------


def parse_target(text: str) -> dict[str, Any]:
    """'macs=-60%' and the like as fields of the spec."""
    from cli import budgets

    quantity, _, value = (part.strip() for part in text.partition("="))
    if quantity not in ("macs", "params", "latency") or not value:
        raise UsageError(f"'{text}'", where="--target", allowed=_TARGET_FORMS)
    if value.startswith("-"):
        share = _share(value[1:], "--target")
        if not 0 < share < 1:
            what = f"'{text}' leaves {'nothing' if share else 'everything'}"
            raise UsageError(what, where="--target", allowed=_TARGET_FORMS)
        return {"quantity": quantity, "target": 1 - share, "relative": True}
    if quantity == "latency":
        left = console.parse_latency(value, "--target")
    else:
        counted = budgets.MACS if quantity == "macs" else budgets.PARAMS
        left = budgets.parse(value, counted, "--target")
    return {"quantity": quantity, "target": left, "relative": False}


def parse_drops(text: str, names: list[str]) -> dict[str, float]:
    """'2%' for all tasks or 'seg=1%,edge=2%' for each of them, as shares."""
    if "=" not in text:
        return dict.fromkeys(names, _drop(text, "--max-drop"))
    found: dict[str, float] = {}
    for part in text.split(","):
        name, _, value = (piece.strip() for piece in part.partition("="))
        if name not in names:
            from nas.errors import unknown

            raise unknown("task", name, names, where="--max-drop")
        if name in found:
            raise UsageError(f"names {name} twice", where="--max-drop")
        found[name] = _drop(value, f"--max-drop {name}")
    if missing := [name for name in names if name not in found]:
        said = ",".join(f"{name}={DEFAULT_DROP}" for name in names)
        raise UsageError(
            f"says nothing of {', '.join(missing)}",
            where="--max-drop",
            next=f"Name every task ({said}), or give one share for all.",
        )
    return found


def _drop(text: str, where: str) -> float:
    share = _share(text, where)
    if not 0 < share < 1:
        leaves = "everything may go" if share else "nothing may change"
        raise UsageError(
            f"with a bound of {text.strip()} {leaves}",
            where=where,
            allowed="a share above zero and below 100 %, as 2%",
        )
    return share


def _share(text: str, where: str) -> float:
    match = _SHARE.fullmatch(text.strip())
    if match is None:
        raise UsageError(f"'{text}'", where=where, allowed="a share, as 2%")
    return float(match[1]) / 100


def prepare(
    given: dict[str, Any], tasks: str | None, max_drop: str, folder: Path | None
) -> Pruning:
    """Everything validated and loaded: names before data, data before any work."""
    from cli.measuring import here_or_there
    from cli.pruning import PruneSpec, Pruning
    from compress import baselines
    from hw_profiles import alignment, device
    from nas.errors import unknown
    from nas.run import validated

    board = device.load(given["hw"])
    if given["quantity"] == "latency" or given["on"] != "local":
        here_or_there(board, given["on"])
    methods = ["pagcp", *baselines.names()]
    if given["method"] not in methods:
        raise unknown("pruning method", given["method"], methods, where="--method")
    if given["method"] != "pagcp" and given.get("rounds", 1) > 1:
        raise UsageError(
            f"{given['method']} prunes in one round", where="--rounds", next="Leave it out."
        )
    # what depends on the data is filled in below; everything typed is validated here
    rough = validated(PruneSpec, {"max_drop": {}, "divisor": 8, "threads": 1, **given})
    import torch

    from cli import accelerator, subject
    from cli.train import cores
    from nas.run import Run, digest, stated

    accelerator.named(rough.train_on)  # raises, before data are read
    wanted = [name.strip() for name in tasks.split(",")] if tasks else []
    weights = Path(rough.weights) if rough.weights else None
    found = subject.load(rough.model, weights, rough.data, rough.size, wanted)
    names = [goal.name for goal in found.task.goals]
    defaults = {"divisor": alignment.tile(board)[0], "threads": cores(), "tasks": names}
    defaults["licence"] = found.licence  # a pruned network's weights are still those of the whole
    spec = validated(PruneSpec, {**defaults, **given, "max_drop": parse_drops(max_drop, names)})
    torch.set_num_threads(spec.threads)
    name = f"prune-{Path(rough.model.split(':')[-1]).stem}-{digest(stated(spec))[:8]}"
    return Pruning(spec, Run(folder or Path("runs") / name), found, board)


# ---- what is done --------------------------------------------------------------------------------


def plan(pruning: Pruning) -> dict[str, Any]:
    """What can be pruned and what not, and about how long it takes, without doing it."""
    import tempfile
    from dataclasses import asdict

    from cli import pruning as stages
    from cli import pruning_delivery as delivery
    from compress import units

    _say_inputs(pruning)
    with tempfile.TemporaryDirectory() as folder:
        delivery.check_network(pruning, Path(folder) / "unpruned.onnx", {})
    found = units.find(pruning.subject.net, pruning.subject.example)
    for unit in found.units:
        console.say(f"  {unit.root}: {unit.width} channels, with {len(unit.members) - 1} others")
    for left in found.left_alone:
        console.say(f"  {left.root} is left alone: {left.reason}")
    parts = stages.estimated(pruning, found.units)
    for name, seconds in parts.items():
        console.say(console.format_seconds(seconds), name)
    return {
        "spec": pruning.spec.model_dump(mode="json"),
        "units": [asdict(unit) for unit in found.units],
        "left_alone": [asdict(left) for left in found.left_alone],
        "estimated_seconds": {name: float(f"{seconds:.2g}") for name, seconds in parts.items()},
    }


def execute(pruning: Pruning, *, force: bool) -> dict[str, Any]:
    """Prune, train on, deliver; what is finished already is not repeated."""
    from cli import pruning as stages
    from cli import pruning_delivery as delivery

    run = pruning.run
    with run.locked(pruning.spec, force=force):
        if force:
            stages.forget(run)
        _say_inputs(pruning)
        if run.done(stages.STAGE, pruning.key):
            content: dict[str, Any] = run.read_json(stages.REPORT)
        else:
            began = time.monotonic()
            delivery.check_network(pruning, run.path(stages.CHECKED), stages.check_scores(pruning))
            found = stages.pruned(pruning)
            doing = "training what is left"
            net = stages.trained(pruning, found.net, pruning.schedule, stages.TUNED, doing)
            content = delivery.delivered(pruning, found, net, time.monotonic() - began)
            run.write_json(stages.REPORT, content)
            run.finish(stages.STAGE, pruning.key, content["seconds"], stages.FILES)
            stages.forget(run)
    return content


def _say_inputs(pruning: Pruning) -> None:
    task, spec = pruning.subject.task, pruning.spec
    console.say(
        f"{len(task.train)} train, {len(task.val)} validation, {len(task.test)} test images of "
        f"{' x '.join(map(str, task.shape))}; tasks {', '.join(spec.max_drop)}",
        "data",
    )
    console.say(str(pruning.run.folder), "run")


def say_outcome(content: dict[str, Any], folder: Path) -> None:
    """The report of a pruning, for people."""
    from rich.table import Table

    table = Table("", "before", "after", "change")
    for unit, label in (("MACs", "MMACs"), ("params", "k parameters")):
        counted, scale = content["counts"][unit], 1e6 if unit == "MACs" else 1e3
        _row(table, label, counted["before"] / scale, counted["after"] / scale)
    if (timed := content["latency"]) is not None:
        before, after = (timed[name]["median_ms"] for name in ("before", "after"))
        _row(table, f"ms on {timed['device']}, measured", before, after)
    for row in content["tasks"]:
        test = row["test"]
        low, high = (100 * test["change"][side] for side in ("low", "high"))
        change = f"{100 * test['change']['value']:+.1f} % ({low:+.1f} to {high:+.1f})"
        label = f"{row['task']}, test"
        table.add_row(label, f"{test['before']:.4f}", f"{test['after']:.4f}", change)
    console.show(table)
    if timed is None:
        console.say(f"latency on {content['spec']['hw']}: not measured", "note")
    console.say(str(folder / "bundle/model.onnx"), "file")


def _row(table: Any, label: str, before: float, after: float) -> None:
    table.add_row(label, f"{before:.4g}", f"{after:.4g}", f"{100 * (after / before - 1):+.1f} %")


def _require_bounds(pruning: Pruning, content: dict[str, Any]) -> None:
    """The outcome on validation images, and the measured latency, have the last word; the files
    are kept either way."""
    report = str(pruning.run.path("report.json"))
    worst = max(content["tasks"], key=_spent)
    if _spent(worst) > 1:
        lost = -100 * worst["val"]["change"]["value"]
        told = f"lost {lost:.1f} %" if math.isfinite(lost) else "scores no number any more"
        raise BudgetInfeasible(
            f"{worst['task']} {told} on validation images, {100 * worst['max_drop']:.3g} % may go",
            where=report,
            next="Ask for less, permit more, or train longer (--epochs, --rounds).",
        )
    spec, timed = pruning.spec, content["latency"]
    if spec.quantity == "latency" and timed is not None:
        before, after = (timed[name]["median_ms"] for name in ("before", "after"))
        limit = before * spec.target if spec.relative else spec.target
        if after > limit:
            raise BudgetMissed(
                f"the final file took {console.format_ms(after)}, the target is "
                f"{console.format_ms(limit)}: {100 * (after / limit - 1):.2g} % over",
                where=report,
                next="Ask for a little less.",
            )


def _spent(row: dict[str, Any]) -> float:
    """The share of its bound that a task has used up; infinite for what is not a number."""
    spent: float = -row["val"]["change"]["value"] / row["max_drop"]
    return spent if math.isfinite(spent) else math.inf
