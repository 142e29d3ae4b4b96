"""REINFORCE on sampled networks (ProxylessNAS, arXiv 1812.00332, section 3.3.2): no gradient of the
loss or of the latency is needed, only their values.

A step of the distribution judges a few networks on the same images. The estimate and its baseline
are those of `nas.mixture` for one task.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from nas import mixture
from nas.differentiable.learning import Turn, path_weights
from nas.differentiable.proposals import propose

__all__ = ["architecture", "propose", "weights"]

SAMPLES = 8  # networks per step; 10 as released

weights = path_weights


@torch.no_grad()
def architecture(turn: Turn) -> None:
    """The objective of whole networks, by the weights they share."""
    policy = turn.policy
    rows = np.stack([policy.draw(turn.generator) for _ in range(SAMPLES)])
    latency = torch.from_numpy(turn.goal.latency.of(rows))
    losses = torch.stack([turn.loss(turn.net(turn.images, turn.space.decode(row))) for row in rows])
    objective = turn.goal.objective(losses, latency).double().cpu().numpy()
    policies = mixture.Policies(policy.logits.numpy()[None])
    gradient: Tensor = torch.from_numpy(mixture.gradient(policies, rows, objective[:, None])[0])
    turn.move(gradient)
