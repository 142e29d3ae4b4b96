"""The stages of `nasctl prune`: prune, in rounds with training between them; train on; deliver.

A stage that the manifest knows as finished for the same inputs is skipped; every stage goes on
where it was interrupted.
"""

from __future__ import annotations

import copy
import functools
import json
import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import nn

from cli import accelerator, console, measuring
from cli.subject import Subject
from compress import baselines, cost, norms, room
from compress import prune as pagcp
from compress.cost import Cost
from compress.job import Job, Pruned, Settings, Steps
from compress.objective import Objective
from compress.record import Record
from compress.units import Unit
from deploy import onnx
from deploy.bundle import Role
from hw_profiles.device import Device
from nas import checkpoint, multitask, multitask_training
from nas import run as runs
from nas.data.examples import Examples
from nas.elastic import channels_last
from nas.errors import NasctlError, UsageError
from nas.goals import Goal
from nas.multitask import MultiTask
from nas.multitask_training import Schedule
from nas.run import Run

PAGCP = "pagcp"
STEERING = 1024  # images, at most, that losses are measured on while channels go
BATCH = 128
DELIVER_S = 20.0  # seconds, about: exports, runs and judgements
MARGIN = 1.02  # aimed below a target in ms: files are timed roughly while channels go
WHOLE = "prune-whole.jsonl"
RECORD, HISTORY, PRUNED = "prune.jsonl", "history.json", "pruned.safetensors"
BETWEEN, TUNED = "round-{}.safetensors", "tuned.safetensors"
SAID = "nasctl"  # one entry: safetensors writes several in no fixed order
STATE, CANDIDATES = "finetune.safetensors", "candidates"
BUNDLE, MODEL, WEIGHTS = "bundle", "bundle/model.onnx", "model.safetensors"
WHOLE_MODEL, CHECKED = "bundle/unpruned.onnx", "unpruned.onnx"

STAGE, REPORT = "prune", "report.json"
FILES = [MODEL, WHOLE_MODEL, WEIGHTS, HISTORY, REPORT]
UNPRUNED: dict[str, Role] = {Path(WHOLE_MODEL).name: "model"}


