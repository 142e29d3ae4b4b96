"""The stages of `nasctl distill` before any student is chosen: pack the text, train a supernet per
sub-space, rank its members. Each goes on where it was interrupted."""

from __future__ import annotations

import math
import re
import shutil
import tomllib
from collections.abc import Callable, Generator, Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from cli import accelerator, console
from cli.training import follow
from compress import adamw, finetune, inherit, members
from compress.adamw import Plan, Step
from compress.distill import Course, distill
from compress.finetune import Labelled
from compress.lessons import relations
from compress.lessons.relations import Relations
from compress.members import Member
from compress.teacher import Teacher
from hw_profiles import op
from hw_profiles.device import Device
from nas import checkpoint, file, parallel
from nas import run as runs
from nas.data import sentences, text
from nas.errors import NasctlError, UsageError, unknown
from nas.recipe import Recipe
from nas.run import Run
from nas.sampling import sandwich
from nas.search_spaces.bert import Arch, Bert, Grid, Space, within

STAGE, REPORT, TEXT, STUDENTS = "distill", "report.json", "text.bin", "students"
SEARCHED = "search.json"  # what `nasctl search --space bert` found in it last
TUNING = ".tuning.state"  # ending of what a fine-tuning goes on from
TEACHER, CHOSEN = "teacher", "chosen"  # no sub-spaces: files have these names beside theirs
NAME = re.compile(r"[\w-]+")  # of a sub-space: files are called after it
HELD_OUT = 0.05  # of the sequences, at the end of the text
MOST_HELD_OUT = 512
RANKED_AT_ONCE = 64
REPORTED = 2  # of reports: of another version, students are delivered again, nothing else


