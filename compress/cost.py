"""What pruning saves: multiply-adds, parameters or milliseconds of a network as it stands."""

from __future__ import annotations

import hashlib
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from compress.graph import Inputs, forward

SESSIONS = 3  # of a measurement that decides, or that units are compared by
DOUBT = 0.35  # by how much of the target one session may be wrong about a network


class Cost(Protocol):
    """One figure of a network, smaller is better. `many` is for costs that are better taken of
    several networks at once; the results are in their order. `confirmed` is what decides whether a
    target is met: taken anew, and as sure as it can be had."""

    @property
    def unit(self) -> str: ...

    def of(self, net: nn.Module, example_inputs: Inputs) -> float: ...

    def many(self, nets: Sequence[nn.Module], example_inputs: Inputs) -> list[float]: ...

    def confirmed(self, net: nn.Module, example_inputs: Inputs) -> float: ...


@dataclass(frozen=True)
class Macs:
    """Multiply-adds of one forward call on the example inputs: of convolutions and of every matrix
    product, those inside attention included; norms and activations count nothing."""

    unit: str = "MACs"

    def of(self, net: nn.Module, example_inputs: Inputs) -> float:
        counter = FlopCounterMode(display=False)
        with torch.no_grad(), counter:
            forward(net, example_inputs)
        return counter.get_total_flops() / 2

    def many(self, nets: Sequence[nn.Module], example_inputs: Inputs) -> list[float]:
        return [self.of(net, example_inputs) for net in nets]

    def confirmed(self, net: nn.Module, example_inputs: Inputs) -> float:
        return self.of(net, example_inputs)


@dataclass(frozen=True)
class Params:
    """Parameters, shared ones once."""

    unit: str = "params"

    def of(self, net: nn.Module, example_inputs: Inputs) -> float:
        return float(sum(parameter.numel() for parameter in net.parameters()))

    def many(self, nets: Sequence[nn.Module], example_inputs: Inputs) -> list[float]:
        return [self.of(net, example_inputs) for net in nets]

    def confirmed(self, net: nn.Module, example_inputs: Inputs) -> float:
        return self.of(net, example_inputs)


@dataclass(frozen=True)
class Latency:
    """Milliseconds of the exported file, by callables of whoever knows the target: `export(net)`
    writes a file and says where, `measure(files)` times them in turn with each other.

    Always taken in turn with the network `whole` and in its terms, which are `whole_ms`: sessions
    differ from each other by some per cent as a whole. Whoever goes on later must know that figure
    still. The shape of `whole` costs just that, untimed: a target that is a share of it is the same
    for every method and at every start.
    """

    export: Callable[[nn.Module], Path]
    measure: Callable[[Sequence[Path]], Sequence[float]]
    whole: nn.Module
    whole_ms: float
    unit: str = "ms"

    def of(self, net: nn.Module, example_inputs: Inputs) -> float:
        return self.many([net], example_inputs)[0]

    def many(self, nets: Sequence[nn.Module], example_inputs: Inputs) -> list[float]:
        whole = shape_of(self.whole)
        others = {at: net for at, net in enumerate(nets) if shape_of(net) != whole}
        found = [self.whole_ms] * len(nets)
        if others:
            now, *timed = self.measure([self.export(net) for net in (self.whole, *others.values())])
            for at, ms in zip(others, timed, strict=True):
                found[at] = self.whole_ms * float(ms) / now
        return found

    def confirmed(self, net: nn.Module, example_inputs: Inputs) -> float:
        """The median of several sessions. Of many networks that are each timed once, whichever its
        session flattered most would be taken for the widest inside the target."""
        return statistics.median(self.of(net, example_inputs) for _ in range(SESSIONS))


def against(cost: Cost, target: float, net: nn.Module, example_inputs: Inputs) -> float:
    """The cost of a network that may be too dear for the target, confirmed where one session could
    be wrong about that."""
    found = cost.of(net, example_inputs)
    if abs(found - target) > DOUBT * target:
        return found
    return cost.confirmed(net, example_inputs)


def sessions(cost: Cost, nets: Sequence[nn.Module], example_inputs: Inputs) -> list[list[float]]:
    """Costs of networks that are compared with each other, a list per session; one if it is
    counted. A latency is to be compared with others of the same session only."""
    times = SESSIONS if isinstance(cost, Latency) else 1
    return [cost.many(nets, example_inputs) for _ in range(times)]


def shape_of(net: nn.Module) -> str:
    """Names the widths of a network: two with the same name cost the same, whatever the weights."""
    shapes = "; ".join(f"{name} {list(p.shape)}" for name, p in net.state_dict().items())
    return hashlib.sha256(shapes.encode()).hexdigest()[:16]
