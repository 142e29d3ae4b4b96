"""SNIP: the sum of |W dL/dW|, how much the loss feels each weight (Lee et al., arXiv 1810.02340).

Equal to the absolute gradient of a mask of ones on the weights.
"""

from __future__ import annotations

from torch import nn

from nas.passes import Batch, Passes, alone, gradients


def value(seen: Passes) -> float:
    return sum((w * g).abs().sum().item() for w, g in seen.read(gradients).weights)


def score(net: nn.Module, batch: Batch) -> float:
    return alone(value, net, batch)
