"""AZ-NAS, complexity: multiply-adds (Lee and Ham, arXiv 2403.19232), counted once with `macs`."""

from __future__ import annotations

from torch import nn

from nas.passes import Batch, Passes, alone
from nas.predictors import macs


def value(seen: Passes) -> float:
    return macs.value(seen)


def score(net: nn.Module, batch: Batch) -> float:
    return alone(value, net, batch)
