"""The sum over layers of |W| at initialisation: a baseline that knows no data and no wiring
(NAS-Bench-Suite-Zero, arXiv 2210.03230)."""

from __future__ import annotations

from torch import nn

from nas.passes import Batch, Missing, Passes, alone, forward


def value(seen: Passes) -> float:
    if not seen.weights:
        raise Missing("no weights")
    seen.read(forward)  # a dead network's weights mean nothing
    return sum(w.norm().item() for w in seen.weights)


def score(net: nn.Module, batch: Batch) -> float:
    return alone(value, net, batch)
