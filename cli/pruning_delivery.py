"""The files of `nasctl prune`: the unpruned network's, before any work, and at the end the pruned
one's, both run, timed and judged."""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from dataclasses import asdict
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from cli import bundling, measuring, properties
from cli.pruning import (
    BUNDLE,
    CHECKED,
    MODEL,
    UNPRUNED,
    WEIGHTS,
    WHOLE_MODEL,
    PruneSpec,
    Pruning,
)
from compress import cost
from compress.graph import Graph
from compress.history import History
from compress.job import Pruned
from deploy import onnx, verify
from nas import checkpoint, multitask, paired
from nas.goals import Goal


def check_network(pruning: Pruning, path: Path, scores: Mapping[str, float]) -> None:
    """Write the unpruned network to `path`, before any work: raises NasctlError where it cannot be
    followed or exported, which would else be told after all of it."""
    net, shape = pruning.subject.net, pruning.subject.task.shape
    Graph(copy.deepcopy(net), pruning.subject.example)
    said = _properties(pruning, _arch(pruning), scores)
    onnx.export(net, path, input_shape=shape, metadata=said)


def delivered(pruning: Pruning, found: Pruned, net: nn.Module, seconds: float) -> dict[str, Any]:
    """Export, run and judge both networks; the content of the report. Test images are read here,
    once, for both."""
    run, task = pruning.run, pruning.subject.task
    net, whole = net.cpu(), pruning.subject.net.cpu()  # where their files are compared with them
    files = {"before": run.path(WHOLE_MODEL), "after": run.path(MODEL)}
    files["before"].parent.mkdir(exist_ok=True)
    for part in run.folder.glob(f"{CHECKED}*"):  # and its weights, where they do not fit into it
        part.replace(files["before"].parent / part.name)
    rows = [_judged(pruning, goal, net) for goal in task.goals]
    arch = _arch(pruning, found.history)
    said = _properties(pruning, arch, {row["task"]: row["val"]["after"] for row in rows})
    onnx.export(net, files["after"], input_shape=task.shape, metadata=said)
    images = next(task.batches(task.val, 64))[0].numpy()
    nets = {"before": whole, "after": net}
    parity = {name: verify.parity(each, files[name], images) for name, each in nets.items()}
    checkpoint.write(run.path(WEIGHTS), net.state_dict(), {})
    example = pruning.subject.example
    counts = {
        unit.unit: {"before": unit.of(whole, example), "after": unit.of(net, example)}
        for unit in (cost.Macs(), cost.Params())
    }
    content = {
        "nasctl": metadata.version("nasctl"),
        "spec": pruning.spec.model_dump(mode="json"),
        "origin": pruning.subject.origin,
        "device": {"name": pruning.device.name},
        "budget": _budget(pruning.spec),
        "tasks": rows,
        "counts": counts,
        "latency": _timed(pruning, files),
        "parity": parity,
        "units": [asdict(row) for row in found.rows],
        "left_alone": [asdict(left) for left in found.left_alone],
        "seconds": round(seconds, 1),
        "environment": verify.environment(),
    }
    given = pruning.subject.interface
    sample = bundling.sample(given, task.train.images)
    licence = pruning.spec.licence
    contents = bundling.Contents(
        given, arch, content, sample, pruning.device, licence=licence, also=UNPRUNED
    )
    bundling.seal(run.path(BUNDLE), contents)
    return content


def _budget(spec: PruneSpec) -> dict[str, float] | None:
    """What the file can be held to without the unpruned one."""
    absolute = spec.quantity == "latency" and not spec.relative
    return {"latency_ms": spec.target} if absolute else None


def _judged(pruning: Pruning, goal: Goal, net: nn.Module) -> dict[str, Any]:
    """A task's metric before and after, on validation and on test images."""
    task = pruning.subject.task.only([goal.name])
    row: dict[str, Any] = {"task": goal.name, "max_drop": pruning.spec.max_drop[goal.name]}
    for name, split in (("val", pruning.halves[1]), ("test", task.test)):
        before, after = (
            multitask.evidence(each, task, split)[goal.name] for each in (pruning.subject.net, net)
        )
        rng = np.random.default_rng((pruning.spec.seed, 21))
        change = paired.change(goal, [before], [after], rng=rng)
        scores = {"before": goal.score(before), "after": goal.score(after)}
        row[name] = {**scores, "change": asdict(change), "images": len(split)}
    return row


def _timed(pruning: Pruning, files: Mapping[str, Path]) -> dict[str, Any] | None:
    """Both files on the device, in turn with each other; None where it cannot be reached."""
    if pruning.device.local != (pruning.spec.on == measuring.LOCAL):
        return None
    timings = measuring.timer(pruning.spec.on, pruning.device, pruning.spec.seed)(
        list(files.values())
    )
    found = {name: asdict(timing) for name, timing in zip(files, timings, strict=True)}
    return {"device": pruning.device.name, "on": pruning.spec.on, **found}


def _arch(pruning: Pruning, history: History = History()) -> dict[str, Any]:
    """What builds a network again: the whole one, or what is left after a history."""
    pruned = {"pruned": json.loads(history.to_json())} if history.steps else {}
    return {**pruning.subject.origin, **pruned}


def _properties(
    pruning: Pruning, arch: Mapping[str, Any], validation: Mapping[str, float]
) -> dict[str, str]:
    return properties.of(
        {"model": str(pruning.subject.origin["model"]), "run": pruning.run.folder.name},
        arch=arch,
        fed=pruning.subject.interface,
        validation=validation,
        licence=pruning.spec.licence,
    )
