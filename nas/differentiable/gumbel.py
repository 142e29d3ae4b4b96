"""FBNet (Wu et al., arXiv 1812.03443): the supernet's layers are mixtures of all their operators.

Each layer's output is the sum of its candidates' outputs, weighted by a Gumbel-softmax sample of
its distribution, whose temperature falls from 5 to 5 exp(-4.05) as published (0.045 per epoch for
90 epochs). One sample serves a whole batch. All candidates are in memory at once.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from nas.choice import Blend, Candidate
from nas.differentiable.learning import Turn
from nas.differentiable.proposals import propose

__all__ = ["architecture", "propose", "weights"]

HOT, COOLING = 5.0, 4.05


def temperature(progress: float) -> float:
    """At a share of the search, 0 to 1."""
    return HOT * math.exp(-COOLING * progress)


def sample(logits: Tensor, tau: float, generator: torch.Generator) -> Tensor:
    """Gumbel-softmax weights [G, K], differentiable in the logits (arXiv 1611.01144)."""
    uniform = torch.rand(logits.shape, generator=generator, dtype=logits.dtype)
    gumbel = -torch.log(-torch.log(uniform.clamp(1e-12, 1 - 1e-12)))
    return ((logits + gumbel) / tau).softmax(1)


def mixture(weight: Tensor) -> Blend:
    """Every decision as the weighted sum of all its candidates; `weight` [G, K]."""

    def blend(gene: int, x: Tensor, candidates: Sequence[Candidate]) -> Tensor:
        share = weight[gene].to(x)
        total = share[0] * candidates[0](x)
        for at, candidate in enumerate(candidates[1:], 1):
            total = total + share[at] * candidate(x)
        return total

    return blend


def weights(turn: Turn) -> Tensor:
    """On a sampled mixture that is held fixed."""
    mixed = sample(turn.policy.logits, temperature(turn.progress), turn.generator)
    loss = turn.loss(turn.net(turn.images, blend=mixture(mixed)))
    loss.backward()
    return loss


def architecture(turn: Turn) -> None:
    """Through the mixture into the logits; latency's gradient through the same weights."""
    logits = turn.policy.logits.clone().requires_grad_()
    mixed = sample(logits, temperature(turn.progress), turn.generator)
    loss = turn.loss(turn.net(turn.images, blend=mixture(mixed)))
    total = turn.goal.objective(loss, turn.goal.latency.expected(mixed))
    (gradient,) = torch.autograd.grad(total, logits)
    turn.move(gradient)
