"""Which widths a unit may be pruned to, and which of its channels go first."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from compress.cost import Latency, sessions
from compress.graph import LAYERS, Member, gives
from compress.history import History, Step
from compress.job import Job, Settings
from compress.record import Record
from compress.units import Unit, places


def rounded(each: int, ratio: float, divisor: int) -> int:
    """Channels kept of `each` in one part: the multiple of `divisor` nearest to what the ratio
    leaves, at least one of them; parts narrower than the divisor stay whole."""
    if each < divisor:
        return each
    nearest = math.floor((1 - ratio) * each / divisor + 0.5) * divisor
    return min(each, max(divisor, nearest))


def offered(unit: Unit, settings: Settings) -> tuple[int, ...]:
    """Widths of all parts together that the grid's ratios come to, widest first, each once."""
    found = (kept(unit, ratio, settings.divisor) for ratio in settings.grid)
    return tuple(sorted({width for width in found if width < unit.width}, reverse=True))


def every(unit: Unit, settings: Settings) -> tuple[int, ...]:
    """All widths that a unit may be pruned to, widest first, down to the grid's last ratio."""
    block = settings.divisor // math.gcd(settings.divisor, unit.block)
    least = kept(unit, settings.grid[-1], settings.divisor)
    found = (unit.parts * unit.block * places for places in range(block, unit.places, block))
    return tuple(sorted((width for width in found if width >= least), reverse=True))


def kept(unit: Unit, ratio: float, divisor: int) -> int:
    """The width of all parts together that a ratio comes to: in each a multiple of the divisor,
    of whole blocks."""
    blocks = divisor // math.gcd(divisor, unit.block)
    return unit.parts * unit.block * rounded(unit.places, ratio, blocks)


def magnitude(members: Sequence[Member], total: int) -> Tensor:
    """[total]: mean over the layers that give a root's channel of the mean absolute weight that
    gives it (PAGCP's group L1)."""
    sums, counts = torch.zeros(total), torch.zeros(total)
    for member in members:
        module = member.module
        if member.inputs or not isinstance(module, LAYERS):
            continue
        weight = module.weight.detach().float().cpu().transpose(0, gives(module))
        norms = weight.flatten(1).abs().mean(1)
        roots = torch.as_tensor(list(member.roots))
        sums.index_add_(0, roots, norms[torch.as_tensor(list(member.at))])
        counts.index_add_(0, roots, torch.ones(len(roots)))
    return sums / counts.clamp(min=1)


def by_place(scores: Tensor, unit: Unit) -> Tensor:
    """[places of a part]: the mean over the parts of the scores [width] of channels."""
    return scores.detach().float().cpu().view(unit.parts, unit.places, unit.block).mean((0, 2))


def weakest_first(worth: Tensor) -> list[int]:
    """Places in the order they go; equal ones by number."""
    return worth.argsort(stable=True).tolist()


def step(unit: Unit, order: Sequence[int], kept: int) -> Step:
    """Prune the unit to width `kept`, the first of `order` going in every part."""
    return Step(unit.root, places(unit, order[: gone(unit, kept)]))


def gone(unit: Unit, kept: int) -> int:
    """Places that a part of the unit has less at a width of all of it."""
    return (unit.width - kept) // unit.parts // unit.block


def alone(job: Job, unit: Unit, widths: Sequence[int], known: Record) -> list[list[float]]:
    """What pruning this unit alone to each width saves, a list per session (`cost.sessions`)."""

    def taken() -> list[list[float]]:
        anyhow = range(unit.places)  # which channels go is all the same to the cost
        steps = [step(unit, anyhow, kept) for kept in (unit.width, *widths)]
        nets = [History((one,)).replay(job.net, job.example_inputs) for one in steps]
        taken = sessions(job.cost, nets, job.example_inputs)
        return [[full - cost for cost in costs] for full, *costs in taken]

    key = f"{job.cost.unit} saved by {unit.root} alone at {list(widths)}, by session"
    return known.of(key, taken)


@dataclass(frozen=True)
class Stairs:
    """Widths that a unit may be pruned to, widest first, and what pruning it alone saves.

    Where milliseconds are measured, no width is here that is as slow as a wider one: a kernel that
    pads or falls back makes such widths a loss for nothing.
    """

    savings: Mapping[int, float]  # of the cost, by width
    gain: float  # at the probe ratio: what units are ordered by

    @property
    def widths(self) -> tuple[int, ...]:
        return tuple(self.savings)


def stairs(job: Job, unit: Unit, settings: Settings, known: Record) -> Stairs:
    """Raises nothing: a unit too narrow for the divisor has no widths."""
    widths = offered(unit, settings)
    if not widths:
        return Stairs({}, 0.0)
    probe = min(widths, key=lambda width: abs(width - (1 - settings.probe) * unit.width))
    if not isinstance(job.cost, Latency):  # counted: grows with the width
        ((probed,),) = alone(job, unit, (probe,), known)
        each = probed / (unit.width - probe)  # other widths: near enough to compare units
        return Stairs({width: each * (unit.width - width) for width in widths}, probed)
    found = alone(job, unit, widths, known)
    probed = statistics.median(saved[widths.index(probe)] for saved in found)
    return Stairs(rising(widths, found), probed)


def rising(widths: Sequence[int], found: Sequence[Sequence[float]]) -> dict[int, float]:
    """Of widths from the widest on, those that save more than the full one and all wider ones, by
    the median of the sessions.

    A unit often saves less than sessions differ by: what one alone thinks faster is chance, and
    pruning would begin with layers that cost nothing.
    """
    kept: dict[int, float] = {}
    most = 0.0
    for width, saved in zip(widths, map(statistics.median, zip(*found, strict=True)), strict=True):
        if saved > most:
            kept[width] = most = saved
    return kept
