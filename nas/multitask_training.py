"""Train a network with several outputs: from scratch, or a pruned one back to its form.

The loss is the sum of the goals' losses, each with its goal's fixed weight (1 unless the task says
otherwise): what a summed loss hides is shown by the goals' own values in every step. With a teacher
each goal learns from its labels and from the teacher's answer, `imitation` of the latter (knowledge
distillation, Hinton et al., arXiv 1503.02531, per goal).

Everything random is a function of (seed, step): a stopped training goes on to the same result.
"""

from __future__ import annotations

import math
from collections.abc import Generator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from nas import checkpoint, resumable, update
from nas.elastic import channels_last
from nas.errors import NasctlError, UsageError
from nas.goals import Outputs, Targets
from nas.gradients import batch_indices
from nas.judge import device_of
from nas.multitask import MultiTask, answers


@dataclass(frozen=True)
class Schedule:
    """How long and how fast: linear warm-up, then half a cosine to zero (arXiv 1608.03983)."""

    steps: int
    batch: int = 64
    lr: float = 0.1
    momentum: float = 0.9
    weight_decay: float = 5e-4  # not on norms and biases
    warmup: float = 0.05  # share of the steps
    clip_norm: float = 2.0
    imitation: float = 0.5  # share of a goal's loss that a teacher gives, if there is one
    seed: int = 0

    def __post_init__(self) -> None:
        if self.batch < 2:
            raise UsageError(
                f"a batch of {self.batch}", where="--batch", allowed="2 or more, for batch norms"
            )
        for name, valid in (
            ("steps", self.steps >= 0),
            ("lr", self.lr > 0),
            ("warmup", 0 <= self.warmup <= 1),
            ("imitation", 0 <= self.imitation <= 1),
        ):
            if not valid:
                raise UsageError(f"{getattr(self, name)}", where=f"--{name}")

    def lr_at(self, step: int) -> float:
        warm = round(self.warmup * self.steps)
        if step < warm:
            return self.lr * (step + 1) / warm
        return self.lr * (1 + math.cos(math.pi * (step - warm) / max(1, self.steps - warm))) / 2


@dataclass(frozen=True)
class Step:
    """What a training step reports: each goal's loss before the step, unweighted."""

    step: int  # steps done so far
    steps: int
    losses: Mapping[str, float]


def train(
    net: nn.Module,
    task: MultiTask,
    schedule: Schedule,
    *,
    teacher: nn.Module | None = None,
    resume: Path | None = None,
    save_every_s: float = 20.0,
) -> Generator[Step, None, None]:
    """Train `net` in place, yielding after each step; it is in eval mode after the last.

    A `teacher` is called as it is, so put it in eval mode. With `resume`, the state is saved to
    that file every `save_every_s` seconds and when the caller closes the generator, and a state
    found there is continued. Raises NasctlError if the file belongs to another training, if a goal
    has no answer among the outputs, or if a loss is not finite (naming the goal).
    """
    channels_last(net).train()
    optimiser = update.sgd(net, schedule.lr, schedule.momentum, schedule.weight_decay)
    # what it starts from counts too: two prunings may end in the same shapes
    said = f"{schedule} {task.fingerprint} {checkpoint.digest(net)}"
    if teacher is not None:
        said += f" {checkpoint.digest(teacher)}"

    def step(done: int) -> Step:
        losses = _backward(net, task, schedule, done, teacher)
        update.step(net, optimiser, schedule.lr_at(done), schedule.clip_norm)
        return Step(done + 1, schedule.steps, losses)

    state = resumable.Weights(resume, net, optimiser, said)
    yield from resumable.train(step, state, schedule.steps, save_every_s)
    net.eval()


def _backward(
    net: nn.Module, task: MultiTask, schedule: Schedule, step: int, teacher: nn.Module | None
) -> dict[str, float]:
    """Adds the gradient of one step; returns each goal's loss."""
    rows = batch_indices(len(task.train), schedule.batch, step, schedule.seed)
    generator = torch.Generator().manual_seed(schedule.seed * 1_000_003 + step)
    images, targets = task.augmented(task.train.at(rows).to(device_of(net)), generator)
    outputs = answers(net(images), task)
    with torch.no_grad():
        taught = None if teacher is None else answers(teacher(images), task)
    losses = goal_losses(task, outputs, targets, taught, schedule.imitation)
    for name, loss in losses.items():
        if not loss.isfinite():
            raise NasctlError(
                f"the loss of {name} is {loss.item()} at step {step + 1}",
                where="--lr",
                next=f"Try --lr {schedule.lr / 3:.2g}, or look at what {name} was given.",
            )
    weights = {goal.name: goal.weight for goal in task.goals}
    torch.stack([weights[name] * loss for name, loss in losses.items()]).sum().backward()
    return {name: loss.item() for name, loss in losses.items()}


def goal_losses(
    task: MultiTask,
    outputs: Outputs,
    targets: Targets,
    taught: Outputs | None = None,
    imitation: float = 0.5,
) -> dict[str, Tensor]:
    """Each goal's loss on a batch, from its labels and from the teacher's outputs if there are any.
    A goal that cannot imitate learns from its labels alone."""
    losses = {}
    for goal in task.goals:
        loss = goal.loss(outputs, targets)
        if taught is not None and goal.imitate is not None:
            soft = goal.imitate(outputs[goal.name], taught[goal.name])
            loss = torch.lerp(loss, soft, imitation)
        losses[goal.name] = loss
    return losses
