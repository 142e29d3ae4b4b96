"""AZ-NAS, expressivity: the entropy of the spectrum of each block's features, summed (Lee and Ham,
arXiv 2403.19232, section 3.2)."""

from __future__ import annotations

from torch import nn

from nas.passes import Batch, Passes, alone
from nas.predictors._az_nas import entropies


def value(seen: Passes) -> float:
    return sum(seen.read(entropies))


def score(net: nn.Module, batch: Batch) -> float:
    return alone(value, net, batch)
