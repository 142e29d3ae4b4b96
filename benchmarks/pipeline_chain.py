"""What `benchmarks.pipeline` runs: the whole chain, verb by verb, and the chains that lack a stage.

  whole          search for all tasks together -> PAGCP -> INT8 -> bundle -> engines
  no search      a network at random, as slow as the one found, trained for as long as search and
                 training of that one took; then as above
  no pruning     a search for what pruning came down to, trained on for as long as pruning took;
                 then INT8
  no INT8        a search for less, and pruning, so that float takes as long as INT8 does above;
                 the whole chain itself where its speed guard kept the float file
  smaller input  every gate of the space, on fewer pixels, of the width that takes as long; INT8

Equal milliseconds are arranged before a network is trained, on graphs or files timed beside each
other; what they came to is measured at the end, all files in one session. The stages are the verbs
as they are typed; each goes on in its own folder where it was stopped, but for a pruning: how much
work it is can only be measured, from its beginning to its end.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.pipeline_stages import MODEL, WEIGHTS, Experiment, Made, Setting, told_of
from cli import bundling, judging, many_tasks_stages, several, subject
from compress.history import History
from deploy import bundle as bundles
from deploy import onnx, verify
from hw_profiles import device, latency, measure
from hw_profiles.measure import Plan
from hw_profiles.op import Op
from nas import checkpoint, file, multitask
from nas.elastic import channels_last
from nas.errors import NasctlError
from nas.multitask import MultiTask
from nas.multitask_search import EVERY, WARM, space_for
from nas.multitask_training import Schedule, train
from nas.search_spaces.fbnetv5 import Space
from nas.space import Genes

TOLERANCE = 1.02  # of milliseconds, for a width that is taken as not slower
DRAWN = 24  # networks among which an equally fast one is looked for
#: of the network on the smaller input, each about 15 % above the one before
WIDTHS = tuple(round(float(width), 3) for width in np.geomspace(0.25, 2.0, 16))
SAMPLES, FORWARD = 8, 1 / 3  # of a step of the distributions: networks, and of a step's work each
LR = 0.1  # of trainings alone: what the verbs take

# ---- networks that no search found ---------------------------------------------------------------


def work(e: Experiment, search: Path) -> int:
    """Steps that are as much work as a search and the training of what it finds: steps of the
    weights, moves of the distributions, the ranking of finalists on validation images."""
    steps = e.steps(e.setting.search)
    moves = len(range(math.ceil(WARM * steps), steps, EVERY))
    (finalists,) = json.loads((search / many_tasks_stages.FINALISTS).read_text()).values()
    passes = len(finalists) * (len(e.task.goals) + 1)  # a loss for each, and all metrics
    ranking = passes * len(e.task.val) / e.setting.batch
    forward = FORWARD * ((SAMPLES + 1) * moves + ranking)
    return round(steps + forward) + e.steps(e.setting.own)


def recovery(e: Experiment) -> float:
    """Epochs of the pruned network's training, without a teacher, that are as much work as the
    pruning. What is trained is counted: a quarter of the tuning between two rounds, then all,
    and the teacher's answers. Trials are not foreseeable: all is also measured, in CPU time
    against that of a step, and the larger of both is taken."""

    def measured() -> dict[str, Any]:
        found, run = e.folder / "whole.search", whole(e).run
        spent = e.pruning("whole", found)["cpu_seconds"]
        step = step_seconds(found, run, e.setting)
        left = 1 - e.setting.pruned / 100
        counted = 1.25 * e.setting.tuning * (1 + FORWARD / left)
        taken = spent / step / e.steps(1)
        return {"counted": counted, "measured": taken, "seconds_of_a_step": step}

    row = e.row(measured, what="work of pruning")
    return float(max(row["counted"], row["measured"]))


def trained(
    e: Experiment, name: str, task: MultiTask, space: Space, genes: Genes, steps: int
) -> Made:
    """A run with such a network, trained from scratch and sealed as a search's is."""
    run, setting = e.folder / name, e.setting
    if (run / "bundle" / bundles.MANIFEST).is_file():
        return Made(run, {})
    (run / "bundle").mkdir(parents=True, exist_ok=True)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(e.seed)
        net = channels_last(space.build(space.decode(genes)))
    schedule = Schedule(steps=steps, batch=setting.batch, lr=LR, seed=e.seed)
    for _ in train(net, task, schedule, resume=run / "training.safetensors"):
        pass
    names = [goal.name for goal in task.goals]
    size = task.shape[1]
    spec = many_tasks_stages.TasksSpec(
        data=setting.data,
        tasks=names,
        space="fbnetv5",
        width=space.scale,
        size=size,
        batch=setting.batch,
        lr=LR,
        seed=e.seed,
        epochs=1,
        finetune=0,
        threads=1,
        licence="",
    )
    said = several.describe(spec, task, space, genes.tolist())
    checkpoint.write_described(run / WEIGHTS, net, said)
    onnx.export(net, run / MODEL, input_shape=task.shape)
    verify.parity(net, run / MODEL, next(task.batches(task.val, 32))[0].numpy())
    given = several.interface_of(task, setting.data, size)
    arch, board = {"genes": genes.tolist()}, device.load("cpu")
    sample = bundling.sample(given, task.train.images)
    contents = bundling.Contents(given, arch, {}, sample, board)
    bundling.seal(run / "bundle", contents)
    return Made(run, {})


