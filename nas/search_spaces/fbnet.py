"""FBNet: 22 layers of nine operators, 9^22 networks (Wu et al., arXiv 1812.03443, tables 1 and 2).

A stem, seven stages and a 1x1 convolution; every layer of a stage is an inverted residual with a
kernel of 3 or 5, an expansion of 1, 3 or 6 and 1x1 convolutions in one or two groups (two: with a
channel shuffle between), or is skipped: an identity, or where shapes change a 1x1 convolution. A
choice space: its supernet holds all nine, a stand-alone network the one that each layer names.

Below 96 px strides and the last width are those that HW-NAS-Bench (arXiv 2103.10584) uses for
CIFAR; `op_index` and `from_indices` translate to its numbering. `width` scales all channels: by
default 1, or 1/2 below the 32 px of that table. Genes count a layer's operators by MACs from the
fewest up, so that the last is the largest network's: where shapes change a skip is a convolution,
which may have more than a small block.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import numpy as np
import torch.nn.functional as F
from torch import Tensor, nn

from hw_profiles.op import Op, Tape, Wire, macs, params
from nas.choice import Blend, Candidate, ChoiceNetwork
from nas.elastic import (
    BatchNorm2d,
    Conv2d,
    DepthwiseConv2d,
    Linear,
    Middle,
    Noise,
    Residual,
    round_to,
)
from nas.errors import NasctlError
from nas.space import Gene, Genes, SearchSpace


class Stage(NamedTuple):
    width: int
    layers: int
    stride: int
    small_stride: int  # for images below 96 px


STEM = 16
STAGES = (
    Stage(16, 1, 1, 1),
    Stage(24, 4, 2, 1),
    Stage(32, 4, 2, 2),
    Stage(64, 4, 2, 2),
    Stage(112, 4, 1, 1),
    Stage(184, 4, 2, 2),
    Stage(352, 1, 1, 1),
)
LAST, SMALL_LAST = 1984, 1504
SMALL = 96  # pixels below which the CIFAR table holds
TABLE = 32  # pixels that it was made for


class Kind(NamedTuple):
    kernel: int
    expand: int
    groups: int = 1  # of both 1x1 convolutions


SKIP = "skip"
#: in the numbering of HW-NAS-Bench; skip is its number 8
KINDS: Mapping[str, Kind] = {
    "k3_e1": Kind(3, 1),
    "k3_e1_g2": Kind(3, 1, 2),
    "k3_e3": Kind(3, 3),
    "k3_e6": Kind(3, 6),
    "k5_e1": Kind(5, 1),
    "k5_e1_g2": Kind(5, 1, 2),
    "k5_e3": Kind(5, 3),
    "k5_e6": Kind(5, 6),
}
OPS = (*KINDS, SKIP)


@dataclass(frozen=True)
class Arch:
    resolution: int
    stem: int  # width
    ops: tuple[str, ...]  # of each layer, names of OPS
    widths: tuple[int, ...]  # of each layer
    last: int  # width


class Place(NamedTuple):
    """What a layer's operator is built for."""

    c_in: int
    c_out: int
    stride: int

    @property
    def keeps_shape(self) -> bool:
        return self.stride == 1 and self.c_in == self.c_out


