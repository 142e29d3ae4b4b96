"""SynFlow: the log of sum |W dR/dW|, with R the summed output for an input of ones and every
parameter replaced by its absolute value (Tanaka et al., arXiv 2006.05467).

Needs no data. Without norms, in double precision and as a logarithm: with batch norms the score
collapses, and sums over paths pass the largest float32 in networks as small as NAS-Bench-201's.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from nas.passes import Batch, Missing, Passes, alone, gradient
from nas.record import NORMS


class WithoutNorms(TorchFunctionMode):
    """Every norm gives what it gets."""

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        if getattr(func, "__name__", "") in NORMS:
            return args[0]
        return func(*args, **(kwargs or {}))


def value(seen: Passes) -> float:
    inputs = seen.batch.inputs
    if not inputs.is_floating_point():
        raise Missing("the input is not continuous")
    parameters = {
        name: p.detach().abs().double().requires_grad_() if p.is_floating_point() else p
        for name, p in seen.parameters.items()
    }
    ones = torch.ones(1, *inputs.shape[1:], dtype=torch.float64, device=seen.device)
    with WithoutNorms():
        flow = seen.run(ones, parameters, training=False).sum()
    weights = [parameters[name] for name in seen.matrices]
    found = sum(
        (w * g).abs().sum().item() for w, g in zip(weights, gradient(flow, weights), strict=True)
    )
    if found == 0:
        raise Missing("dead: nothing flows from the input to the output")
    return math.log(found) if math.isfinite(found) else found


def score(net: nn.Module, batch: Batch) -> float:
    return alone(value, net, batch)
