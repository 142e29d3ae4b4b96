"""Students of a distillation: chosen, extracted, fine-tuned, written, timed, under budgets too."""

from __future__ import annotations

import glob
import json
import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from cli import console, measuring, properties
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
from nas.errors import BudgetMissed, NasctlError, UsageError
from nas.run import Run
from nas.search_spaces.bert import Arch, Bert
from nas.space import arch_to_dict

MOST_TIMED = 24
KINDS = {"onnx": ".onnx", "int8": ".int8.onnx"}  # of a delivered student's files

Write = Callable[[Path], None]  # of a file to a path


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


def front(distilling: Distilling, name: str) -> list[dict[str, Any]]:
    """Of a sub-space the members that no other beats in held-out loss and multiply-adds, the
    cheapest first."""
    space = distilling.spaces[name]
    listed = members.read(space, distilling.run.path(f"{name}.members.jsonl"))
    found = [listed[at] for at in members.front(listed, np.array([m.macs for m in listed], float))]
    return [
        {**asdict(member), "arch": arch_to_dict(space.decode(np.array(member.genes)))}
        for member in found
    ]


def delivered(distilling: Distilling, students: Sequence[Student]) -> dict[str, Any]:
    """Extract the students, fine-tune them if there is a task, write their files, time and judge
    these; without a task drafts are timed, as there are no files."""
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
    if task:
        for name in nets:
            _tune(distilling, name, nets, task)
    for student in students:
        path = folder / f"{student.name}.safetensors"
        checkpoint.write(path, nets[student.name].state_dict(), {})
    written = _files(distilling, nets, task) if task else {}
    drafted = {} if task else _milliseconds(distilling, _drafts(distilling, nets))
    known = {student.name: student.member.loss for student in students}
    rows = [
        {
            "name": name,
            "arch": arch_to_dict(net.arch),
            "loss": known.get(name),
            "macs": op.macs(_costs(distilling, net.arch)),
            "params": sum(parameter.numel() for parameter in net.parameters()),
            "latency_ms": written[name]["onnx"]["latency_ms"] if task else drafted.get(name),
            "accuracy": written[name]["onnx"]["accuracy"] if task else None,
            "files": written.get(name, {}),
        }
        for name, net in nets.items()
    ]
    return {
        **described(distilling),
        "students": rows,
        "fronts": {name: front(distilling, name) for name in distilling.spaces},
        "notes": _notes(distilling, task),
    }


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
    return [*notes, *distilling.notes]


def _costs(distilling: Distilling, arch: Arch) -> list[op.Op]:
    return next(iter(distilling.spaces.values())).ops(arch)


def _tune(distilling: Distilling, name: str, nets: dict[str, Bert], task: Task) -> None:
    """Fine-tune `nets[name]`, which is replaced."""
    train, spec = task.train, distilling.spec
    batch = min(32, len(train.labels))
    steps = max(1, round(spec.tuning_epochs * len(train.labels) / batch))
    how = Finetuning(Plan(steps, spec.tuning_lr), batch, seed=spec.seed)
    net = finetune.with_classes(nets[name], task.classes, spec.seed).to(distilling.accelerator)
    # of this student only: another budget's may have been stopped under the same name
    inputs = runs.digest([checkpoint.digest(net), train.digest, str(how)])
    state = distilling.run.path(f"{name}.{inputs[:12]}{TUNING}")
    going = finetune.finetune(net, train, how, resume=state)
    with closing(going), console.bar(f"fine-tuning {name}", steps) as update:
        for step in going:
            update(step.step, f"loss {step.losses[0]:.3f}")
    for done in distilling.run.folder.glob(f"{glob.escape(name)}.*{TUNING}"):
        done.unlink()
    nets[name] = net.cpu().eval()  # where its file is compared with it


# ---- files ---------------------------------------------------------------------------------------


def _files(distilling: Distilling, nets: Mapping[str, Bert], task: Task) -> dict[str, Any]:
    """ONNX files of fine-tuned networks, checked, and in 8 bits; each judged and timed itself."""
    found: dict[str, Any] = {}
    copies: dict[str, Write] = {}
    for name, net in nets.items():
        plain, small = paths = [
            distilling.run.path(f"{STUDENTS}/{name}{ending}") for ending in KINDS.values()
        ]
        files_of.export(net, plain, metadata=_properties(distilling, net))
        generator = torch.Generator().manual_seed(0)
        shape = (3, distilling.spec.sequence)
        tokens = torch.randint(1, net.frame.vocabulary, shape, generator=generator)
        found[name] = {"differs_by": files_of.parity(plain, net, tokens)}
        files_of.quantized(plain, small)
        for kind, path in zip(KINDS, paths, strict=True):
            found[name][kind] = {**file.record(path), "accuracy": _accuracy(path, task)}
            copies[path.name] = partial(files_of.of_length, path, distilling.spec.sequence)
    took = _milliseconds(distilling, copies, as_written=True)
    for kinds in found.values():
        for kind in KINDS:
            kinds[kind]["latency_ms"] = took.get(kinds[kind]["path"])
    return found


