"""One resumable training loop with AdamW, for distilling and for fine-tuning transformers.

What a step learns is a function of its number, given by the caller; so a training goes on from its
state file exactly as if it had not stopped, on any number of processes (`nas.parallel`).
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from nas import parallel, resumable, update
from nas.errors import NasctlError

#: a step's number to this process's part of its losses [K]; adds the gradients
Gradients = Callable[[int], Tensor]


@dataclass(frozen=True)
class Plan:
    """How long and how fast. Linear warm-up, then linear to zero."""

    steps: int
    lr: float  # at the peak
    warmup: float = 0.1  # share of the steps
    weight_decay: float = 0.01  # of matrices; norms and biases have none
    clip_norm: float = 1.0

    def lr_at(self, step: int) -> float:
        rising = (step + 1) / max(1.0, self.warmup * self.steps)
        falling = (self.steps - step) / max(1.0, (1 - self.warmup) * self.steps)
        return self.lr * min(1.0, rising, falling)


@dataclass(frozen=True)
class Step:
    """Steps done so far, of how many, and the losses of the last one."""

    step: int
    steps: int
    losses: tuple[float, ...]


def train(
    net: nn.Module,
    gradients: Gradients,
    plan: Plan,
    fingerprint: str,
    *,
    resume: Path | None = None,
    save_every_s: float = 20.0,
) -> Generator[Step, None, None]:
    """Train `net` in place, yielding after each step.

    With `resume` the state is saved to that file every `save_every_s` seconds, at the end and when
    the caller closes the generator; a state found there is continued. `fingerprint` says what else
    than the plan the result depends on. Raises NasctlError if a loss is no number, or if the file
    belongs to another training.
    """
    optimiser = _adamw(net, plan)

    def step(done: int) -> Step:
        losses = gradients(done)
        found = [p.grad for p in net.parameters() if p.grad is not None]
        parallel.workers().sum_([*found, losses])
        if not losses.isfinite().all():
            raise NasctlError(
                f"the loss is not finite at step {done + 1}",
                where="--lr",
                next=f"Try --lr {plan.lr / 3:.2g}.",
            )
        update.step(net, optimiser, plan.lr_at(done), plan.clip_norm)
        return Step(done + 1, plan.steps, tuple(losses.tolist()))

    state = resumable.Weights(resume, net, optimiser, f"{fingerprint} {plan}")
    yield from resumable.train(step, state, plan.steps, save_every_s)


def _adamw(net: nn.Module, plan: Plan) -> torch.optim.Optimizer:
    matrices = [p for p in net.parameters() if p.requires_grad and p.ndim > 1]
    vectors = [p for p in net.parameters() if p.requires_grad and p.ndim <= 1]
    return torch.optim.AdamW(
        [
            {"params": matrices, "weight_decay": plan.weight_decay},
            {"params": vectors, "weight_decay": 0.0},
        ]
    )


def shuffled(n: int, batch: int, seed: int) -> Callable[[int], NDArray[np.int64]]:
    """A step's number to the rows of its batch: epochs are permutations of (seed, epoch)."""
    if batch > n:
        raise NasctlError(f"{batch} examples per step, but {n} in all", where="--batch")

    def rows(step: int) -> NDArray[np.int64]:
        epoch, at = divmod(step, n // batch)
        order = np.random.default_rng((seed, 31, epoch)).permutation(n)
        return np.sort(order[at * batch : (at + 1) * batch])  # in order: text is mapped files

    return rows