def at_random(e: Experiment, like: Path) -> dict[str, Any]:
    """Genes of that network of those drawn which is nearest in milliseconds to that of the run
    `like`, and its share of them."""
    rng = np.random.default_rng((e.seed, 71))
    rows = e.space.sample(rng, DRAWN)
    genes = np.array(json.loads((like / "bundle/arch.json").read_text())["genes"])
    graphs = [e.space.ops(e.space.decode(row)) for row in (genes, *rows)]
    found, *others = graph_ms(graphs, e.seed)
    at = min(range(DRAWN), key=lambda at: abs(others[at] / found - 1))
    return {"genes": rows[at].tolist(), "share": others[at] / found}


def on_less(e: Experiment, model: Path) -> dict[str, Any]:
    """The widest network on fewer pixels, every gate of the space, that is not slower than the
    file, and its share of the milliseconds. Raises NasctlError where the narrowest is."""
    task = multitask.load(e.setting.data, size=e.setting.small)
    spaces = [space_for(task, width) for width in WIDTHS]
    graphs = [space.ops(space.decode(space.largest)) for space in spaces]
    file_ms, *took = graph_ms([model, *graphs], e.seed)
    fits = [at for at, ms in enumerate(took) if ms <= file_ms * TOLERANCE]
    if not fits:
        raise NasctlError(
            f"takes {file_ms:.4g} ms, and the narrowest network on {e.setting.small} pixels "
            f"{took[0]:.4g}: there is no smaller input that is as fast",
            where=str(model),
        )
    return {"width": WIDTHS[fits[-1]], "share": took[fits[-1]] / file_ms}


def step_seconds(search: Path, pruning: Path, setting: Setting, steps: int = 8) -> float:
    """CPU time of a step of training the pruned network of a search, without a teacher."""
    found = subject.load(str(search), None, setting.data, None, [])
    history = json.loads((pruning / "bundle/arch.json").read_text())["pruned"]
    net = History.from_json(json.dumps(history)).replay(found.net, found.example)
    training = train(net, found.task, Schedule(steps=steps + 2, batch=setting.batch))
    next(training), next(training)  # which are slower than others
    began = time.process_time()
    for _ in range(steps):
        next(training)
    return (time.process_time() - began) / steps


