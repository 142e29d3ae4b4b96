"""Jacobian covariance: how differently the network responds to different samples (Mellor et al.,
arXiv 2006.04647, first version).

From the eigenvalues v of the correlations between samples of the gradient of the summed logits to
the input: -sum(log(v + k) + 1 / (v + k)). About -B, its largest value, if all are uncorrelated.
"""

from __future__ import annotations

import torch
from torch import nn

from nas.passes import Batch, Passes, alone, correlation, jacobian

K = 1e-5


def value(seen: Passes) -> float:
    v = torch.linalg.eigvalsh(correlation(seen.read(jacobian))).clamp(min=0) + K
    return -(v.log() + 1 / v).sum().item()


def score(net: nn.Module, batch: Batch) -> float:
    return alone(value, net, batch)
