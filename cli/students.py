"""Students of a distillation: chosen, extracted, fine-tuned, written, timed, under budgets too."""

from __future__ import annotations

import glob
import tempfile
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cli import console, measuring
from cli.distilling import (
    CHOSEN,
    REPORT,
    SEARCHED,
    STAGE,
    STUDENTS,
    TEACHER,
    TUNING,
    Distilling,
    DistilSpec,
    Task,
    described,
    supernet,
)
from compress import finetune, members, teacher
from compress.adamw import Plan
from compress.finetune import Finetuning
from compress.members import Member
from deploy import onnx as drafts
from deploy import text as files_of
from hw_profiles import device, op
from nas import checkpoint, file, pareto
from nas import run as runs
from nas.elastic import extract
from nas.errors import NasctlError, UsageError
from nas.run import Run
from nas.search_spaces.bert import Arch, Bert
from nas.space import arch_to_dict

MOST_TIMED = 24


@dataclass(frozen=True)
class Student:
    """A member that is delivered."""

    name: str  # of its files
    space: str
    member: Member
    arch: Arch


def knee(distilling: Distilling, name: str, listed: Sequence[Member]) -> Student:
    """The member where more multiply-adds begin to buy little."""
    points = np.array([[m.macs, m.loss] for m in listed], float)
    member = listed[pareto.knee(points)]
    return Student(name, name, member, distilling.spaces[name].decode(np.array(member.genes)))


def delivered(distilling: Distilling, students: Sequence[Student]) -> dict[str, Any]:
    """Extract the students, fine-tune them if there is a task, write their files, time them."""
    folder = distilling.run.path(STUDENTS)
    folder.mkdir(exist_ok=True)
    task = distilling.task
    teacher = distilling.teacher.net.cpu()
    nets: dict[str, Bert] = {TEACHER: teacher}
    for student in students:
        space = distilling.spaces[student.space]
        nets[student.name] = extract(
            supernet(distilling, student.space), space.build(student.arch)
        ).eval()
    accuracies = {name: _tuned(distilling, name, nets, task) for name in nets}
    for student in students:
        path = folder / f"{student.name}.safetensors"
        checkpoint.write(path, nets[student.name].state_dict(), {})
    written = _files(distilling, nets) if task else {}
    latencies = _latencies(distilling, nets)
    known = {student.name: student.member.loss for student in students}
    rows = [
        {
            "name": name,
            "arch": arch_to_dict(net.arch),
            "loss": known.get(name),
            "macs": op.macs(_costs(distilling, net.arch)),
            "params": sum(parameter.numel() for parameter in net.parameters()),
            "latency_ms": latencies.get(name),
            "accuracy": accuracies[name],
            "files": written.get(name, {}),
        }
        for name, net in nets.items()
    ]
    return {**described(distilling), "students": rows, "notes": _notes(distilling, task)}


def files(content: dict[str, Any]) -> list[str]:
    """Of a report: what the run's manifest watches."""
    names = [
        f"{STUDENTS}/{r['name']}.safetensors" for r in content["students"] if r["loss"] is not None
    ]
    return [REPORT, *names]


def _notes(distilling: Distilling, task: Task | None) -> list[str]:
    notes = []
    if not distilling.device.local:
        notes.append(f"latency on {distilling.device.name}: not measured, multiply-adds only")
    if task is None:
        notes.append("no --finetune: there are weights of encoders, no ONNX file")
    return notes


def _costs(distilling: Distilling, arch: Arch) -> list[op.Op]:
    return next(iter(distilling.spaces.values())).ops(arch)


def _tuned(
    distilling: Distilling,
    name: str,
    nets: dict[str, Bert],
    task: Task | None,
) -> float | None:
    """Fine-tune `nets[name]` (replaced); its accuracy on the test sentences."""
    if task is None:
        return None
    train, test, classes = task
    spec = distilling.spec
    batch = min(32, len(train.labels))
    steps = max(1, round(spec.tuning_epochs * len(train.labels) / batch))
    how = Finetuning(Plan(steps, spec.tuning_lr), batch, seed=spec.seed)
    net = finetune.with_classes(nets[name], classes, spec.seed).to(distilling.accelerator)
    # of this student only: another budget's may have been stopped under the same name
    inputs = runs.digest([checkpoint.digest(net), train.digest, str(how)])
    state = distilling.run.path(f"{name}.{inputs[:12]}{TUNING}")
    going = finetune.finetune(net, train, how, resume=state)
    with closing(going), console.bar(f"fine-tuning {name}", steps) as update:
        for step in going:
            update(step.step, f"loss {step.losses[0]:.3f}")
    for done in distilling.run.folder.glob(f"{glob.escape(name)}.*{TUNING}"):
        done.unlink()
    right: Tensor = finetune.predictions(net, test.tokens) == test.labels
    nets[name] = net.cpu()  # where its file is compared with it
    return float(right.float().mean())


