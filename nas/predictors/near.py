"""NEAR: the effective rank of what enters and what leaves every activation, summed (Husistein et
al., arXiv 2408.08776, from its abstract).

Effective rank is the exponential of the entropy of the normalised singular values. Maps become
rows of channels, one per sample and place, of which as many as there are channels are drawn.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from nas.passes import Batch, Missing, Passes, alone, forward, places


def value(seen: Passes) -> float:
    activations = seen.read(forward).record.activations
    if not activations:
        raise Missing("no activation was seen")
    generator = seen.generator()
    found = 0.0
    for call in activations:
        rows = [places(t.detach()) for t in (call.entered, call.left)]
        chosen = torch.randperm(len(rows[0]), generator=generator)[: rows[0].shape[1]]
        found += sum(effective_rank(each[chosen.to(each.device)]) for each in rows)
    return found


def effective_rank(matrix: Tensor) -> float:
    """Of [N, C]; 0 for zeros."""
    values = torch.linalg.svdvals(matrix.double())
    share = values / values.sum()
    share = share[share > 0]
    return (-(share * share.log()).sum()).exp().item() if len(share) else 0.0


def score(net: nn.Module, batch: Batch) -> float:
    return alone(value, net, batch)
