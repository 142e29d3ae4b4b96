"""A backbone of many resolutions and many paths that tasks mask, FBNetV5-style (arXiv 2111.10007).

Four paths hold maps at strides 4, 8, 16 and 32 (on images below 96 px at half of these, below 24 px
at a quarter). A stem and strided convolutions fill them; then SWEEPS stages pass over all paths in
turn: from fine to coarse, from coarse to fine, and so on. Where a sweep comes to a path it may fuse
the neighbour that it comes from into it, and may run a block, an inverted residual. Both are gates:
an architecture keeps or skips each, and nothing else. Sweeps down alone are a plain pyramid (a
ResNet-like chain), one down and one up a U-Net or FPN, all of them an HRNet-like trunk.

Heads attach outside (`nas.heads`) and read all four paths, so that every gate that is kept is on a
route to the answer and any mask is a valid network. `heads` name one or more tasks; `only(task)` is
the space of the same genes with the head of one: what that task's network has and costs; `only` of
several is that of a network that answers them all. By default a class alone, as in every space.

The authors' space is known here by its idea only; blocks, widths, gates and heads are ours.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

import torch.nn.functional as F
from torch import Tensor, nn

from hw_profiles.op import Op, Tape, Wire
from nas import heads
from nas.elastic import (
    BatchNorm2d,
    Conv2d,
    DepthwiseConv2d,
    Middle,
    Network,
    Noise,
    Residual,
    round_to,
)
from nas.errors import NasctlError, unknown
from nas.heads import Answer, Maps
from nas.space import Gene, Genes, SearchSpace

WIDTHS = (24, 32, 64, 128)  # of the paths, from fine to coarse
PATHS, SWEEPS = len(WIDTHS), 4
EXPAND = 3
SMALL, TINY = 96, 24  # pixels below which the stem strides once, and not at all
TABLE = 32  # pixels from which on the default width is 1; 1/2 below

Strides = tuple[int, ...]


class Gate(NamedTuple):
    """A decision: to run a part or not."""

    sweep: int
    path: int
    part: str  # fuse or block

    @property
    def name(self) -> str:
        return f"sweep{self.sweep}.path{self.path}.{self.part}"

    @property
    def source(self) -> int:
        """The path that a fusion reads: the one that the sweep comes from."""
        return self.path + (1 if self.sweep % 2 else -1)


def _gates() -> tuple[Gate, ...]:
    """In the order in which they run."""
    found = []
    for sweep in range(SWEEPS):
        for path in reversed(range(PATHS)) if sweep % 2 else range(PATHS):
            each = [Gate(sweep, path, "fuse"), Gate(sweep, path, "block")]
            found += each if 0 <= each[0].source < PATHS else each[1:]
    return tuple(found)


GATES = _gates()


@dataclass(frozen=True)
class Arch:
    resolution: int  # height of the images, pixels
    across: int  # their width
    widths: tuple[int, ...]  # of the paths
    kept: tuple[str, ...]  # names of the gates that run


class Space(SearchSpace):
    arch_type = Arch

    def __init__(
        self,
        *,
        channels: int = 3,
        classes: int = 10,
        size: int = 32,
        width: float | None = None,
        across: int | None = None,
        tasks: Mapping[str, Answer] | None = None,
    ) -> None:
        """For images of `size` x `across` pixels (square without `across`), each rounded up to what
        the coarsest path can halve evenly."""
        self.channels, self.classes = channels, classes
        self.scale = width or (1.0 if size >= TABLE else 0.5)
        self.strides = stem_strides(min(size, across or size))
        unit = multiple(min(size, across or size))
        self.resolution, self.across = (-(-side // unit) * unit for side in (size, across or size))
        self.widths = tuple(round_to(width * self.scale) for width in WIDTHS)
        coarsest = (self.resolution // unit, self.across // unit)
        self.maps = Maps(self.widths, coarsest, 2 ** self.strides.count(2))
        self.tasks = dict(tasks or {"class": Answer("vector", classes)})
        self.genes = tuple(Gene(gate.name, (0, 1)) for gate in GATES)
        self.slots = {"stem": (), **{g.name: (g.name,) for g in self.genes}, "heads": ()}

    def only(self, *tasks: str) -> Space:
        """The same backbones with the heads of these tasks."""
        for task in tasks:
            if task not in self.tasks:
                raise unknown("task", task, self.tasks, where="--tasks")
        found = copy.copy(self)
        for compiled in ("costs", "peak_elements"):  # of all heads
            vars(found).pop(compiled, None)
        found.tasks = {task: answer for task, answer in self.tasks.items() if task in tasks}
        return found

    def decode(self, genes: Genes) -> Arch:
        kept = tuple(gate.name for gate, keep in zip(GATES, genes, strict=True) if keep)
        return Arch(self.resolution, self.across, self.widths, kept)

    def ops(self, arch: Arch) -> list[Op]:
        tape = Tape(self.channels, arch.resolution, arch.across)
        tape.slot = "stem"
        x = tape.input
        for stride in self.strides:
            x = tape.conv(x, arch.widths[0], kernel=3, stride=stride, norm=True, act="relu")
        xs = [x]
        for width in arch.widths[1:]:
            xs.append(tape.conv(xs[-1], width, kernel=3, stride=2, norm=True, act="relu"))
        for gate in GATES:
            if gate.name in arch.kept:
                tape.slot = gate.name
                xs[gate.path] = _gate_ops(tape, xs, gate)
        tape.slot = "heads"
        for answer in self.tasks.values():
            heads.write(tape, xs, answer, self.maps, self.scale)
        return tape.ops

    def build(self, arch: Arch) -> FBNetV5:
        """Returns its one task's answer, or with several tasks their answers by name."""
        if arch.widths != self.widths:
            raise NasctlError(f"widths {arch.widths}", where="arch", allowed=str(self.widths))
        return FBNetV5(arch, self)