class Space(SearchSpace):
    arch_type = Arch

    def __init__(
        self, *, channels: int = 3, classes: int = 10, size: int = 32, width: float | None = None
    ) -> None:
        self.channels, self.classes, self.resolution = channels, classes, size
        self.small, scale = size < SMALL, width or (1.0 if size >= TABLE else 0.5)
        self.stem = round_to(STEM * scale)
        self.widths = tuple(round_to(s.width * scale) for s in STAGES for _ in range(s.layers))
        self.last = round_to((SMALL_LAST if self.small else LAST) * scale)
        places = _places(self.stem, self.widths, self.small)
        #: per layer its operators in the order of the gene's options
        self.order = tuple(_ascending(place) for place in places)
        self.genes = tuple(
            Gene(f"layer{at}.op", tuple(range(len(OPS)))) for at in range(len(places))
        )
        layers = {f"layer{at}": (f"layer{at}.op",) for at in range(len(places))}
        self.slots = {"stem": (), **layers, "last": ()}

    def decode(self, genes: Genes) -> Arch:
        names = tuple(order[int(gene)] for order, gene in zip(self.order, genes, strict=True))
        return Arch(self.resolution, self.stem, names, self.widths, self.last)

    def ops(self, arch: Arch) -> list[Op]:
        tape = Tape(self.channels, arch.resolution)
        tape.slot = "stem"
        stride = 1 if self.small else 2
        x = tape.conv(tape.input, arch.stem, kernel=3, stride=stride, norm=True, act="relu")
        places = _places(arch.stem, arch.widths, self.small)
        for at, (name, place) in enumerate(zip(arch.ops, places, strict=True)):
            tape.slot = f"layer{at}"
            x = _layer_ops(tape, x, name, place)
        tape.slot = "last"
        x = tape.gap(tape.conv(x, arch.last, norm=True, act="relu"))
        tape.linear(x, self.classes)
        return tape.ops

    def build(self, arch: Arch) -> FBNet:
        held = [(name,) for name in arch.ops]
        return FBNet(arch, held, self.channels, self.classes, small=self.small)

    def supernet(self) -> FBNet:
        arch = self.decode(self.largest)
        return FBNet(arch, self.order, self.channels, self.classes, small=self.small)

    def from_names(self, names: Sequence[str]) -> Genes:
        """Genes [22] of a network's operators by name; raises NasctlError if it is none."""
        if len(names) != len(self.genes) or not set(names) <= set(OPS):
            raise NasctlError(
                f"no FBNet: {', '.join(names)[:80]}",
                allowed=f"{len(self.genes)} names of {', '.join(OPS)}",
            )
        at = [order.index(name) for order, name in zip(self.order, names, strict=True)]
        return np.array(at, np.int64)

    def from_indices(self, indices: Sequence[int]) -> Genes:
        """Genes [22] of operators in the numbering of HW-NAS-Bench, 0 to 8."""
        return self.from_names([OPS[index] for index in indices])

    def op_index(self, genes: Genes) -> list[int]:
        """The inverse of `from_indices`, of one row."""
        return [OPS.index(name) for name in self.decode(genes).ops]


def _places(stem: int, widths: Sequence[int], small: bool) -> list[Place]:
    strides = [
        (stage.small_stride if small else stage.stride) if layer == 0 else 1
        for stage in STAGES
        for layer in range(stage.layers)
    ]
    before = (stem, *widths[:-1])
    return [Place(*each) for each in zip(before, widths, strides, strict=True)]


def _ascending(place: Place) -> tuple[str, ...]:
    """The operators by MACs, then parameters, of a layer that reads an 8 x 8 map."""

    def cost(name: str) -> tuple[int, int]:
        tape = Tape(place.c_in, 8)
        _layer_ops(tape, tape.input, name, place)
        return macs(tape.ops), params(tape.ops)

    return tuple(sorted(OPS, key=cost))


def _layer_ops(tape: Tape, x: Wire, name: str, place: Place) -> Wire:
    if name == SKIP:
        if place.keeps_shape:
            return x
        return tape.conv(x, place.c_out, stride=place.stride, norm=True, act="relu")
    kernel, expand, groups = KINDS[name]
    mid = x.c * expand
    y = tape.conv(x, mid, groups=groups, norm=True, act="relu")
    if groups > 1:
        y = tape.concat(y)  # a shuffle moves what a concatenation of one tensor moves
    y = tape.conv(y, mid, kernel=kernel, stride=place.stride, groups=mid, norm=True, act="relu")
    y = tape.conv(y, place.c_out, groups=groups, norm=True)
    return tape.add(x, y) if place.keeps_shape else y


# ---- the network ---------------------------------------------------------------------------------


