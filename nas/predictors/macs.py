"""Multiply-adds of one sample, as torch counts them: the other baseline."""

from __future__ import annotations

from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from nas.passes import Batch, Passes, alone


def value(seen: Passes) -> float:
    return seen.read(counted)


def counted(seen: Passes) -> float:
    one = seen.batch.inputs[:1].to(seen.device)
    with FlopCounterMode(display=False) as counter:
        seen.run(one, training=False)
    return counter.get_total_flops() / 2


def score(net: nn.Module, batch: Batch) -> float:
    return alone(value, net, batch)
