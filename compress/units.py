"""Prunable units: sets of coupled channels, each tried on the network before it counts as one.

A dependency graph can be wrong: operations it does not know count as element-wise, and heads or
shuffles it does not see. So a unit is believed when the network without some of its channels runs,
gives outputs of the same shapes and, where no operator takes statistics over channels, the same
outputs as the whole network with those channels' weights at zero. Whatever fails is left alone, and
the reason is kept.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from compress.graph import (
    FAILS,
    LAYERS,
    MIXING,
    Divisions,
    Graph,
    Inputs,
    Member,
    divisions,
    forward,
    gives,
    is_depthwise,
    width,
)
from nas.outputs import tensors

#: relative: how far a pruned network may be from its masked original, in single and in double
ALIKE = (1e-4, 1e-9)


@dataclass(frozen=True)
class Unit:
    """Channels that go together, named by the layer that gives them."""

    root: str
    width: int  # output channels of `root`
    #: equal parts of them that lose the same places: heads, halves of a split, groups
    parts: int
    members: tuple[str, ...]  # names of all modules that change
    #: consecutive ones that go together: a head, where the code knows how wide a head is
    block: int = 1

    @property
    def places(self) -> int:
        """Of one part: what goes is chosen among them."""
        return self.width // self.parts // self.block


@dataclass(frozen=True)
class LeftAlone:
    """A layer whose outputs are not pruned, and why."""

    root: str
    reason: str


@dataclass(frozen=True)
class Found:
    units: tuple[Unit, ...]
    left_alone: tuple[LeftAlone, ...]


def find(net: nn.Module, example_inputs: Inputs) -> Found:
    """Every unit of the network, and every layer that is in none.

    Raises NasctlError where the network cannot be traced.
    """
    shared = _shared(net)
    net, inputs = _in_double(net, example_inputs)
    graph, divided = Graph(net, inputs), divisions(net, inputs)
    units: list[Unit] = []
    refused: dict[str, str] = {}
    done: set[str] = set()
    # the widest first: where halves of one layer go different ways, it knows of both
    for root in sorted(graph.layers(), key=lambda name: -width(net.get_submodule(name))):
        if root in done:
            continue
        members = graph.members(root)
        found = _unit(net, inputs, members, divided, shared)
        if isinstance(found, str):
            refused[root] = found
            continue
        units.append(found)
        done |= {m.name for m in members if not m.inputs}
    unreached = "the graph does not reach it from the outputs"
    if graph.severed:
        unreached += f": operation '{graph.severed}' passes no gradient"
    return Found(tuple(units), tuple(_left_alone(net, refused, done, unreached)))


def _left_alone(
    net: nn.Module, refused: dict[str, str], done: set[str], unreached: str
) -> Iterator[LeftAlone]:
    """In the network's order."""
    for name, module in net.named_modules():
        # the projections of attention go with it, whatever they are called
        if not isinstance(module, LAYERS) or {name, name.rpartition(".")[0]} & done:
            continue
        yield LeftAlone(name, refused.get(name, unreached))


def _unit(
    net: nn.Module,
    inputs: Inputs,
    members: Sequence[Member],
    divided: Divisions,
    shared: dict[str, str],
) -> Unit | str:
    """The unit of these members, the root first, or why there is none."""
    root = members[0].name
    for member in members:
        if member.name in shared:
            return f"{member.name} shares its weights with {shared[member.name]}"
        if _is_grouped_transposed(member.module):
            return f"{member.name} is a transposed convolution of several groups"
    total = width(net.get_submodule(root))
    reason = f"it has {total} channels only"
    names = tuple(dict.fromkeys(member.name for member in members))
    for parts, block in _layouts(members, total, divided):
        unit = Unit(root, total, parts, names, block)
        refusal = _refused(net, inputs, unit, divided.runs)
        if not refusal:
            return unit
        reason = refusal if parts * block == 1 or reason.startswith("it has") else reason
    return reason


def _is_grouped_transposed(module: nn.Module | nn.Parameter) -> bool:
    """Torch-Pruning counts the outputs of one group only."""
    if not isinstance(module, nn.modules.conv._ConvTransposeNd) or is_depthwise(module):
        return False
    return module.groups > 1


def _layouts(
    members: Sequence[Member], total: int, divided: Divisions
) -> Iterator[tuple[int, int]]:
    """In how many parts the channels may lie, and in blocks of how many: one by one first, fewest
    parts first."""
    for block in (1, *sorted(divided.runs)):
        for parts in _parts(members, divided.parts):
            if total % (parts * block) == 0 and total // (parts * block) > 1:
                yield parts, block


def _parts(members: Sequence[Member], divisions: Collection[int]) -> list[int]:
    least = 1
    for member in members:
        module = member.module
        if isinstance(module, nn.GroupNorm):
            least = math.lcm(least, module.num_groups)
        elif isinstance(module, nn.MultiheadAttention):
            least = math.lcm(least, module.num_heads)
        elif isinstance(module, nn.modules.conv._ConvNd) and not is_depthwise(module):
            least = math.lcm(least, module.groups)
    return sorted({least, *(math.lcm(least, n) for n in divisions)})


