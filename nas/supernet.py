"""Train one weight-sharing network whose every sub-network works: sandwich rule with in-place
distillation (BigNAS, arXiv 2003.11142, section 3.1; universally slimmable networks, 1903.05134).

Each step runs the largest, the smallest and `n_random` other networks on the same images, each at
its own resolution. The largest learns from labels and is regularised; the others learn only its
prediction of the same step (`nas.distillation`), or that and the labels. The four gradients are
averaged and the optimiser steps once, at four times the rate of one network: published codes that
sum gradients take the same step, but for weight decay, which here grows with the rate.

Everything random is a function of (seed, step), never of a generator's history, so a run continues
from a checkpoint exactly as if it had not stopped. The device is the network's own.
"""

from __future__ import annotations

import json
import math
from collections.abc import Generator
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch.nn.functional as F
from torch import Tensor, nn

from nas import checkpoint, parallel, resumable, update
from nas.collapse import MAX_HALVINGS, Watch
from nas.errors import NasctlError
from nas.gradients import Course, batch_indices, gradients
from nas.judge import Score, calibrate, calibration_images, child, device_of, evaluate
from nas.recipe import Recipe
from nas.sampling import Archs, alone, sandwich
from nas.tasks import Task

# one name for training and judging, which callers do in turn
__all__ = [
    "Archs",
    "Course",
    "Recipe",
    "Score",
    "Step",
    "alone",
    "batch_indices",
    "calibrate",
    "calibration_images",
    "child",
    "evaluate",
    "sandwich",
    "taught",
    "train",
]

SAFE_EVERY = 100  # steps between the states that a collapse can return to


@dataclass(frozen=True)
class Step:
    """What a training step reports. After a collapse `step` is where the training returned to."""

    step: int  # steps done so far
    steps: int
    losses: tuple[float, ...]  # of each network, in the order of the step's architectures
    halvings: int = 0  # how often a collapse has halved the learning rate


def train(
    net: nn.Module,
    archs: Archs,
    task: Task,
    recipe: Recipe,
    *,
    resume: Path | None = None,
    save_every_s: float = 20.0,
) -> Generator[Step, None, None]:
    """Train `net` in place, yielding after each step. `archs(step)` are the architectures it runs
    (or a Contest for one): the first learns from the labels, the others from the first.

    With `resume`, the state is saved to that file every `save_every_s` seconds and when the caller
    closes the generator, and a state found there is continued. Of several processes the first alone
    reads and writes it; all have to take the same steps and close at the same one.

    A collapse (the loss is not finite, or back at chance for 20 steps) returns to the last sound
    state, kept every SAFE_EVERY steps, with half the learning rate. Raises NasctlError after
    MAX_HALVINGS of these, if the file belongs to another recipe, if a batch does not fit the
    device's memory, or if another process is gone.
    """
    return taught(net, archs, Course(task, recipe), resume=resume, save_every_s=save_every_s)


def taught(
    net: nn.Module,
    archs: Archs,
    course: Course,
    *,
    resume: Path | None = None,
    save_every_s: float = 20.0,
) -> Generator[Step, None, None]:
    """`train`, where the course may have a frozen teacher: all networks then learn from labels and
    from it. It is called as it is, so put it in eval mode."""
    run = _Training(net, archs, course, resume)
    yield from resumable.train(run.step, run, course.recipe.steps, save_every_s)


@dataclass
class _Training:
    """A training between two steps: what a state file holds, and what it takes to go on."""

    net: nn.Module
    archs: Archs
    course: Course
    path: Path | None
    watch: Watch = field(default_factory=Watch)
    safe_step: int = -1  # none yet
    safe: dict[str, Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.net.train()
        recipe = self.course.recipe
        self.optimiser = update.sgd(self.net, recipe.lr, recipe.momentum, recipe.weight_decay)
        said = _fingerprint(self.course)
        self.weights = resumable.Weights(self.path, self.net, self.optimiser, said)
        task = self.course.task
        level = math.log(task.n_classes) if task.loss is F.cross_entropy else math.inf
        self.chance = level  # of the loss; other losses than cross-entropy have none
        self.course = self.course.on(device_of(self.net))

    def step(self, done: int) -> Step:
        """One step forward, or after a collapse the return to a sound state."""
        recipe, archs = self.course.recipe, self.archs(done)
        found = gradients(self.net, archs, self.course, done)
        grads = [p.grad for p in self.net.parameters() if p.grad is not None]
        parallel.workers().sum_([*grads, found])
        losses = tuple(found.tolist())  # one wait for the device
        self.watch = self.watch.after(losses, self.chance)
        if self.watch.collapsed:
            self._roll_back(done)
            return Step(self.safe_step, recipe.steps, losses, self.watch.halvings)
        if done % SAFE_EVERY == 0 and self.watch.calm:
            # before the update: these weights are known to give a finite loss
            state = checkpoint.state(self.net, self.optimiser)
            self.safe = {name: tensor.to("cpu", copy=True) for name, tensor in state.items()}
            self.safe_step = done
        rate = len(archs) * recipe.lr_at(done) / 2**self.watch.halvings
        update.step(self.net, self.optimiser, rate, recipe.clip_norm)
        if recipe.ema:
            update.average(self.net, self.optimiser, recipe.ema, done)
            if done + 1 == recipe.steps:
                update.take_average(self.net, self.optimiser)
        return Step(done + 1, recipe.steps, losses, self.watch.halvings)

    def _roll_back(self, done: int) -> None:
        self.optimiser.zero_grad(set_to_none=True)
        halvings = self.watch.halvings
        if self.safe_step < 0 or halvings == MAX_HALVINGS:
            why = "the loss is back at chance" if self.watch.finite else "the loss is not finite"
            also = f", and was so at 1/{2**halvings} of the rate" if halvings else ""
            raise NasctlError(
                f"training diverged at step {done + 1}: {why}{also}",
                where="--lr",
                next=f"Try --lr {self.course.recipe.lr / 2**halvings / 3:.2g}.",
            )
        checkpoint.restore(self.safe, self.net, self.optimiser, Path("the last sound state"))
        self.watch = self.watch.rolled_back()

    def save(self, done: int) -> None:
        notes = json.dumps({"watch": asdict(self.watch), "safe_step": self.safe_step})
        self.weights.save(done, safe=self.safe, notes=notes)

    def load(self) -> int:
        done = self.weights.load()
        if self.path is not None:
            self.safe, notes = checkpoint.safe(self.path)
            if notes:
                said = json.loads(notes)
                self.watch, self.safe_step = Watch(**said["watch"]), said["safe_step"]
        return done


def _fingerprint(course: Course) -> str:
    said = f"{course.recipe} {course.task.fingerprint}"
    return said if course.teacher is None else f"{said} {checkpoint.digest(course.teacher)}"
