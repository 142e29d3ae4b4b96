"""Condition of the neural tangent kernel: how evenly a network can be trained (TE-NAS, Chen et al.,
arXiv 2102.11535).

Minus the logarithm of largest / smallest eigenvalue of the Gram matrix of the samples' gradients of
their summed logits to all weights, so that higher is better. One backward pass per sample: the
first SAMPLES of the batch only.
"""

from __future__ import annotations

import math

import torch
from torch import nn

from nas.passes import Batch, Missing, Passes, alone, forward, gradient

SAMPLES = 8


def value(seen: Passes) -> float:
    seen.read(forward)  # which says if it is dead
    x = seen.batch.inputs[:SAMPLES].to(seen.device)
    if len(x) < 2:
        raise Missing("a batch of one has no condition")
    logits = seen.run(x)
    rows = [torch.cat([g.flatten() for g in gradient(y.sum(), seen.weights)]) for y in logits]
    j = torch.stack(rows).double()
    spectrum = torch.linalg.eigvalsh(j @ j.T)
    least, most = float(spectrum[0]), float(spectrum[-1])
    if least <= 1e-14 * most:
        raise Missing("singular: two samples have dependent gradients")
    return -math.log(most / least)


def score(net: nn.Module, batch: Batch) -> float:
    return alone(value, net, batch)