def _files(distilling: Distilling, nets: dict[str, Bert]) -> dict[str, dict[str, Any]]:
    """ONNX files of fine-tuned networks, checked, and in 8 bits."""
    found = {}
    for name, net in nets.items():
        plain, small = (
            distilling.run.path(f"{STUDENTS}/{name}{kind}") for kind in (".onnx", ".int8.onnx")
        )
        files_of.export(net, plain)
        generator = torch.Generator().manual_seed(0)
        shape = (3, distilling.spec.sequence)
        tokens = torch.randint(1, net.frame.vocabulary, shape, generator=generator)
        difference = files_of.parity(plain, net, tokens)
        files_of.quantized(plain, small)
        found[name] = {
            "onnx": file.record(plain),
            "int8": file.record(small),
            "differs_by": difference,
        }
    return found


def _latencies(distilling: Distilling, nets: dict[str, Bert]) -> dict[str, float]:
    """Median milliseconds of one text of the run's length, in turn; nothing for other machines."""
    if not distilling.device.local:
        return {}
    timer = measuring.timer(measuring.LOCAL, distilling.device, distilling.spec.seed)
    example = torch.ones(1, distilling.spec.sequence, dtype=torch.int64)
    with tempfile.TemporaryDirectory() as folder:
        paths = [Path(folder) / f"{name}.onnx" for name in nets]
        for path, net in zip(paths, nets.values(), strict=True):
            drafts.draft(net, path, example)
        timings = timer(paths)
    return {name: timing.median_ms for name, timing in zip(nets, timings, strict=True)}


# ---- search --------------------------------------------------------------------------------------


def search(given: dict[str, Any]) -> dict[str, Any]:
    """`nasctl search --space bert`: of a finished distillation the student of the lowest relation
    loss inside the budgets, delivered into its run. Nothing is trained but the task's head and
    weights, if the distillation had a task."""
    known = {"space", "supernet", "hw", "macs", "params", "latency_ms"}
    if more := sorted(set(given) - known):
        flag = "--" + more[0].removesuffix("_bytes").replace("_", "-")
        raise UsageError("means nothing for --space bert", where=flag, allowed=_FLAGS)
    if "supernet" not in given:
        raise UsageError(
            "the space bert is searched in a finished distillation",
            where="--supernet",
            next="Make one: nasctl distill --teacher DIR --text FILE.",
        )
    distilling = _opened(Path(given["supernet"]), given.get("hw"))
    if not distilling.run.done(STAGE, distilling.key):
        raise NasctlError("no finished distillation", where=f"--supernet {given['supernet']}")
    with distilling.run.locked():
        student = _within(distilling, given)
        content = delivered(distilling, [student])
        distilling.run.write_json(SEARCHED, content)
    return content


_FLAGS = "--supernet, --hw, --macs, --params, --latency"


def _opened(folder: Path, hw: str | None) -> Distilling:
    run = Run(folder)
    said = run.manifest().get("spec", {})
    if "subspaces" not in said:
        raise NasctlError("no distillation", where=f"--supernet {folder}")
    spec = DistilSpec(**{**said, "train_on": "cpu"})  # which was there, not here
    return Distilling(spec, run, teacher.load(spec.teacher), device.load(hw or spec.hw))


def _within(distilling: Distilling, given: dict[str, Any]) -> Student:
    """The best of all sub-spaces inside every budget; without one, the knee of their front."""
    students = _listed(distilling)
    for field, quantity in (("macs", "multiply-adds"), ("params", "parameters")):
        if (limit := given.get(field)) is not None:
            least = min(getattr(student.member, field) for student in students)
            students = [s for s in students if getattr(s.member, field) <= limit]
            if not students:
                raise members.infeasible(limit, least, quantity)
    listed = [student.member for student in students]
    macs = np.array([member.macs for member in listed], float)
    front = members.front(listed, macs)
    if (limit := given.get("latency_ms")) is not None:
        if not distilling.device.local:
            raise UsageError(
                f"{distilling.device.name} is not this machine",
                where="--latency",
                next="Ask by --macs: students are timed here only.",
            )
        places = np.linspace(0, len(front) - 1, min(len(front), MOST_TIMED)).round().astype(int)
        timed = [students[front[place]] for place in places]
        frame = distilling.teacher.net.frame
        nets = {student.name: Bert(student.arch, frame, 2) for student in timed}
        ms = np.array(list(_latencies(distilling, nets).values()))
        found = timed[members.best_within([s.member for s in timed], ms, limit)]
    elif any(field in given for field in ("macs", "params")):
        found = students[members.best_within(listed, macs, np.inf)]
    else:
        found = students[pareto.knee(np.column_stack([macs, [m.loss for m in listed]]))]
    return Student(CHOSEN, found.space, found.member, found.arch)


def _listed(distilling: Distilling) -> list[Student]:
    """Every ranked member of every sub-space."""
    found: list[Student] = []
    for name, space in distilling.spaces.items():
        path = distilling.run.path(f"{name}.members.jsonl")
        for member in members.read(space, path):
            arch = space.decode(np.array(member.genes))
            found.append(Student(f"{name}-{len(found)}", name, member, arch))
    return found
