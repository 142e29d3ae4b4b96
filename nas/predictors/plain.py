"""Plain: the sum of W dL/dW, SNIP without the absolute value (arXiv 2101.08134).

Mostly cancels, so it is the noisiest of the gradient proxies; negative on NAS-Bench-201.
"""

from __future__ import annotations

from torch import nn

from nas.passes import Batch, Passes, alone, gradients


def value(seen: Passes) -> float:
    return sum((w * g).sum().item() for w, g in seen.read(gradients).weights)


def score(net: nn.Module, batch: Batch) -> float:
    return alone(value, net, batch)