def graph_ms(graphs: Sequence[Sequence[Op] | Path], seed: int) -> list[float]:
    """Op lists as networks, or files, timed in turn with each other in one process."""
    plan = Plan(rounds=12, time_limit_s=1.0 * len(graphs))
    rng = np.random.default_rng((seed, 72))
    return [t.median_ms for t in measure.fresh_session(graphs, rng=rng, plan=plan).timings]


# ---- chains --------------------------------------------------------------------------------------


def budget_ms(e: Experiment) -> float:
    """Of the whole chain's search: between the smallest and the largest network, as measured, or
    as the table has them of a device that is not this machine."""

    def work() -> dict[str, Any]:
        ends = [e.space.ops(e.space.decode(row)) for row in (e.space.smallest, e.space.largest)]
        if e.measured:
            low, high = graph_ms(ends, e.seed)
        else:
            table = latency.table(device.load(e.setting.hw))
            low, high = (table.estimate(ops, "fbnetv5").high_ms for ops in ends)
        return {"ms": low + e.setting.share * (high - low), "smallest": low, "largest": high}

    return float(e.row(work, what="budget")["ms"])


def whole(e: Experiment) -> Made:
    return e.quantized(e.pruned("whole", e.searched("whole", budget_ms(e))))


def no_search(e: Experiment) -> Made:
    like = e.searched("whole", budget_ms(e)).run
    genes = np.array(e.row(lambda: at_random(e, like), what="random")["genes"])
    found = trained(e, "random", e.task, e.space, genes, work(e, like))
    return e.quantized(e.pruned("random", found))


def no_pruning(e: Experiment) -> Made:
    """The budget is the whole chain's own, in the measure that a search holds it in: its files are
    then as far below it as the found one was."""
    timed = json.loads((whole(e).run / "report.json").read_text())["latency"]
    left = timed["after"]["median_ms"] / timed["before"]["median_ms"]
    return e.quantized(e.searched("for-less", left * budget_ms(e), more=recovery(e)))


def no_int8(e: Experiment) -> Made:
    made = whole(e)
    if (share := int8_share(made.run)) == 1:
        return made
    return e.pruned("float", e.searched("float", share * budget_ms(e)))


def smaller_input(e: Experiment) -> Made:
    plain = whole(e).run / MODEL
    width = float(e.row(lambda: on_less(e, plain), what="width on less")["width"])
    task = multitask.load(e.setting.data, size=e.setting.small)
    space = space_for(task, width)
    steps = work(e, e.searched("whole", budget_ms(e)).run) + e.steps(recovery(e))
    small = replace(e, setting=replace(e.setting, size=e.setting.small))
    return small.quantized(trained(small, "small", task, space, space.largest, steps))


CHAINS: dict[str, Callable[[Experiment], Made]] = {
    "whole": whole,
    "no search": no_search,
    "no pruning": no_pruning,
    "no INT8": no_int8,
    "smaller input": smaller_input,
}


def int8_share(run: Path) -> float:
    """Of the float file's milliseconds that the delivered file takes, as timed in turn."""
    told = told_of(run)
    taken = {row["name"]: row["timing"] for row in told["variants"]}
    choice = told["choice"]
    plain = taken["model.onnx"]
    return float(taken[choice]["median_ms"] / plain["median_ms"]) if choice and plain else 1.0


def judged(e: Experiment, run: Path) -> dict[str, Any]:
    """Metrics of the delivered file on validation and on test images, with the evidence of each
    test image, by goal."""
    with bundling.opened(run) as bundle:
        judge = judging.judge(bundling.interface_of(bundle), e.setting.data)
        runner = judging.runner(bundle.model, "onnxruntime")
        seen = judge.evidence(runner, judge.task.test)
        return {
            "file": str(bundle.model.relative_to(e.folder)),
            "sha256": file.sha256(bundle.model),
            "bytes": bundle.model.stat().st_size,
            "test": multitask.scores(judge.task, seen),
            "val": judge.scores(runner, judge.task.val),
            "evidence": {
                name: (1e4 * each.double()).round().div(1e4).tolist() for name, each in seen.items()
            },
        }
