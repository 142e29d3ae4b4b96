"""GraSP: how the gradient's norm would change along each weight, -sum W (H g), with H the Hessian
and g the gradient of the loss (Wang et al., arXiv 2002.07376; summed as in arXiv 2101.08134).

The noisiest of all from seed to seed: average several seeds, or do not use it alone.
"""

from __future__ import annotations

import torch
from torch import nn

from nas.passes import Batch, Missing, Passes, alone, forward, gradient


def value(seen: Passes) -> float:
    weights = seen.weights
    slopes = gradient(seen.read(forward).loss, weights, differentiable=True)
    along = torch.stack([(g.detach() * g).sum() for g in slopes]).sum()
    if not along.requires_grad:
        raise Missing("the gradient does not depend on the weights")
    curved = gradient(along, weights)
    if not any(bool(h.any()) for h in curved):
        raise Missing("dead: no gradient reaches any weight")
    return -sum((w * h).sum().item() for w, h in zip(weights, curved, strict=True))


def score(net: nn.Module, batch: Batch) -> float:
    return alone(value, net, batch)
