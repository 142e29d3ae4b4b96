"""Gradient norm: the sum over layers of |dL/dW| (Abdelfattah et al., arXiv 2101.08134).

A sum of norms, not the norm of all: many layers count as many.
"""

from __future__ import annotations

from torch import nn

from nas.passes import Batch, Passes, alone, gradients


def value(seen: Passes) -> float:
    return sum(g.norm().item() for _, g in seen.read(gradients).weights)


def score(net: nn.Module, batch: Batch) -> float:
    return alone(value, net, batch)