class PruneSpec(BaseModel):
    """What a pruning is asked for. Fields are the long flags of `nasctl prune`, with their unit."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    model: str
    weights: str | None = None
    data: str | None = None
    size: int | None = Field(None, ge=8, le=1024)
    tasks: list[str] = []  # as JSON has it: a manifest is compared with this
    max_drop: dict[str, float]  # relative, of each task's metric
    quantity: str  # macs, params or latency
    target: float  # below 1: a share of the whole network's; else MACs, parameters or ms
    relative: bool
    hw: str = "cpu"
    on: str = measuring.LOCAL
    method: str = PAGCP
    rounds: int = Field(4, ge=1, le=20)
    epochs: float = Field(..., ge=0)  # of training after the last
    batch: int = Field(64, ge=2)
    lr: float = Field(0.03, gt=0)
    imitation: float = Field(0.5, ge=0, le=1)  # of the unpruned network, in the training
    divisor: int = Field(..., ge=1)
    seed: int = Field(0, ge=0)
    threads: int = Field(..., ge=1)
    train_on: str = "cpu"
    licence: str = Field("", max_length=runs.LONGEST_LICENCE)


@dataclass(frozen=True, eq=False)
class Pruning:
    """The resolved inputs of a pruning."""

    spec: PruneSpec
    run: Run
    subject: Subject
    device: Device

    @property
    def key(self) -> str:
        """What the result depends on."""
        idle = ("data", "threads", "train_on")
        asked = {k: v for k, v in runs.stated(self.spec).items() if k not in idle}
        weights = checkpoint.digest(self.subject.net)
        return runs.digest([asked, weights, self.subject.task.fingerprint])

    @cached_property
    def accelerator(self) -> torch.device:
        """Where losses are measured and networks trained; raises UsageError where it is not
        there."""
        return accelerator.named(self.spec.train_on)

    @property
    def goals(self) -> tuple[Goal, ...]:
        return self.subject.task.goals

    @cached_property
    def halves(self) -> tuple[Examples, Examples]:
        """The validation images in two: those that losses are measured on while channels go, and
        those that say what the tasks lost. Of training images the losses would not do: a network
        that knows them by heart has none to speak of, and they multiply with the first channel."""
        val = self.subject.task.val
        generator = torch.Generator().manual_seed(self.spec.seed)
        rows = torch.randperm(len(val), generator=generator)
        middle = min(len(rows) // 2, STEERING)
        return val.at(rows[:middle]), val.at(rows[middle:])

    @property
    def calibration(self) -> torch.Tensor:
        """Training images that batch norms' statistics are taken of."""
        task = self.subject.task
        generator = torch.Generator().manual_seed(self.spec.seed)
        rows = torch.randperm(len(task.train), generator=generator)[: norms.IMAGES]
        ((images, _),) = task.batches(task.train.at(rows), norms.IMAGES, self.accelerator)
        return images

    @property
    def schedule(self) -> Schedule:
        spec = self.spec
        steps = round(spec.epochs * len(self.subject.task.train) / spec.batch)
        return Schedule(
            steps=steps, batch=spec.batch, lr=spec.lr, imitation=spec.imitation, seed=spec.seed
        )

    @property
    def little(self) -> Schedule:
        """Between two rounds, which is enough to prune on: as many as there are rounds would take
        half of what the last training takes."""
        return replace(self.schedule, steps=self.schedule.steps // (2 * self.spec.rounds))


def forget(run: Run) -> None:
    """Remove what a pruning keeps in order to go on."""
    kept = [run.path(PRUNED), run.path(TUNED), run.path(STATE)]
    kept += [*run.folder.glob(BETWEEN.format("*")), *run.folder.glob(f"{Path(RECORD).stem}-*")]
    for path in kept:
        path.unlink(missing_ok=True)
    shutil.rmtree(run.path(CANDIDATES), ignore_errors=True)


def estimated(pruning: Pruning, found: Sequence[Unit]) -> dict[str, float]:
    """About how many seconds the parts take, from two steps of training and one judgement of the
    unpruned network, timed now. Of PAGCP's pruning the most that it can be: every width of every
    unit in every round, within all the bounds that it may be loosened to. Timing files for a target
    in ms is not in it, nor is a rival's pruning, which judges nothing."""
    spec, schedule = pruning.spec, pruning.schedule
    whole = pruning.subject.net.to(pruning.accelerator)
    few = replace(schedule, steps=3)
    steps = multitask_training.train(
        copy.deepcopy(whole),
        pruning.subject.task,
        few,
        teacher=whole if schedule.imitation else None,
    )
    next(steps)  # which is slower than others
    began = time.monotonic()
    next(steps), next(steps)
    step_s = (time.monotonic() - began) / 2
    if spec.method != PAGCP:
        return {"training": step_s * schedule.steps, "deliver": DELIVER_S}
    began = time.monotonic()
    norms.renew(copy.deepcopy(whole.eval()), pruning.calibration)
    multitask.evidence(whole, pruning.subject.task, pruning.halves[0], BATCH)
    judged_s = time.monotonic() - began
    widths = sum(unit.width // spec.divisor for unit in found)
    between = (spec.rounds - 1) * pruning.little.steps
    return {
        "pruning, at most": judged_s * widths * spec.rounds * (1 + room.LOOSENED),
        "training": step_s * (schedule.steps + between),
        "deliver": DELIVER_S,
    }


# ---- prune ---------------------------------------------------------------------------------------


def costs(pruning: Pruning) -> Cost:
    """What the target counts."""
    if pruning.spec.quantity == "macs":
        return cost.Macs()
    if pruning.spec.quantity == "params":
        return cost.Params()
    folder = pruning.run.path(CANDIDATES)
    folder.mkdir(exist_ok=True)

    def export(net: nn.Module) -> Path:
        path = folder / f"{cost.shape_of(net)}.onnx"
        if not path.exists():
            onnx.draft(copy.deepcopy(net).cpu(), path, pruning.subject.example.cpu())
        return path

    timer = measuring.timer(pruning.spec.on, pruning.device, pruning.spec.seed, rough=True)
    whole = pruning.subject.net

    def measure(files: Sequence[Path]) -> list[float]:
        return [timing.median_ms for timing in timer(files)]

    def unpruned() -> float:
        return measure([export(whole)])[0]

    # on record, so that a pruning that goes on has the same target
    record = Record(pruning.run.path(WHOLE), pruning.key)
    return cost.Latency(export, measure, whole, record.of("unpruned ms", unpruned))


def job(pruning: Pruning, net: nn.Module) -> Job:
    """What a method is asked for."""
    spec, counted = pruning.spec, costs(pruning)
    whole = counted.of(net, pruning.subject.example)
    target = whole * spec.target if spec.relative else spec.target
    if target >= whole:
        raise UsageError(
            f"the network has {whole:.4g} {counted.unit}, the target is {target:.4g}",
            where="--target",
            allowed="less than it has",
        )
    return Job(
        net,
        pruning.subject.example,
        [objective(goal, pruning.subject.task) for goal in pruning.goals],
        list(pruning.subject.task.batches(pruning.halves[0], BATCH, pruning.accelerator)),
        counted,
        target / MARGIN if spec.quantity == "latency" else target,
        pruning.calibration if norms.of(net) else None,
    )


def objective(goal: Goal, task: MultiTask) -> Objective:
    def loss(outputs: Any, targets: Any) -> torch.Tensor:
        return goal.loss(multitask.answers(outputs, task), targets)

    return Objective(goal.name, loss)


def settings(spec: PruneSpec, asked: Job) -> Settings:
    """PAGCP's bounds: of each task, a share of what it has to lose, by the drop that is allowed."""
    whole = asked.renewed(copy.deepcopy(asked.net))  # as it is judged
    bound = room.of(whole, asked.objectives, asked.batches, spec.max_drop)
    return Settings(bound=bound, divisor=spec.divisor, seed=spec.seed)


def check_scores(pruning: Pruning) -> dict[str, float]:
    """The unpruned network's, on the images that judge. Raises NasctlError naming the task that has
    nothing to lose."""
    task = pruning.subject.task
    net = pruning.subject.net.to(pruning.accelerator)
    seen = multitask.evidence(net, task, pruning.halves[1])
    scores = multitask.scores(task, seen)
    for name, score in scores.items():
        console.say(f"  {name} {score:.4f} on {len(pruning.halves[1])} validation images")
        if not score > 0:
            raise NasctlError(
                f"the unpruned network scores {score:g}: a share of that cannot be kept",
                where=f"task '{name}'",
                next="Are these its trained weights (--weights), and its data?",
            )
    return scores


def pruned(pruning: Pruning) -> Pruned:
    """The pruned network before its last training. Raises BudgetInfeasible where the target is
    not met within the bounds."""
    spec, run = pruning.spec, pruning.run
    whole = pruning.subject.net.to(pruning.accelerator)
    if (kept := _kept(pruning, whole)) is not None:
        return kept
    asked, record = job(pruning, whole), run.path(RECORD)
    steps: Steps
    if spec.method == PAGCP:
        recover = functools.partial(_recover, pruning)
        steps = pagcp.prune(
            asked, settings(spec, asked), record, rounds=spec.rounds, recover=recover
        )
    else:
        plain = Settings(divisor=spec.divisor, seed=spec.seed)
        known = Record(record.with_stem(f"{record.stem}-0"), asked.inputs())
        steps = baselines.load(spec.method)(asked, plain, known)
    with console.bar("pruning", 1.0) as update:
        while True:
            try:
                now = next(steps)
            except StopIteration as end:
                found: Pruned = end.value
                break
            update(now.done, now.doing)
    run.write_text(HISTORY, found.history.to_json() + "\n")
    said = {"pruning": pruning.key, "found": found.to_json()}
    checkpoint.write(run.path(PRUNED), found.net.state_dict(), {SAID: json.dumps(said)})
    return found


def _kept(pruning: Pruning, whole: nn.Module) -> Pruned | None:
    """What an earlier start has pruned; None where it did not come that far, or of other inputs."""
    path = pruning.run.path(PRUNED)
    if not path.exists():
        return None
    weights, meta = checkpoint.read(path)
    said = json.loads(meta.get(SAID, "{}"))
    if said.get("pruning") != pruning.key:
        return None
    found = Pruned.from_json(said["found"], whole, pruning.subject.example)
    checkpoint.fill(found.net, weights, path)
    return found


def _recover(pruning: Pruning, net: nn.Module, number: int) -> nn.Module:
    name = BETWEEN.format(number)
    # other images first than in the trainings before and after it
    schedule = replace(pruning.little, seed=pruning.spec.seed + number + 1)
    return trained(pruning, net, schedule, name, f"training after round {number + 1}")


def trained(
    pruning: Pruning, net: nn.Module, schedule: Schedule, name: str, doing: str
) -> nn.Module:
    """`net` after the schedule, taught by the unpruned network; kept in the run's file `name`,
    which is replaced where it is of other inputs."""
    done, state = pruning.run.path(name), pruning.run.path(STATE)
    channels_last(net)  # as training leaves it: other memory formats round otherwise
    inputs = {"pruning": pruning.key}
    if done.exists():
        tensors, said = checkpoint.read(done)
        if said == inputs:
            checkpoint.fill(net, tensors, done)
            return net.eval()
    teacher = pruning.subject.net if schedule.imitation else None
    steps = multitask_training.train(
        net, pruning.subject.task, schedule, teacher=teacher, resume=state
    )
    with console.bar(doing, max(1, schedule.steps)) as update, console.deferred_interrupt() as stop:
        for step in steps:
            update(step.step, " ".join(f"{k} {v:.3f}" for k, v in step.losses.items()))
            if stop() and step.step < schedule.steps:
                steps.close()  # which saves the state
                raise KeyboardInterrupt
    checkpoint.write(done, net.state_dict(), inputs)
    state.unlink(missing_ok=True)
    return net.eval()
