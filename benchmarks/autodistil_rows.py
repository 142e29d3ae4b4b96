"""The rows of the AutoDistil benchmark: a supernet, its ranked members, a student on the task."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np

from benchmarks import contract
from benchmarks.autodistil_setup import UNION, Setup, moved, sandwich_of
from compress import adamw, finetune, inherit, members
from compress.adamw import Plan, Step
from compress.distill import Archs, Course, distill
from compress.members import Member
from nas import checkpoint
from nas.elastic import extract
from nas.recipe import Recipe
from nas.sampling import sandwich
from nas.search_spaces.bert import Arch, Bert, Space

SAVE_EVERY_S = 180.0  # a state is a quarter of a gigabyte


@dataclass(frozen=True)
class Source:
    """A set of shared weights: its space, how long it is trained and how it begins."""

    name: str
    space: str
    steps: int
    ranked: bool = False
    alone: Arch | None = None  # train this network only


class Bench:
    """Rows that are on disk are not made again; a training goes on in the middle."""

    def __init__(self, setup: Setup, rows: contract.Rows) -> None:
        self.setup, self.rows = setup, rows
        self.nets: dict[str, Bert] = {}

    def row(self, key: dict[str, Any], work: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        if (found := self.rows.get(key)) is None:
            began = time.process_time()
            found = work()
            self.rows.add(key, {**found, "cpu_s": round(time.process_time() - began, 1)})
        return found

    # ---- shared weights

    def net(self, source: Source) -> Bert:
        """Trained, from its file if there is one."""
        if source.name not in self.nets:
            self.nets = {source.name: self._trained(source)}  # one at a time: they are large
        return self.nets[source.name]

    def _trained(self, source: Source) -> Bert:
        setup, space = self.setup, self.setup.space(source.space)
        path = setup.folder / f"{source.name}.safetensors"
        net = space.build(source.alone or space.decode(space.largest))
        if path.is_file():
            checkpoint.fill(net, checkpoint.read(path)[0], path)
            return net
        teacher = setup.teacher.net
        layers = None
        if source.ranked:
            tokens = setup.sequences[:64]
            layers = inherit.important_layers(teacher, tokens, len(net.arch.layers))
            teacher = inherit.ranked(teacher)
        inherit.inherit(net, teacher, layers)
        began = time.process_time()
        state, plan = setup.folder / f"{source.name}.state", Plan(source.steps, setup.size.lr)
        archs, course = self._archs(source, space), self._course(source)
        steps = distill(net, archs, course, plan, resume=state, save_every_s=SAVE_EVERY_S)
        losses = follow(steps)
        checkpoint.write(path, net.state_dict(), {})
        key = {"part": "trained", "source": source.name}
        state.unlink(missing_ok=True)
        seconds = round(time.process_time() - began, 1)  # since it was last started
        self.rows.add(key, {"steps": source.steps, "losses": losses, "cpu_s": seconds})
        return net

    def _course(self, source: Source) -> Course:
        setup = self.setup
        n = len(setup.sequences) - setup.size.held_out
        chosen = adamw.shuffled(n, setup.size.batch, seed=0)
        said = f"{source} {setup.teacher.fingerprint} {len(setup.sequences)}"
        return Course(
            setup.teacher.net.look, setup.lesson, lambda s: setup.sequences[chosen(s)], said
        )

    def _archs(self, source: Source, space: Space) -> Archs:
        if (alone := source.alone) is not None:
            return lambda step: [alone]
        if source.space == UNION:
            return sandwich_of(self.setup)
        return sandwich(space, Recipe(steps=source.steps, seed=0))

    def step_macs(self, source: Source) -> float:
        """Multiply-adds per token of a step's networks, on average."""
        space = self.setup.space(source.space)
        if source.alone is not None:
            return self.setup.macs(source.alone)
        archs = self._archs(source, space)
        drawn = [sum(self.setup.macs(arch) for arch in archs(step)) for step in range(50)]
        return float(np.mean(drawn))

    # ---- members

    def ranked(self, source: Source, name: str) -> list[Member]:
        """The members of the sub-space `name` in these weights, genes as of that sub-space."""
        setup, own = self.setup, self.setup.space(name)
        every = members.every(own)
        if (limit := setup.size.members) is not None:
            every = every[np.linspace(0, len(every) - 1, limit).astype(int)]
        space = setup.space(source.space)
        rows = moved(every, own, space)
        kept = setup.folder / f"{source.name} {name}.members.jsonl"
        found = members.rank(self.net(source), space, rows, setup.lesson, setup.held_out, kept=kept)
        return [
            Member(tuple(row.tolist()), m.loss, m.macs, m.params)
            for row, m in zip(every, found, strict=True)
        ]

    # ---- the task

    def tuned(self, key: dict[str, Any], encoder: Callable[[], Bert]) -> dict[str, Any]:
        """Fine-tuned with the seed of the key; which test sentences it then gets right."""

        def work() -> dict[str, Any]:
            train, test = self.setup.task
            net = finetune.with_classes(encoder(), 2, key["seed"])
            follow(finetune.finetune(net, train, self.tuning(key["seed"])))
            return judged(net, test)

        return self.row({"part": "task", **key}, work)

    def tuned_teacher(self, seed: int) -> Bert:
        """The teacher after fine-tuning, from its file if there is one."""
        net = finetune.with_classes(self.setup.teacher.net, 2, seed)
        path = self.setup.folder / f"teacher {seed}.safetensors"
        if path.is_file():
            checkpoint.fill(net, checkpoint.read(path)[0], path)
        else:
            follow(finetune.finetune(net, self.setup.task[0], self.tuning(seed)))
            checkpoint.write(path, net.state_dict(), {})
        return net.eval()

    def tuning(self, seed: int) -> finetune.Finetuning:
        size = self.setup.size
        steps = size.phrases // size.tuning_batch
        return finetune.Finetuning(Plan(steps, size.tuning_lr), size.tuning_batch, seed=seed)


def judged(net: Bert, test: finetune.Labelled) -> dict[str, Any]:
    right = finetune.predictions(net, test.tokens) == test.labels
    bits = "".join("01"[int(each)] for each in right)
    return {"accuracy": float(right.float().mean()), "right": bits}


def follow(steps: Iterable[Step]) -> list[float]:
    """The losses of the last step of a training."""
    losses: list[float] = []
    for step in steps:
        losses = list(step.losses)
    return losses


def cut(net: Bert, space: Space, arch: Arch) -> Bert:
    return extract(net, space.build(arch))