class DistilSpec(BaseModel):
    """What a distillation is asked for. Fields are the long flags of `nasctl distill`."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    teacher: str
    text: list[str] = Field(..., min_length=1)
    subspaces: list[str] = Field(..., min_length=1)
    hw: str = "cpu"
    sequence: int = Field(128, ge=4)
    epochs: float = Field(1.0, gt=0)
    batch: int = Field(64, ge=2)
    lr: float = Field(1e-3, gt=0)
    loss: str = "kl"
    relation_heads: int | None = Field(None, ge=1)
    bf16: bool = False
    finetune: str | None = None
    test: str | None = None
    tuning_epochs: float = Field(3.0, gt=0)
    tuning_lr: float = Field(2e-4, gt=0)
    seed: int = Field(0, ge=0)
    threads: int = Field(..., ge=1)
    train_on: str = "cpu"


class Task(NamedTuple):
    """Labelled sentences as tokens."""

    train: Labelled
    test: Labelled
    classes: int
    shared: int  # test sentences that are among the training sentences too


@dataclass(frozen=True, eq=False)
class Distilling:
    """The resolved inputs of a distillation."""

    spec: DistilSpec
    run: Run
    teacher: Teacher
    device: Device

    @cached_property
    def spaces(self) -> dict[str, Space]:
        """Each inside the teacher, by name; raises UsageError for an unknown or too large one, or
        a name that is taken."""
        arch, frame = self.teacher.net.arch, self.teacher.net.frame
        derived = within(len(arch.layers), arch.hidden, arch.heads, arch.mlp)
        grids: dict[str, Grid] = {}
        for name, grid in _grids(self.spec.subspaces, derived):
            if name in (*grids, TEACHER, CHOSEN):
                why = "there are two of it" if name in grids else "other files have this name"
                raise UsageError(why, where=f"--subspaces {name}", next="Name it otherwise.")
            if not NAME.fullmatch(name):
                raise UsageError(
                    f"'{name}' cannot name files",
                    where="--subspaces",
                    allowed="letters, digits, - and _",
                )
            _fits(name, grid, arch)
            grids[name] = grid
        length = self.spec.sequence
        return {name: Space(size=length, grid=grid, frame=frame) for name, grid in grids.items()}

    @cached_property
    def accelerator(self) -> torch.device:
        """Where networks are trained and ranked; raises UsageError where it is not there."""
        return accelerator.named(self.spec.train_on)

    @cached_property
    def lesson(self) -> Relations:
        heads, net = self.spec.relation_heads or self.teacher.net.arch.heads, self.teacher.net
        relations.require(heads, net.arch.heads * net.frame.head, self._widths)
        return Relations(heads, self.spec.loss)  # type: ignore[arg-type]

    @property
    def _widths(self) -> list[int]:
        """Channels that queries, keys and values have in the students."""
        genes = [gene for space in self.spaces.values() for gene in space.genes]
        heads = {number for gene in genes if gene.name == "heads" for number in gene.options}
        return sorted(number * self.teacher.net.frame.head for number in heads)

    @property
    def notes(self) -> list[str]:
        """What is to be known of the inputs, though nothing is wrong with it."""
        notes, heads = [], self.lesson.heads
        if cut := [(width % heads / width, width) for width in self._widths if width % heads]:
            _, width = max(cut)
            none = math.gcd(
                self.teacher.net.arch.heads * self.teacher.net.frame.head, *self._widths
            )
            notes.append(
                f"{heads} relation heads leave out up to {width % heads} of {width} channels of a "
                f"student, as in AutoDistil's code; divisors of {none} leave out none"
            )
        if self.task and self.task.shared:
            notes.append(
                f"{self.task.shared} of {len(self.task.test.labels)} test sentences are among "
                "the training sentences too"
            )
        return notes

    @cached_property
    def task(self) -> Task | None:
        """What students are fine-tuned on, if anything."""
        spec = self.spec
        if spec.finetune is None or spec.test is None:
            return None
        train, test = (sentences.load(Path(path)) for path in (spec.finetune, spec.test))
        known, parts = sentences.classes(train), []
        for part, path in ((train, spec.finetune), (test, spec.test)):
            labels = torch.tensor(sentences.numbers(part, known, path))
            tokens = finetune.encoded(self.teacher, part.texts, spec.sequence)
            parts.append(Labelled(tokens, labels))
        shared = sentences.shared(test, train)
        if shared == len(test):
            raise UsageError(
                "every sentence is among the training sentences",
                where=f"--test {spec.test}",
                next="Accuracy on them says nothing: name others.",
            )
        return Task(parts[0], parts[1], len(known), shared)

    @cached_property
    def text_key(self) -> str:
        """What the packed text depends on."""
        for path in map(Path, self.spec.text):
            if not path.is_file():
                raise NasctlError("no such file", where=f"--text {path}")
        digests = [file.sha256(Path(path)) for path in self.spec.text]
        words = self.teacher.encode(["the words of the tokenizer"])
        return runs.digest([digests, words, self.teacher.fingerprint, self.spec.sequence])

    @cached_property
    def key(self) -> str:
        """What the result depends on."""
        asked = self.spec.model_dump(exclude={"teacher", "text", "threads", "train_on"})
        task = [file.sha256(Path(p)) for p in (self.spec.finetune, self.spec.test) if p]
        grids = {name: [g.options for g in space.genes] for name, space in self.spaces.items()}
        return runs.digest([REPORTED, asked, self.text_key, task, grids])


def _grids(asked: Sequence[str], derived: dict[str, Grid]) -> list[tuple[str, Grid]]:
    found: list[tuple[str, Grid]] = []
    for name in asked:
        if name.endswith(".toml"):
            found += _own(Path(name))
        elif name in derived:
            found.append((name, derived[name]))
        else:
            raise unknown("sub-space", name, [*derived, "FILE.toml"], where="--subspaces")
    return found


def _own(path: Path) -> list[tuple[str, Grid]]:
    """Grids of a TOML file: a table each, with layers, hidden, heads and halves."""
    try:
        tables = tomllib.loads(path.read_text())
        if not tables:
            raise ValueError("no tables")
        return [
            (name, Grid(**{key: tuple(options) for key, options in table.items()}))
            for name, table in tables.items()
        ]
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise UsageError(
            f"cannot read sub-spaces ({error})",
            where=str(path),
            next="Each is a table with lists: layers, hidden, heads, halves.",
        ) from error


def _fits(name: str, grid: Grid, teacher: Arch) -> None:
    wide = grid.hidden[-1] * grid.halves[-1] // 2
    sizes = {
        "layers": (grid.layers[-1], len(teacher.layers)),
        "hidden": (grid.hidden[-1], teacher.hidden),
        "heads": (grid.heads[-1], teacher.heads),
        "MLP": (wide, teacher.mlp),
    }
    for what, (asked, there) in sizes.items():
        if asked > there:
            raise UsageError(
                f"{what} up to {asked}, the teacher has {there}", where=f"--subspaces {name}"
            )


def described(distilling: Distilling) -> dict[str, Any]:
    """Teacher and sub-spaces as values."""
    content: dict[str, Any] = {"spec": distilling.spec.model_dump(), "subspaces": {}}
    for name, space in distilling.spaces.items():
        ends = [space.ops(space.decode(row)) for row in (space.smallest, space.largest)]
        content["subspaces"][name] = {
            "students": space.count(),
            "macs": [op.macs(ops) for ops in ends],
            "params": [op.params(ops) for ops in ends],
            "genes": {gene.name: list(gene.options) for gene in space.genes},
        }
    return content


def forget(distilling: Distilling) -> None:
    """All that stages keep in order to go on."""
    for name in distilling.spaces:
        for kind in (".state", ".safetensors", ".members.jsonl"):
            distilling.run.path(name + kind).unlink(missing_ok=True)
    for state in distilling.run.folder.glob("*" + TUNING):
        state.unlink()
    for name in (TEXT, SEARCHED):
        distilling.run.path(name).unlink(missing_ok=True)
    shutil.rmtree(distilling.run.path(STUDENTS), ignore_errors=True)


# ---- text, training, ranking ---------------------------------------------------------------------


def packed(distilling: Distilling) -> int:
    """Pack the text, unless the run has it; the number of sequences."""
    spec, run, key = distilling.spec, distilling.run, distilling.text_key
    if not run.done("text", key):
        teacher, paths = distilling.teacher, [Path(path) for path in spec.text]
        text.pack(paths, spec.sequence, teacher.encode, teacher.wrapping, run.path(TEXT))
        run.finish("text", key, 0.0, [TEXT])
    n = len(text.sequences(run.path(TEXT), spec.sequence))
    if n - held_out(n) < spec.batch:
        raise NasctlError(
            f"{n} sequences of {spec.sequence} tokens in all, a step takes {spec.batch}",
            where="--batch",
            next="Give more text, a smaller --batch or a smaller --sequence.",
        )
    return n


def held_out(n: int) -> int:
    """Of `n` sequences, those at the end of the text that no step sees."""
    return max(1, min(MOST_HELD_OUT, round(HELD_OUT * n)))


def untrained(distilling: Distilling) -> list[str]:
    """The sub-spaces whose supernets the run has not."""
    run = distilling.run
    return [
        name
        for name in distilling.spaces
        if not run.done(f"train {name}", _training_key(distilling, name))
    ]


def trained(distilling: Distilling, name: str, n: int) -> None:
    """Train a sub-space's supernet into the run. In a process group every process calls this; the
    first writes."""
    spec, run = distilling.spec, distilling.run
    first, key = parallel.workers().first, _training_key(distilling, name)
    trains = n - held_out(n)
    rows, chosen = _rows(distilling), adamw.shuffled(trains, spec.batch, spec.seed)
    if first:
        run.path(f"{name}.members.jsonl").unlink(missing_ok=True)  # of other weights
    state, most = run.path(f"{name}.state"), steps(distilling, n)

    def batches(step: int) -> Tensor:
        return torch.from_numpy(rows[chosen(step)]).long()

    net, going = training(distilling, name, batches, most, resume=state)
    with closing(going):
        follow(going, most, name)
    if not first:
        return
    weights = f"{name}.safetensors"
    checkpoint.write(run.path(weights), net.state_dict(), {})
    run.finish(f"train {name}", key, 0.0, [weights])
    state.unlink(missing_ok=True)


def steps(distilling: Distilling, n: int) -> int:
    """Of the training on `n` sequences, some of which are held out."""
    spec = distilling.spec
    return max(1, round(spec.epochs * (n - held_out(n)) / spec.batch))


def training(
    distilling: Distilling,
    name: str,
    batches: Callable[[int], Tensor],
    most: int,
    *,
    resume: Path | None = None,
) -> tuple[Bert, Generator[Step, None, None]]:
    """A sub-space's supernet, as it begins, and its training of `most` steps."""
    spec, space = distilling.spec, distilling.spaces[name]
    net = inherit.inherit(_largest(space), distilling.teacher.net)
    for parameter in net.head.parameters():  # untrained: what it was made with is no one's seed
        torch.nn.init.zeros_(parameter)
    net.to(distilling.accelerator)
    course = Course(
        distilling.teacher.net.to(distilling.accelerator).look,
        distilling.lesson,
        batches,
        _training_key(distilling, name),
        spec.bf16,
    )
    archs = sandwich(space, Recipe(steps=most, seed=spec.seed))
    return net, distill(net, archs, course, Plan(most, spec.lr), resume=resume)