class Block(Residual):
    """project(depthwise(expand(x))), plus x where the shape stays; linear at the end."""

    def __init__(self, kind: Kind, place: Place) -> None:
        super().__init__()
        mid = place.c_in * kind.expand
        self.groups, self.adds = kind.groups, place.keeps_shape
        self.expand = _pointwise(place.c_in, mid, kind.groups)
        self.expand_norm = BatchNorm2d(mid)
        self.depthwise = DepthwiseConv2d(mid, kind.kernel, place.stride)
        self.depthwise_norm = BatchNorm2d(mid)
        self.project = _pointwise(mid, place.c_out, kind.groups)
        self.project_norm = BatchNorm2d(place.c_out)

    def forward(self, x: Tensor, noise: Noise | None = None, depth: float = 0.0) -> Tensor:
        y = F.relu(self.expand_norm(self.expand(x)))
        if self.groups > 1:
            y = _shuffled(y, self.groups)
        y = F.relu(self.depthwise_norm(self.depthwise(y)))
        y = self.project_norm(self.project(y))
        if not self.adds:
            return y
        return x + (noise.branch(y, depth) if noise else y)

    def middles(self) -> list[Middle]:
        if self.groups > 1:  # a channel's place says which group reads it
            return []
        tensors = [(self.expand.weight, 0), *self.expand_norm.per_channel()]
        tensors += [(self.depthwise.weight, 0), *self.depthwise_norm.per_channel()]
        return [Middle((*tensors, (self.project.weight, 1)), self.project.weight)]


class Skip(nn.Module):
    """What stands in for a layer that changes shapes."""

    def __init__(self, place: Place) -> None:
        super().__init__()
        self.conv = Conv2d(place.c_in, place.c_out, 1, place.stride)
        self.norm = BatchNorm2d(place.c_out)

    def forward(self, x: Tensor, noise: Noise | None = None, depth: float = 0.0) -> Tensor:
        return F.relu(self.norm(self.conv(x)))


class Layer(nn.Module):
    """One decision and the operators that it may be asked for; an identity has no module."""

    def __init__(self, held: Sequence[str], place: Place) -> None:
        super().__init__()
        self.held = tuple(held)
        weighty = [name for name in held if name != SKIP or not place.keeps_shape]
        self.candidates = nn.ModuleDict(
            {name: Skip(place) if name == SKIP else Block(KINDS[name], place) for name in weighty}
        )

    def forward(
        self, x: Tensor, name: str, noise: Noise | None = None, depth: float = 0.0
    ) -> Tensor:
        return self.candidates[name](x, noise, depth) if name in self.candidates else x

    def every(self) -> list[Candidate]:
        """In the order of the gene's options."""
        return [partial(self.forward, name=name) for name in self.held]


class FBNet(ChoiceNetwork):
    """Runs `arch`, or with all operators `held` any architecture of the space."""

    def __init__(
        self,
        arch: Arch,
        held: Sequence[Sequence[str]],
        channels: int,
        classes: int,
        *,
        small: bool,
    ) -> None:
        super().__init__()
        self.arch = arch
        self.stem = Conv2d(channels, arch.stem, 3, 1 if small else 2)
        self.stem_norm = BatchNorm2d(arch.stem)
        places = _places(arch.stem, arch.widths, small)
        self.layers = nn.ModuleList(
            Layer(names, place) for names, place in zip(held, places, strict=True)
        )
        self.last = Conv2d(arch.widths[-1], arch.last)
        self.last_norm = BatchNorm2d(arch.last)
        self.head = Linear(arch.last, classes)

    def forward(
        self,
        x: Tensor,
        arch: Arch | None = None,
        noise: Noise | None = None,
        blend: Blend | None = None,
    ) -> Tensor:
        x = F.relu(self.stem_norm(self.stem(x)))
        for at, (layer, name) in enumerate(zip(self.layers, (arch or self.arch).ops, strict=True)):
            if blend is None:
                x = layer(x, name, noise, (at + 1) / len(self.layers))
            else:
                x = blend(at, x, layer.every())  # type: ignore[operator]
        x = F.relu(self.last_norm(self.last(x))).mean((2, 3))
        return self.head(noise.features(x) if noise else x)


def _pointwise(c_in: int, c_out: int, groups: int) -> nn.Conv2d:
    if groups == 1:
        return Conv2d(c_in, c_out)
    return nn.Conv2d(c_in, c_out, 1, groups=groups, bias=False)


def _shuffled(x: Tensor, groups: int) -> Tensor:
    """Channels dealt out anew, so that each group of the next convolution reads all groups."""
    n, c, h, w = x.shape
    return x.reshape(n, groups, c // groups, h, w).transpose(1, 2).reshape(n, c, h, w)
