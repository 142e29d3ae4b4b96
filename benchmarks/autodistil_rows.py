"""The rows of the AutoDistil benchmark: a supernet, its ranked members, a student on the task."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from benchmarks import contract
from benchmarks.autodistil_setup import UNION, Setup, moved, sandwich_of
from compress import adamw, finetune, inherit, members
from compress.adamw import Plan, Step
from compress.distill import Archs, Course, distill
from compress.members import Member, loss_of
from nas import checkpoint
from nas.elastic import extract
from nas.recipe import Recipe
from nas.sampling import sandwich
from nas.search_spaces.bert import Arch, Bert, Space, kept

SAVE_EVERY_S = 180.0  # a state is a quarter of a gigabyte


@dataclass(frozen=True)
class Source:
    """A set of shared weights: its space, how long it is trained and how it begins."""

    name: str
    space: str
    steps: int
    lr: float
    ranked: bool = False
    alone: Arch | None = None  # train this network only


class Bench:
    """Rows that are on disk are not made again; a training goes on in the middle. Rows and files
    bear the digest of the sizes."""

    def __init__(self, setup: Setup, rows: contract.Rows) -> None:
        self.setup, self.rows = setup, rows
        self.nets: dict[str, Bert] = {}

    def row(self, key: dict[str, Any], work: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        key = {**key, "size": self.setup.size.digest}
        if (found := self.rows.get(key)) is None:
            began = time.process_time()
            found = work()
            self.rows.add(key, {**found, "cpu_s": round(time.process_time() - began, 1)})
        return found

    def rate(self, name: str) -> float:
        """The best of the rates for a space, by the mean held-out loss of its two ends."""
        space, size = self.setup.space(name), self.setup.size
        found = {}
        for lr in size.rates:

            def tried(lr: float = lr) -> dict[str, Any]:
                net = self.begun(space, space.decode(space.largest))
                course, archs = self._course(f"rate {name} {lr}"), self._archs(name, size.trial)
                follow(distill(net, archs, course, Plan(size.trial, lr)))
                ends = [space.decode(row) for row in (space.smallest, space.largest)]
                lesson, held_out = self.setup.lesson, self.setup.held_out
                net.eval()
                return {"loss": float(np.mean([loss_of(net, e, lesson, *held_out) for e in ends]))}

            found[lr] = self.row({"part": "rate", "space": name, "lr": lr}, tried)["loss"]
        return min(found, key=lambda lr: found[lr])

    # ---- shared weights

    def net(self, source: Source) -> Bert:
        """Trained, from its file if there is one."""
        if source.name not in self.nets:
            self.nets = {source.name: self._trained(source)}  # one at a time: they are large
        return self.nets[source.name]

    def begun(self, space: Space, arch: Arch, layers: Sequence[int] | None = None) -> Bert:
        """The network with the teacher's weights: of a smaller one the same layers as its
        sub-space's supernet gives it, unless others are named."""
        teacher, of = self.setup.teacher.net, space.genes[0].options[-1]
        if layers is None:
            taken = kept(of, len(teacher.arch.layers))
            layers = [teacher.arch.layers[taken[at]] for at in arch.layers]
        return inherit.inherit(space.build(arch), teacher, layers)

    def _trained(self, source: Source) -> Bert:
        setup, space = self.setup, self.setup.space(source.space)
        path = setup.folder / f"{source.name}.safetensors"
        net = self.begun(space, source.alone or space.decode(space.largest))
        if path.is_file():
            checkpoint.fill(net, checkpoint.read(path)[0], path)
            return net
        if source.ranked:
            tokens, teacher = setup.sequences[:64], setup.teacher.net
            layers = inherit.important_layers(teacher, tokens, len(net.arch.layers))
            inherit.inherit(net, inherit.ranked(teacher), layers)
        began = time.process_time()
        state, plan = setup.folder / f"{source.name}.state", Plan(source.steps, source.lr)
        archs = self._archs(source.space, source.steps, source.alone)
        course = self._course(str(source))
        steps = distill(net, archs, course, plan, resume=state, save_every_s=SAVE_EVERY_S)
        losses = follow(steps)
        checkpoint.write(path, net.state_dict(), {})
        key = {"part": "trained", "source": source.name, "size": setup.size.digest}
        state.unlink(missing_ok=True)
        seconds = round(time.process_time() - began, 1)  # since it was last started
        said = {"steps": source.steps, "lr": source.lr, "losses": losses, "cpu_s": seconds}
        self.rows.add(key, said)
        return net

    def _course(self, of: str) -> Course:
        """The teacher is not run: what it shows of every sequence was kept."""
        setup = self.setup
        n = len(setup.sequences) - setup.size.held_out
        chosen = adamw.shuffled(n, setup.size.batch, seed=0)
        said = f"{of} {setup.teacher.fingerprint} {len(setup.sequences)}"
        shown = setup.shown
        return Course(shown.look, setup.lesson, lambda step: shown.batch(chosen(step)), said)

    def _archs(self, space: str, steps: int, alone: Arch | None = None) -> Archs:
        if alone is not None:
            return lambda step: [alone]
        if space == UNION:
            return sandwich_of(self.setup)
        return sandwich(self.setup.space(space), Recipe(steps=steps, seed=0))

    def step_macs(self, source: Source) -> float:
        """Multiply-adds per token of a step's networks, on average. The teacher's are not counted:
        it shows every sequence once, for all trainings."""
        if source.alone is not None:
            return self.setup.macs(source.alone)
        archs = self._archs(source.space, source.steps)
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

    def loss(self, source: Source, net: Bert) -> float:
        """On held-out text, of a network that is its source's only one."""

        def work() -> dict[str, Any]:
            held_out = self.setup.held_out
            return {"loss": loss_of(net.eval(), net.arch, self.setup.lesson, *held_out)}

        found: float = self.row({"part": "loss", "source": source.name}, work)["loss"]
        return found

    def teacher_tuned(self, seed: int) -> Bert:
        """The teacher after fine-tuning, from its file if there is one; and its row."""
        train, test = self.setup.task
        net = finetune.with_classes(self.setup.teacher.net, 2, seed)
        path = self.setup.folder / f"teacher {seed}.safetensors"
        if path.is_file():
            checkpoint.fill(net, checkpoint.read(path)[0], path)
        else:
            follow(finetune.finetune(net, train, self.tuning(seed)))
            checkpoint.write(path, net.state_dict(), {})
        net.eval()
        self.row({"part": "task", "net": "teacher", "seed": seed}, lambda: judged(net, test))
        return net

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