def _properties(distilling: Distilling, net: Bert) -> dict[str, str]:
    """What a file says of itself. Nothing is judged on validation sentences, so no metrics."""
    return properties.of(
        {
            "space": "bert",
            "frame": json.dumps(asdict(net.frame)),
            "run": distilling.run.folder.name,
        },
        arch=arch_to_dict(net.arch),
        fed=None,
        validation={},
        licence="",
    )


def _accuracy(path: Path, task: Task) -> float:
    """Of the file, on the test sentences."""
    found = files_of.predictions(path, task.test.tokens.numpy())
    return float((found == task.test.labels.numpy()).mean())


def _drafts(distilling: Distilling, nets: Mapping[str, Bert]) -> dict[str, Write]:
    example = torch.ones(1, distilling.spec.sequence, dtype=torch.int64)
    return {name: partial(drafts.draft, net, example=example) for name, net in nets.items()}


def _milliseconds(
    distilling: Distilling, sources: Mapping[str, Write], *, as_written: bool = False
) -> dict[str, float]:
    """Median of each file on one text of the run's length, in turn; nothing for other machines.
    `as_written`: each in its own precision, not in the device's."""
    if not distilling.device.local:
        return {}
    board, seed = distilling.device, distilling.spec.seed
    timer = measuring.timer(measuring.LOCAL, board, seed, as_written=as_written)
    with tempfile.TemporaryDirectory() as folder:
        paths = [Path(folder) / f"{number}.onnx" for number in range(len(sources))]
        for path, write in zip(paths, sources.values(), strict=True):
            write(path)
        timings = timer(paths)
    return {name: timing.median_ms for name, timing in zip(sources, timings, strict=True)}


# ---- search --------------------------------------------------------------------------------------


def search(given: dict[str, Any]) -> dict[str, Any]:
    """`nasctl search --space bert`: of a finished distillation the student of the lowest relation
    loss inside the budgets, delivered into its run. Nothing is trained but the task's head and
    weights, if the distillation had a task. `require` holds what was measured to the budget."""
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
        raise NasctlError(
            "no finished distillation",
            where=f"--supernet {given['supernet']}",
            next="The command that began it finishes it, also what an older nasctl finished.",
        )
    with distilling.run.locked():
        student = _within(distilling, given)
        content = {
            **delivered(distilling, [student]),
            "budget": {"latency_ms": given.get("latency_ms")},
        }
        distilling.run.write_json(SEARCHED, content)
    return content


def require(content: Mapping[str, Any]) -> None:
    """Raises BudgetMissed where the chosen student was measured beyond the budget: it was chosen
    by a draft with random weights, in another session."""
    (row,) = (row for row in content["students"] if row["name"] == CHOSEN)
    limit, took = content["budget"]["latency_ms"], row["latency_ms"]
    if limit is None or took <= limit:
        return
    small = row["files"].get("int8")
    raise BudgetMissed(
        f"took {console.format_ms(took)}, the budget is {console.format_ms(limit)}"
        + (f"; in INT8 it took {console.format_ms(small['latency_ms'])}" if small else ""),
        where="--latency",
        next="Ask for less, or leave the machine to itself.",
    )


_FLAGS = "--supernet, --hw, --macs, --params, --latency"


def _opened(folder: Path, hw: str | None) -> Distilling:
    run = Run(folder)
    said = run.manifest().get("spec", {})
    if "subspaces" not in said:
        raise NasctlError("no distillation", where=f"--supernet {folder}")
    spec = DistilSpec(**{**said, "train_on": "cpu"})  # which was there, not here
    distilling = Distilling(spec, run, teacher.load(spec.teacher), device.load(hw or spec.hw))
    _ = distilling.lesson  # the report's notes read it: what is wrong with it is said at once
    return distilling


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
        nets = {student.name: Bert(student.arch, frame, 2).eval() for student in timed}
        ms = np.array(list(_milliseconds(distilling, _drafts(distilling, nets)).values()))
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