def places(unit: Unit, at: Sequence[int]) -> tuple[int, ...]:
    """Root channels of the same places `at` in every part."""
    firsts = (part * unit.places + place for part in range(unit.parts) for place in sorted(at))
    return tuple(first * unit.block + channel for first in firsts for channel in range(unit.block))


def _tried(unit: Unit, runs: Collection[int]) -> range:
    """Places to try without: a third or so, but never whole runs of channels by accident, without
    which code that takes any number of runs would work, and without others not."""
    wanted = max(1, round(0.3 * unit.places))
    for n in sorted(range(1, unit.places), key=lambda n: abs(n - wanted)):
        if all(n * unit.block % run for run in runs if run > unit.block):
            return range(n)
    return range(wanted)


def _refused(net: nn.Module, inputs: Inputs, unit: Unit, runs: Collection[int]) -> str:
    """Why these channels cannot go; nothing if they can. The first ones of each part are tried:
    what lies in more parts than `unit` knows would lose some of them wholly."""
    graph = Graph(copy.deepcopy(net), inputs)
    gone = places(unit, _tried(unit, runs))
    members = graph.members(unit.root, gone)
    if any(_beyond(member) for member in members):
        return "the graph has more of its channels than there are"
    if len(members[0].at) > len(gone):
        return "its channels are coupled with each other"
    with torch.no_grad():
        whole = tensors(forward(graph.net, inputs))
        with masked(graph.net, members):
            zeroed = tensors(forward(graph.net, inputs))
        try:
            graph.prune_(unit.root, gone)
            found = tensors(forward(graph.net, inputs))
        except FAILS as error:
            said = str(error).splitlines()[0] if str(error) else type(error).__name__
            return f"the network does not run without some of its channels ({said})"
    shapes, before = ([list(t.shape) for t in ts] for ts in (found, whole))
    for was, would in zip(before, shapes, strict=True):
        if was != would:
            return f"its channels are outputs of the network: {was} would become {would}"
    if any(isinstance(member.module, MIXING) for member in members):
        return ""
    if not all(map(_alike, found, zeroed)):
        return "an operation mixes its channels: without some is not the same as with zeros"
    return ""


def _in_double(net: nn.Module, inputs: Inputs) -> tuple[nn.Module, Inputs]:
    """In double precision what is not the same shows, however little it matters; in single where
    the network's code insists on it."""
    double = copy.deepcopy(net).eval().double()
    parts = inputs if isinstance(inputs, tuple) else (inputs,)
    cast = tuple(
        part.double() if isinstance(part, Tensor) and part.is_floating_point() else part
        for part in parts
    )
    try:
        with torch.no_grad():
            forward(double, cast)
    except FAILS:
        return copy.deepcopy(net).eval(), inputs
    return double, cast


def _beyond(member: Member) -> bool:
    module: Any = member.module
    if not isinstance(module, LAYERS):
        return False
    size = module.weight.shape[1 - gives(module) if member.inputs else gives(module)]
    groups = getattr(module, "groups", 1) if member.inputs != (gives(module) == 1) else 1
    return bool(member.at) and max(member.at) >= size * groups


def _alike(found: Tensor, masked: Tensor) -> bool:
    if not masked.is_floating_point() or not masked.isfinite().all():
        return True  # classes may flip by rounding; nan says nothing
    scale = masked.abs().max().item() + 1e-6
    return (found - masked).abs().max().item() <= ALIKE[masked.dtype == torch.float64] * scale


@contextmanager
def masked(net: nn.Module, members: Sequence[Member]) -> Iterator[None]:
    """Inside, the members' weights are zero where a pruned network has none."""
    layers = {m.name: m.module for m in members if isinstance(m.module, LAYERS)}
    before = {name: copy.deepcopy(module.state_dict()) for name, module in layers.items()}
    for member in members:
        if member.name not in layers:
            continue
        module: Any = net.get_submodule(member.name)
        at = torch.as_tensor(list(member.at), device=module.weight.device)
        if not member.inputs:
            module.weight.data.index_fill_(gives(module), at, 0)
            if module.bias is not None:
                module.bias.data[at] = 0
        elif getattr(module, "groups", 1) == 1:
            module.weight.data.index_fill_(1 - gives(module), at, 0)
        else:
            _zero_grouped_inputs(module, at)
    try:
        yield
    finally:
        for name, state in before.items():
            net.get_submodule(name).load_state_dict(state)


def _zero_grouped_inputs(module: Any, at: Tensor) -> None:
    weight = module.weight.data
    if gives(module) == 1:  # transposed: one row per input channel, whatever the groups
        weight[at] = 0
        return
    inputs, outputs = weight.shape[1], weight.shape[0] // module.groups
    for channel in at.tolist():  # the channel of this place in that group of inputs
        group, place = divmod(channel, inputs)
        weight[group * outputs : (group + 1) * outputs, place] = 0


def _shared(net: nn.Module) -> dict[str, str]:
    """Modules that hold a parameter which another module holds too, and that other one."""
    holders: dict[int, list[str]] = {}
    for name, module in net.named_modules():
        for parameter in module.parameters(recurse=False):
            holders.setdefault(id(parameter), []).append(name)
    return {
        name: next(other for other in names if other != name)
        for names in holders.values()
        if len(set(names)) > 1
        for name in names
    }
