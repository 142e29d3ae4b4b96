"""Weights and distribution in turn, on two parts of the training images (FBNet, arXiv 1812.03443,
section 3.2; ProxylessNAS, arXiv 1812.00332, section 3.2).

Weights learn on 80 % of the training images at every step. After a warm-up the distribution moves
every few steps, on the other 20 %. All methods have one objective, which is ours so that they can
be compared: cross-entropy plus WEIGHT times the share by which latency exceeds the budget, of what
each differentiates (a sampled mixture's expectation, a pair's, a network's own). The papers
multiply by powers of the logarithm of latency (FBNet, ProxylessNAS) or of latency (its REINFORCE),
which say what latency is worth and know no budget.

Everything random is a function of (seed, step); with `resume` a search that is killed goes on from
the last save to the same result.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Generator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor, nn

from nas import resumable, update
from nas.choice import ChoiceNetwork
from nas.differentiable.policy import Latency, Policy
from nas.errors import NasctlError
from nas.gradients import Batch, Course, batches
from nas.judge import device_of
from nas.space import SearchSpace
from nas.supernet import Step

SHARE = 0.8  # of the training images for the weights
WARM = 0.2  # share of the steps before the distribution moves
EVERY = 2  # steps of the weights per step of the distribution
RATE = 0.1  # of the distribution's Adam; published 0.01 and 0.001, for 100 times as many steps
WEIGHT = 2.0  # of a latency twice the budget, in nats


@dataclass(frozen=True)
class Goal:
    """What a distribution is to learn: a low loss inside a budget of milliseconds."""

    latency: Latency
    budget_ms: float

    @property
    def fingerprint(self) -> str:
        digest = hashlib.sha256(f"{self.budget_ms} {self.latency.constant_ms}".encode())
        for at, _, values in self.latency.tables:
            digest.update(f"{at} {values.tolist()}".encode())
        return digest.hexdigest()

    def objective(self, loss: Tensor, latency_ms: Tensor) -> Tensor:
        """Nats; inside the budget latency counts for nothing."""
        excess = (latency_ms / self.budget_ms - 1).clamp(min=0)
        return loss + WEIGHT * excess.to(loss)


@dataclass(frozen=True)
class Turn:
    """What a method is given for one step of the weights or of the distribution."""

    net: ChoiceNetwork
    policy: Policy
    space: SearchSpace
    goal: Goal
    images: Tensor  # normalised
    loss: Callable[[Tensor], Tensor]  # of logits
    progress: float  # of the search, 0 to 1
    generator: torch.Generator  # of this step

    def move(self, gradient: Tensor, decays: tuple[float, float] = (0.9, 0.999)) -> None:
        self.policy.step(gradient, RATE, decays)


class Method(Protocol):
    """A file of this folder."""

    def weights(self, turn: Turn) -> Tensor:
        """Adds the gradient of a loss to the weights' and returns the loss."""

    def architecture(self, turn: Turn) -> None:
        """Moves the distribution; the weights' gradients may be anything afterwards."""


@dataclass(frozen=True)
class Learned(Step):
    """A step, and where the distribution is."""

    latency_ms: float = 0.0  # expected, upper end
    entropy: float = 1.0


class Searched(nn.Module):
    """A supernet and the distribution over its networks."""

    def __init__(self, net: nn.Module, space: SearchSpace) -> None:
        super().__init__()
        if not isinstance(net, ChoiceNetwork):
            raise NasctlError(
                "this space chooses sizes, and a distribution is learned over operators",
                where="--space",
                allowed="fbnet, nasbench201, or one whose supernet takes a blend",
            )
        self.space, self.net, self.policy = space, net, Policy(space.sizes)


def learn(
    searched: Searched,
    course: Course,
    *,
    method: Method,
    goal: Goal,
    resume: Path | None = None,
    save_every_s: float = 20.0,
) -> Generator[Learned, None, None]:
    """Train both in place, yielding after each of the recipe's steps, which are of the weights.

    `resume`, `save_every_s` and what closing does are as in `nas.supernet.train`. Raises
    NasctlError where the loss is not finite, or the state is of another search.
    """
    task, recipe = course.task, course.recipe
    optimiser = update.sgd(searched.net, recipe.lr, recipe.momentum, recipe.weight_decay)
    said = f"{recipe} {task.fingerprint} {method.architecture.__module__} {goal.fingerprint}"
    course = course.on(device_of(searched.net))
    searched.net.train()

    def step(done: int) -> Learned:
        loss = _weights(searched, _turn(searched, goal, course, done, 0), method)
        if not torch.isfinite(loss):
            raise NasctlError(
                f"training diverged at step {done + 1}: the loss is not finite",
                where="--lr",
                next=f"Try --lr {recipe.lr / 3:.2g}.",
            )
        update.step(searched.net, optimiser, recipe.lr_at(done), recipe.clip_norm)
        if done >= WARM * recipe.steps and done % EVERY == 0:
            method.architecture(_turn(searched, goal, course, done, 1))
            optimiser.zero_grad(set_to_none=True)
        latency = float(goal.latency.expected(searched.policy.probs))
        entropy = searched.policy.entropy()
        return Learned(done + 1, recipe.steps, (float(loss),), 0, latency, entropy)

    state = resumable.Weights(resume, searched, optimiser, said)
    yield from resumable.train(step, state, recipe.steps, save_every_s)


def parts(n: int) -> tuple[range, range]:
    """Of `n` training images those for the weights and those for the distribution."""
    cut = round(SHARE * n)
    return range(cut), range(cut, n)


def _turn(searched: Searched, goal: Goal, course: Course, step: int, part: int) -> Turn:
    """`part` 0 is the weights', 1 the distribution's."""
    recipe, among = course.recipe, parts(len(course.task.train))[part]
    batch: Batch = batches(course, step, device_of(searched.net), among)[0]
    return Turn(
        searched.net,
        searched.policy,
        searched.space,
        goal,
        batch.images,
        lambda logits: course.task.loss(logits.float(), batch.labels),
        step / recipe.steps,
        torch.Generator().manual_seed((recipe.seed * 1_000_003 + step) * 2 + part),
    )


def _weights(searched: Searched, turn: Turn, method: Method) -> Tensor:
    searched.net.zero_grad(set_to_none=True)
    return method.weights(turn).detach()


def path_weights(turn: Turn) -> Tensor:
    """One network of the distribution and no other: the weights of the rest have no gradient, so
    neither decay nor momentum moves them (ProxylessNAS)."""
    arch = turn.space.decode(turn.policy.draw(turn.generator))
    loss = turn.loss(turn.net(turn.images, arch))
    loss.backward()
    return loss