def stem_strides(side: int) -> Strides:
    """Of the stem's convolutions, for images whose shorter side has so many pixels."""
    return (1,) if side < TINY else (2,) if side < SMALL else (2, 2)


def multiple(side: int) -> int:
    """What height and width must be a multiple of: the stride of the coarsest path."""
    return int(2 ** (stem_strides(side).count(2) + PATHS - 1))


def _gate_ops(tape: Tape, xs: list[Wire], gate: Gate) -> Wire:
    x = xs[gate.path]
    if gate.part == "block":
        mid = x.c * EXPAND
        y = tape.conv(x, mid, norm=True, act="relu")
        y = tape.conv(y, mid, kernel=3, groups=mid, norm=True, act="relu")
        return tape.add(x, tape.conv(y, x.c, norm=True))
    y = xs[gate.source]
    if gate.source > gate.path:
        return tape.add(x, tape.upsample(tape.conv(y, x.c, norm=True), 2))
    y = tape.conv(y, y.c, kernel=3, stride=2, groups=y.c, norm=True, act="relu")
    return tape.add(x, tape.conv(y, x.c, norm=True))


# ---- the network ---------------------------------------------------------------------------------


class Block(Residual):
    """x + project(depthwise(expand(x))); what it adds is zero at initialisation."""

    def __init__(self, width: int) -> None:
        super().__init__()
        mid = width * EXPAND
        self.expand, self.expand_norm = Conv2d(width, mid), BatchNorm2d(mid)
        self.depthwise, self.depthwise_norm = DepthwiseConv2d(mid, 3), BatchNorm2d(mid)
        self.project, self.project_norm = Conv2d(mid, width), BatchNorm2d(width)
        nn.init.zeros_(self.project_norm.weight)

    def forward(self, x: Tensor, _: Tensor) -> Tensor:
        y = F.relu(self.expand_norm(self.expand(x)))
        y = F.relu(self.depthwise_norm(self.depthwise(y)))
        return self.project_norm(self.project(y))

    def middles(self) -> list[Middle]:
        tensors = [(self.expand.weight, 0), *self.expand_norm.per_channel()]
        tensors += [(self.depthwise.weight, 0), *self.depthwise_norm.per_channel()]
        return [Middle((*tensors, (self.project.weight, 1)), self.project.weight)]


