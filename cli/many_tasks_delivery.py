"""The last stage of a search for several tasks: each part (a task's network, or one that answers
all) trained on, exported, run, timed and judged, in the part's folder."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from cli import bundling, console, properties, several
from cli import many_tasks_stages as stages
from cli.deliver import ATTEMPTS, MARGIN
from cli.many_tasks_stages import BUNDLE, OWN_STATE, PICK, RESULT, WEIGHTS, Job, Part
from deploy import onnx, verify
from hw_profiles import measure, op
from hw_profiles.latency import LatencyTable
from nas import checkpoint, file, multitask
from nas import run as runs
from nas.data import module
from nas.errors import BudgetMissed
from nas.multitask import MultiTask
from nas.multitask_outcome import Finalist, child
from nas.multitask_search import Search, Shared
from nas.multitask_training import train
from nas.outputs import ONLY
from nas.space import arch_to_dict

MODEL = f"{BUNDLE}/{bundling.FLOAT}"


def delivered(
    job: Job,
    table: LatencyTable,
    search: Search,
    shared: Shared,
    finalists: list[Finalist],
    part: Part,
) -> dict[str, Any]:
    """The part's network trained on, exported, run and judged; test images are read here, once.
    Returns a row per task."""
    own = job.own(part)
    own.path(BUNDLE).mkdir(parents=True, exist_ok=True)
    asked = job.spec.model_dump(exclude={"train_on"})
    key = runs.digest([search.fingerprint, asked, verify.environment()])

    def work() -> None:
        finalist = _pick(job, search, shared, finalists, part, key)
        genes = np.array(finalist.genes)
        net, task = child(shared, search, part.tasks, genes), job.task.only(part.tasks)
        if job.trainer is not None:
            blind = replace(task, test=task.val)  # the test images choose nothing, there either
            module.call(job.trainer, "--trainer", net=net.train(), task=blind)
            net.eval()
        elif job.spec.finetune:
            steps = train(net, task, job.own_schedule, resume=own.path(OWN_STATE))
            stages.follow(steps, job.own_schedule.steps, f"training {part.title} alone")
        net.cpu()  # where the file is compared with it
        said = several.describe(job.spec, task, job.space, finalist.genes)
        checkpoint.write_described(own.path(WEIGHTS), net, said)
        rows = _rows(job, table, net, finalist, part)
        own.write_json(RESULT, rows)
        _seal(job, part, task, rows)

    files = [str(Path(part.folder, name)) for name in (MODEL, WEIGHTS, RESULT)]
    stages.staged(job.run, f"deliver {part.title}", key, files, work)
    for kept in (OWN_STATE, PICK):
        own.path(kept).unlink(missing_ok=True)
    found: dict[str, Any] = own.read_json(RESULT)
    return found


def _seal(job: Job, part: Part, task: MultiTask, rows: dict[str, Any]) -> None:
    """The part's bundle, for `quantize`, `build` and `verify`."""
    row = rows[part.tasks[0]]
    arch = {"space": job.spec.space, "genes": row["genes"], "arch": row["arch"]}
    budget, device = job.budget_ms(part), {"name": job.device.name}
    report = {"tasks": rows, "device": device, "budget": {"latency_ms": budget}}
    given = several.interface_of(task, job.spec.data, job.spec.size)
    sample = bundling.sample(given, task.train.images)
    contents = bundling.Contents(given, arch, report, sample, job.device, licence=job.spec.licence)
    bundling.seal(job.own(part).path(BUNDLE), contents)


