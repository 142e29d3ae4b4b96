"""AZ-NAS, progressivity: the smallest gain of a block's expressivity over the block before (Lee and
Ham, arXiv 2403.19232, section 3.2)."""

from __future__ import annotations

from itertools import pairwise

from torch import nn

from nas.passes import Batch, Passes, alone
from nas.predictors._az_nas import entropies


def value(seen: Passes) -> float:
    return min(after - before for before, after in pairwise(seen.read(entropies)))


def score(net: nn.Module, batch: Batch) -> float:
    return alone(value, net, batch)