class Down(nn.Module):
    """A finer neighbour in half its height and width."""

    def __init__(self, width: int, source: int) -> None:
        super().__init__()
        self.depthwise, self.depthwise_norm = DepthwiseConv2d(source, 3, 2), BatchNorm2d(source)
        self.project, self.norm = Conv2d(source, width), BatchNorm2d(width)
        nn.init.zeros_(self.norm.weight)

    def forward(self, _: Tensor, neighbour: Tensor) -> Tensor:
        y = F.relu(self.depthwise_norm(self.depthwise(neighbour)))
        return self.norm(self.project(y))


class Up(nn.Module):
    """A coarser neighbour in twice its height and width."""

    def __init__(self, width: int, source: int) -> None:
        super().__init__()
        self.project, self.norm = Conv2d(source, width), BatchNorm2d(width)
        nn.init.zeros_(self.norm.weight)

    def forward(self, _: Tensor, neighbour: Tensor) -> Tensor:
        return heads.grown(self.norm(self.project(neighbour)))


class FBNetV5(Network):
    """The gates that `arch` keeps, and the heads of the space's tasks."""

    def __init__(self, arch: Arch, space: Space) -> None:
        super().__init__()
        self.arch = arch
        widths = arch.widths
        before = (space.channels, widths[0])
        stem = [Conv2d(c, widths[0], 3, s) for c, s in zip(before, space.strides, strict=False)]
        stem += [Conv2d(c_in, c_out, 3, 2) for c_in, c_out in pairwise(widths)]
        self.stem = nn.ModuleList(stem)
        self.stem_norms = nn.ModuleList(BatchNorm2d(conv.out_channels) for conv in stem)
        kept = (gate for gate in GATES if gate.name in arch.kept)
        self.gates = nn.ModuleDict({_key(gate): _gate(gate, widths) for gate in kept})
        self.tasks = tuple(space.tasks)
        self.heads = nn.ModuleDict(  # `class` alone is no attribute that an exporter could write
            {
                f"of_{name}": heads.build(a, space.maps, space.scale)
                for name, a in space.tasks.items()
            }
        )

    def forward(
        self, x: Tensor, arch: Arch | None = None, noise: Noise | None = None
    ) -> Tensor | dict[str, Tensor]:
        xs = self.backbone(x, arch, noise)
        found = {name: self.heads[f"of_{name}"](xs, noise) for name in self.tasks}
        return found if len(found) > 1 else found[self.tasks[0]]

    def backbone(
        self, x: Tensor, arch: Arch | None = None, noise: Noise | None = None
    ) -> list[Tensor]:
        """The paths' maps, from fine to coarse."""
        kept, xs = frozenset((arch or self.arch).kept), list[Tensor]()
        for at, (conv, norm) in enumerate(zip(self.stem, self.stem_norms, strict=True)):
            x = F.relu(norm(conv(x)))
            if at >= len(self.stem) - PATHS:
                xs.append(x)
        for at, gate in enumerate(GATES):
            if gate.name not in kept:
                continue
            x = xs[gate.path]
            neighbour = xs[gate.source] if gate.part == "fuse" else x
            y = self.gates[_key(gate)](x, neighbour)
            xs[gate.path] = x + (noise.branch(y, (at + 1) / len(GATES)) if noise else y)
        return xs


def _key(gate: Gate) -> str:
    return gate.name.replace(".", "_")  # names of modules have no dots


def _gate(gate: Gate, widths: tuple[int, ...]) -> nn.Module:
    width = widths[gate.path]
    if gate.part == "block":
        return Block(width)
    return (Up if gate.source > gate.path else Down)(width, widths[gate.source])