def _pick(
    job: Job, search: Search, shared: Shared, finalists: list[Finalist], part: Part, key: str
) -> Finalist:
    """The best; on this machine the best whose exported file was timed inside the budget. On
    record for the stage's `key`, so that a run that goes on trains the same network on."""
    budget, own = job.budget_ms(part), job.own(part)
    if budget is None or not job.device.local:
        return finalists[0]
    kept = own.read_json(PICK) if own.path(PICK).exists() else {}
    if kept.get("key") == key:
        return next(each for each in finalists if list(each.genes) == kept["genes"])
    own.path(OWN_STATE).unlink(missing_ok=True)  # of what was picked for another key
    took = []
    for finalist in finalists[:ATTEMPTS]:
        net = child(shared, search, part.tasks, np.array(finalist.genes))
        onnx.export(net.cpu(), own.path(MODEL), input_shape=job.task.shape)
        took.append(_timed(job, own.path(MODEL)).median_ms)
        if took[-1] * MARGIN <= budget:
            own.write_json(PICK, {"genes": list(finalist.genes), "key": key})
            return finalist
    raise BudgetMissed(
        f"no file was measured inside {budget:g} ms; they took "
        f"{', '.join(map(console.format_ms, took))}",
        where=f"task '{part.title}'",
        next="Raise its budget, or leave the machine to itself.",
    )


def _timed(job: Job, path: Path) -> measure.Timing:
    plan = measure.Plan(inner=50, per_round=statistics.median, rounds=10, time_limit_s=10)
    rng = np.random.default_rng((job.spec.seed, 7))
    said = LatencyTable.load(job.run.path(stages.TABLE)).provenance
    pace = measure.Pace(float(said.get("pace_ms", math.inf)))
    return verify.latency(path, rng=rng, plan=plan, pace=pace)


def _rows(
    job: Job, table: LatencyTable, net: nn.Module, finalist: Finalist, part: Part
) -> dict[str, Any]:
    """What is known of a part's delivered file, for each of its tasks."""
    space, task = job.space.only(*part.tasks), job.task.only(part.tasks)
    path = job.own(part).path(MODEL)
    arch = space.decode(np.array(finalist.genes))
    ops = space.ops(arch)
    val = multitask.scores(task, multitask.evidence(net, task, task.val))
    described = _described(job, part, finalist, arch_to_dict(arch), val)
    onnx.export(net, path, input_shape=task.shape, metadata=described)
    parity = verify.parity(net, path, next(task.batches(task.val, 64))[0].numpy())
    timing = _timed(job, path) if job.device.local else None
    late = timing is not None and timing.median_ms > (job.budget_ms(part) or math.inf)
    common = {
        "genes": list(finalist.genes),
        "arch": arch_to_dict(arch),
        "macs": op.macs(ops),
        "params": op.params(ops),
        "predicted": asdict(table.estimate(ops, job.spec.space)),
        "measured": None if timing is None else asdict(timing),
        "missed": late,
        "inherited_val": finalist.score,
        "parity_error": parity,
        "file": {**file.record(path), "path": str(Path(part.folder, MODEL))},
    }
    test = _test(task, path)
    budgets = {"latency": job.spec.latency_ms, "macs": job.spec.macs}
    rows = {}
    for name in part.tasks:
        limit = [{"name": n, "most": m[name]} for n, m in budgets.items() if name in m]
        told = {"budget": limit[0] if limit else None, "val": val[name], "test": test[name]}
        rows[name] = {**common, **told}
    return rows


def _test(task: MultiTask, path: Path) -> dict[str, float | None]:
    """Each task's metric of the exported file on test images; None where none has its label."""
    images = torch.cat([x for x, _ in task.batches(task.test)]).numpy()
    found = verify.outputs(path, images, batch=64)
    outputs = {name: torch.from_numpy(value) for name, value in found.items()}
    given = multitask.answers(outputs.get(ONLY, outputs), task)
    scores = {goal.name: goal.score(goal.evidence(given, task.test.targets)) for goal in task.goals}
    return {name: score if math.isfinite(score) else None for name, score in scores.items()}


def _described(
    job: Job, part: Part, finalist: Finalist, arch: Mapping[str, Any], val: Mapping[str, float]
) -> dict[str, str]:
    """What the file says of itself; `val` are its tasks' metrics."""
    return properties.of(
        {
            "space": job.spec.space,
            "task": ",".join(part.tasks),
            "genes": json.dumps(finalist.genes),
            "run": job.run.folder.name,
        },
        arch=arch,
        fed=several.interface_of(job.task.only(part.tasks), job.spec.data, job.spec.size),
        validation=val,
        licence=job.spec.licence,
    )
