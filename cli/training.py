"""A supernet as the verbs use it: trained into a run, described, and read back from there."""

from __future__ import annotations

import time
from collections.abc import Generator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import nn

from cli import accelerator, console
from nas import checkpoint, file, parallel, supernet, tasks
from nas import run as runs
from nas import space as spaces
from nas.elastic import Network, channels_last
from nas.errors import NasctlError, UsageError
from nas.run import Run, Spec
from nas.space import Genes, SearchSpace
from nas.supernet import Recipe
from nas.tasks import Task

SUPERNET, STATE = "supernet.safetensors", "training.safetensors"
ARCH = "arch.json"  # the network that a search chose


@dataclass(frozen=True)
class Training:
    """The resolved inputs of a supernet's training and what they imply."""

    spec: Spec
    run: Run
    task: Task
    space: SearchSpace

    @property
    def recipe(self) -> Recipe:
        return self.spec.recipe(len(self.task.train))

    @cached_property
    def accelerator(self) -> torch.device:
        """Where networks are trained and judged; raises UsageError where it is not there."""
        return accelerator.named(self.spec.train_on)

    @property
    def train_key(self) -> str:
        fields = [name for name in runs.TRAINING if name != "data"]  # whose content counts
        return runs.digest([self.spec.digest(*fields), self.task.fingerprint])

    @property
    def description(self) -> dict[str, Any]:
        """What weights trained here say of themselves."""
        spec = self.spec
        return checkpoint.describe(spec.space, spec.width, self.space, self.task.fingerprint)

    @property
    def weights_key(self) -> str:
        """What the weights that networks are judged by come from."""
        return self.train_key if self.spec.alone else file.sha256(self.supernet_path)

    @property
    def supernet_path(self) -> Path:
        """The supernet's file, in this run or in the one that it was taken from."""
        own = self.spec.supernet
        return (Path(own) if own else self.run.folder) / SUPERNET


def space_for(spec: Spec, task: Task) -> SearchSpace:
    """The spec's space for the task's images. Raises UsageError for a space of something else."""
    found = spaces.load(
        spec.space,
        channels=task.channels,
        classes=task.n_classes,
        size=task.size,
        width=spec.width,
    )
    if found.reads != "images":
        raise UsageError(
            f"{spec.space} reads {found.reads}, not images",
            where="--space",
            next="See nasctl distill.",
        )
    return found


def opened(folder: Path) -> Training:
    """The training of a run whose supernet is finished, with its data.

    Raises UsageError if there is no run, NasctlError if there is no finished supernet in it.
    """
    run = Run(folder)
    if not run.path(runs.MANIFEST).is_file():
        raise UsageError(f"no run in {folder}", where="RUN", next="See the runs/ folder.")
    recorded = run.manifest()["spec"]
    require_search(recorded, folder)
    if recorded.get("alone"):
        raise NasctlError(
            "this search trained each network alone: it has no supernet",
            where=str(folder),
            next="Name its model.safetensors, or search again with --no-alone.",
        )
    if recorded.get("supernet") is None and not run.unchanged("train"):
        raise NasctlError(
            "stage 'train' is not finished, or its files were changed since",
            where=str(folder),
            next="Run its `nasctl train` or `nasctl search` again first.",
        )
    spec = runs.make_spec({**recorded, "train_on": "cpu"})  # there, not here
    task = tasks.load(spec.data, size=spec.size)
    torch.set_num_threads(spec.threads)
    return Training(spec, run, task, space_for(spec, task))


def require_search(recorded: Mapping[str, Any], folder: Path) -> None:
    """Raises NasctlError for a run of which no verb reads a supernet or a network of one task: a
    distillation, a pruning or a search for several tasks."""
    if "subspaces" in recorded:
        raise NasctlError(
            "this is a distillation",
            where=str(folder),
            next=f"Its students are in {folder / 'students'}.",
        )
    if "max_drop" in recorded:
        raise NasctlError(
            "this is a pruning", where=str(folder), next=f"Its file is in {folder / 'bundle'}."
        )
    if recorded.get("together"):
        raise NasctlError(
            f"this search has one network for {', '.join(recorded['tasks'])}",
            where=str(folder),
            next=f"Its file is in {folder / 'bundle'}.",
        )
    if "tasks" in recorded:
        raise NasctlError(
            f"this search has a network for each of {', '.join(recorded['tasks'])}",
            where=str(folder),
            next=f"Their files are in {folder / recorded['tasks'][0]} and beside it.",
        )


