"""ProxylessNAS (Cai et al., arXiv 1812.00332, section 3.2): binary gates, memory of one path.

A step of the distribution compares two candidates per decision, drawn from it. One of them, drawn
from their renormalised probabilities, runs and carries the gradient; what the loss would gain from
a gate g_k that opened another is dL/dg_k = <dL/dy, o_k(x)>, for which the other is run without a
graph while the backward pass goes by, one decision after another. With the pair's probabilities p,

    dL/d logit_i = sum_j dL/dg_j p_j ([i = j] - p_i)

and after the update both logits are shifted so that the pair's share of the probability stays.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from nas.choice import Candidate
from nas.differentiable.learning import Turn, path_weights
from nas.differentiable.proposals import propose

__all__ = ["architecture", "propose", "weights"]

COMPARED = 2  # candidates per decision
DECAYS = (0.0, 0.999)  # Adam's as released: decisions' other candidates must not move

weights = path_weights


class Gates:
    """A Blend that runs the active candidates and, on the way back, collects dL/dg of `compared`.

    `gradient` [G, K] is complete once the gradient has reached `first`, what the first decision
    read; it is 0 for candidates that are not compared.
    """

    def __init__(self, active: Tensor, compared: Tensor, options: int) -> None:
        self.active, self.compared = active.tolist(), compared.tolist()  # [G], [G, n]
        self.gradient = torch.zeros(len(active), options, dtype=torch.float64)
        self.first: Tensor | None = None

    def __call__(self, gene: int, x: Tensor, candidates: Sequence[Candidate]) -> Tensor:
        if self.first is None:
            self.first = x
        y = candidates[self.active[gene]](x)
        if y is x:  # an identity: a tensor of its own, whose hook is of this decision alone
            y = x.view_as(x)
        seen, active = x.detach(), y.detach()

        def collect(flowing: Tensor) -> None:
            for option in self.compared[gene]:
                with torch.no_grad():
                    said = active if option == self.active[gene] else candidates[option](seen)
                    self.gradient[gene, option] += float((flowing * said).sum())

        if y.requires_grad:
            y.register_hook(collect)
        return y


def through_softmax(gates: Tensor, probs: Tensor) -> Tensor:
    """dL/d logits from dL/dg [G, K] at probabilities [G, K]."""
    return probs * (gates - (gates * probs).sum(1, keepdim=True))


def compare(turn: Turn, compared: Tensor) -> Tensor:
    """The gradient [G, K] of the objective with respect to the logits of `compared` [G, n]."""
    inside = torch.zeros_like(turn.policy.logits, dtype=torch.bool).scatter_(1, compared, True)
    logits = turn.policy.logits.masked_fill(~inside, -torch.inf).requires_grad_()
    probs = logits.softmax(1)
    active = torch.multinomial(probs.detach(), 1, generator=turn.generator)[:, 0]
    gates = Gates(active, compared, logits.shape[1])
    loss = turn.loss(turn.net(turn.images, blend=gates))
    assert gates.first is not None
    torch.autograd.grad(loss, gates.first)
    total = turn.goal.objective(loss.detach(), turn.goal.latency.expected(probs))
    (of_latency,) = torch.autograd.grad(total, logits)
    return through_softmax(gates.gradient, probs.detach()) + torch.nan_to_num(of_latency)


def architecture(turn: Turn) -> None:
    """One comparison per decision."""
    policy = turn.policy
    compared = torch.multinomial(policy.probs, COMPARED, generator=turn.generator)
    before = policy.logits.gather(1, compared).logsumexp(1, keepdim=True)
    turn.move(compare(turn, compared), DECAYS)
    after = policy.logits.gather(1, compared)
    policy.logits.scatter_(1, compared, after + before - after.logsumexp(1, keepdim=True))
