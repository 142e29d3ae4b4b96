"""The last stage of a search for several tasks: each task's network trained alone, exported, run,
timed and judged, in a folder of the task's name."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Mapping
from dataclasses import asdict
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from cli import bundling, console
from cli import many_tasks_stages as stages
from cli.many_tasks_stages import Job
from deploy import interface, onnx, verify
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

#: in a task's folder
OWN_STATE, WEIGHTS, MODEL = "finetune.safetensors", "model.safetensors", "bundle/model.onnx"
RESULT, PICK = "result.json", "pick.json"
ATTEMPTS = 5  # files timed before a budget on this machine is given up
MARGIN = 1.02  # as in `cli.deliver`


def delivered(
    job: Job,
    table: LatencyTable,
    search: Search,
    shared: Shared,
    finalists: list[Finalist],
    name: str,
) -> dict[str, Any]:
    """The task's network trained alone, exported, run and judged; test images are read here, once.
    Its files are in the folder of the task's name."""
    own = job.own(name)
    own.path("bundle").mkdir(parents=True, exist_ok=True)
    key = runs.digest([search.fingerprint, job.spec.model_dump(), verify.environment()])

    def work() -> None:
        finalist = _pick(job, search, shared, finalists, name, key)
        net = child(shared, search, name, np.array(finalist.genes))
        task = job.task.only([name])
        if job.trainer is not None:
            module.call(job.trainer, "--trainer", net=net.train(), task=task)
            net.eval()
        elif job.spec.finetune:
            steps = train(net, task, job.own_schedule, resume=own.path(OWN_STATE))
            stages.follow(steps, job.own_schedule.steps, f"training {name} alone")
        net.cpu()  # where the file is compared with it
        checkpoint.write(own.path(WEIGHTS), net.state_dict(), {})
        row = _row(job, table, net, finalist, task)
        own.write_json(RESULT, row)
        _seal(job, name, task, row)

    files = [f"{name}/{part}" for part in (MODEL, WEIGHTS, RESULT)]
    stages.staged(job.run, f"deliver {name}", key, files, work)
    for kept in (OWN_STATE, PICK):
        own.path(kept).unlink(missing_ok=True)
    found: dict[str, Any] = own.read_json(RESULT)
    return found


def _seal(job: Job, name: str, task: MultiTask, row: dict[str, Any]) -> None:
    """The task's folder as a bundle, for `quantize`, `build` and `verify`."""
    given = interface.of_tasks(task, job.spec.data, job.spec.size)
    given = given.model_copy(update={"outputs": (ONLY,)})
    sample = bundling.sample(given, task.train.images)
    arch = {"space": job.spec.space, "genes": row["genes"], "arch": row["arch"]}
    budget, device = job.spec.latency_ms.get(name), {"name": job.device.name}
    report = {**row, "device": device, "budget": {"latency_ms": budget}}
    bundling.seal(
        job.own(name).path(bundling.FOLDER),
        bundling.Contents(given, arch, report, sample, job.device, licence=job.spec.licence),
    )


def _pick(
    job: Job, search: Search, shared: Shared, finalists: list[Finalist], name: str, key: str
) -> Finalist:
    """The best; on this machine the best whose exported file was timed inside the budget. On
    record for the stage's `key`, so that a run that goes on trains the same network on."""
    budget, own = job.spec.latency_ms.get(name), job.own(name)
    if budget is None or not job.device.local:
        return finalists[0]
    kept = own.read_json(PICK) if own.path(PICK).exists() else {}
    if kept.get("key") == key:
        return next(each for each in finalists if list(each.genes) == kept["genes"])
    own.path(OWN_STATE).unlink(missing_ok=True)  # of what was picked for another key
    took = []
    for finalist in finalists[:ATTEMPTS]:
        net = child(shared, search, name, np.array(finalist.genes))
        onnx.export(net.cpu(), own.path(MODEL), input_shape=job.task.shape)
        took.append(_timed(job, own.path(MODEL)).median_ms)
        if took[-1] * MARGIN <= budget:
            own.write_json(PICK, {"genes": list(finalist.genes), "key": key})
            return finalist
    raise BudgetMissed(
        f"no file was measured inside {budget:g} ms; they took "
        f"{', '.join(map(console.format_ms, took))}",
        where=f"task '{name}'",
        next="Raise its budget, or leave the machine to itself.",
    )


def _timed(job: Job, path: Path) -> measure.Timing:
    plan = measure.Plan(inner=50, per_round=statistics.median, rounds=10, time_limit_s=10)
    rng = np.random.default_rng((job.spec.seed, 7))
    said = LatencyTable.load(job.run.path(stages.TABLE)).provenance
    pace = measure.Pace(float(said.get("pace_ms", math.inf)))
    return verify.latency(path, rng=rng, plan=plan, pace=pace)


def _row(
    job: Job, table: LatencyTable, net: nn.Module, finalist: Finalist, task: MultiTask
) -> dict[str, Any]:
    """What is known of a task's delivered file."""
    (goal,) = task.goals
    own, path = job.space.only(goal.name), job.own(goal.name).path(MODEL)
    arch = own.decode(np.array(finalist.genes))
    ops = own.ops(arch)
    described = _described(job, goal.name, finalist, arch_to_dict(arch))
    onnx.export(net, path, input_shape=task.shape, metadata=described)
    parity = verify.parity(net, path, next(task.batches(task.val, 64))[0].numpy())
    timing = _timed(job, path) if job.device.local else None
    images = torch.cat([x for x, _ in task.batches(task.test)]).numpy()
    outputs = {goal.name: torch.from_numpy(verify.outputs(path, images, batch=64)[ONLY])}
    seen = multitask.evidence(net, task, task.val)
    budgets = {"latency": job.spec.latency_ms, "macs": job.spec.macs}
    limit = [{"name": n, "most": m[goal.name]} for n, m in budgets.items() if goal.name in m]
    late = timing is not None and timing.median_ms > job.spec.latency_ms.get(goal.name, math.inf)
    return {
        "genes": list(finalist.genes),
        "arch": arch_to_dict(arch),
        "macs": op.macs(ops),
        "params": op.params(ops),
        "budget": limit[0] if limit else None,
        "predicted": asdict(table.estimate(ops, job.spec.space)),
        "measured": None if timing is None else asdict(timing),
        "missed": late,
        "inherited_val": finalist.score,
        "val": multitask.scores(task, seen)[goal.name],
        "test": goal.score(goal.evidence(outputs, task.test.targets)),
        "parity_error": parity,
        "file": {**file.record(path), "path": f"{goal.name}/{MODEL}"},
    }


def _described(job: Job, name: str, finalist: Finalist, arch: Mapping[str, Any]) -> dict[str, str]:
    """What the file says of itself."""
    task = job.task
    return {
        "nasctl": metadata.version("nasctl"),
        "space": job.spec.space,
        "task": name,
        "genes": json.dumps(finalist.genes),
        "arch": json.dumps(arch),
        "input": f"float32 N x {' x '.join(map(str, task.shape))}, (pixel / 255 - mean) / std",
        "mean": json.dumps(list(task.moments[0])),
        "std": json.dumps(list(task.moments[1])),
        "data_sha256": task.fingerprint,
        "run": job.run.folder.name,
        **onnx.licensed(job.spec.licence),
    }