# ---- training ------------------------------------------------------------------------------------


def fresh(training: Training, genes: Genes | None = None) -> Network:
    """The network of `genes`, or the space's supernet, initialised from the seed."""
    space = training.space
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(training.spec.seed)  # torch's initialisers know no other generator
        net = space.supernet() if genes is None else space.build(space.decode(genes))
    return channels_last(net).to(training.accelerator)


def train_supernet(training: Training, recipe: Recipe) -> None:
    """Train and write the supernet; goes on where it was interrupted.

    In a process group every process calls this with the same recipe; the first writes.
    """
    workers = parallel.workers()
    net, state = fresh(training), training.run.path(STATE)
    archs = supernet.sandwich(training.space, recipe)
    steps = supernet.train(net, archs, training.task, recipe, resume=state)
    follow(steps, recipe.steps, "training the supernet")
    if workers.first:
        said = {
            **training.description,
            "processes": workers.size,
            "accumulate": recipe.accumulate,
        }
        checkpoint.write_described(training.run.path(SUPERNET), net, said)


class Stepped(Protocol):
    """A step of any training of shared weights."""

    @property
    def step(self) -> int: ...
    @property
    def steps(self) -> int: ...
    @property
    def losses(self) -> tuple[float, ...]: ...


def follow(steps: Generator[Stepped, None, None], total: int, title: str) -> None:
    """Train under a progress bar; Ctrl-C stops between two steps, where the state is saved, and all
    processes of a group at the same step."""
    workers = parallel.workers()
    with (
        console.bar(title, total) as update,
        console.deferred_interrupt(once=workers.size == 1) as interrupted,
    ):
        for step in steps:
            names = ("largest", "smallest") if len(step.losses) > 1 else ("",)
            shown = zip(step.losses, names, strict=False)
            update(step.step, "loss " + ", ".join(f"{loss:.3f} {name}" for loss, name in shown))
            if workers.any(interrupted()) and step.step < step.steps:
                steps.close()  # saves
                workers.wait()  # the launcher ends all processes as soon as one has left
                raise KeyboardInterrupt


def step_seconds(
    training: Training, recipe: Recipe, genes: Genes | None = None
) -> tuple[float, nn.Module]:
    """Seconds per step of the supernet, or of the network of `genes` alone, from three steps after
    the first, and the network they trained."""
    net = fresh(training, genes)
    archs = supernet.sandwich(training.space, recipe) if genes is None else supernet.alone(net)
    steps = supernet.train(net, archs, training.task, recipe)
    next(steps)  # the first step also allocates
    n = min(3, recipe.steps - 1)
    start = time.monotonic()
    for _ in range(n):
        next(steps)
    return (time.monotonic() - start) / max(1, n), net


# ---- a finished one ------------------------------------------------------------------------------


def finished_supernet(training: Training) -> Network:
    """The supernet that this run trained or took from another, its weights read from the file.

    Raises NasctlError, naming the difference, if they are of another space, version or data.
    """
    path = training.supernet_path
    tensors, meta = checkpoint.read(path)
    require_same(training, meta, path)
    net = fresh(training)
    checkpoint.fill(net, tensors, path)
    return net


def require_same(training: Training, meta: Mapping[str, str], path: Path) -> dict[str, Any]:
    """What the file says of itself; raises NasctlError if it does not fit what is here."""
    said = checkpoint.description(meta, path)
    if differs := checkpoint.difference(said, training.description):
        raise NasctlError(f"these weights are of something else: {differs}", where=str(path))
    return said