def _training_key(distilling: Distilling, name: str) -> str:
    fields = {"sequence", "epochs", "batch", "lr", "loss", "relation_heads", "bf16", "seed"}
    genes = [gene.options for gene in distilling.spaces[name].genes]
    return runs.digest([distilling.spec.model_dump(include=fields), distilling.text_key, genes])


def _largest(space: Space) -> Bert:
    return space.build(space.decode(space.largest))


def _rows(distilling: Distilling) -> Any:
    return text.sequences(distilling.run.path(TEXT), distilling.spec.sequence)


def supernet(distilling: Distilling, name: str) -> Bert:
    """The trained one of a sub-space, on the processor."""
    net, path = _largest(distilling.spaces[name]), distilling.run.path(f"{name}.safetensors")
    checkpoint.fill(net, checkpoint.read(path)[0], path)
    return net


def ranked(distilling: Distilling, name: str, n: int) -> list[Member]:
    """Every member of a sub-space, by its slice of the supernet on held-out text."""
    space, run = distilling.spaces[name], distilling.run
    kept = run.path(f"{name}.members.jsonl")
    rows = torch.from_numpy(np.array(_rows(distilling)[n - held_out(n) :])).long()
    batches = rows.to(distilling.accelerator).split(RANKED_AT_ONCE)
    teacher = distilling.teacher.net.to(distilling.accelerator)
    wanted = members.taught(teacher.look, batches, distilling.lesson)
    every = members.every(space)
    found = []
    net = supernet(distilling, name).to(distilling.accelerator)
    going = members.rank(net, space, every, distilling.lesson, (batches, wanted), kept=kept)
    with console.bar(f"ranking {name}", len(every)) as update:
        for member in going:
            found.append(member)
            update(len(found), "")
    return found
