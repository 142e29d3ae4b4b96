"""Heads on maps of several resolutions: one per task, outside the backbone that is searched.

Every head reads all maps, so that whatever a backbone computes is on a route to an answer. For
a vector (classes, presence) or a box maps are averaged down to the coarsest and added; for a label
map they are brought up and added, from coarse to fine (as semantic FPN, arXiv 1901.02446).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch.nn.functional as F
from torch import Tensor, nn

from hw_profiles.op import Tape, Wire
from nas.elastic import BatchNorm2d, Conv2d, Linear, Noise, round_to

COMMON = {"vector": 96, "box": 64, "map": 24}  # channels in which maps are added
HIDDEN = 64  # of a box
SIDES = 4  # centre x, centre y, width and height (`nas.goals.box`)


@dataclass(frozen=True)
class Answer:
    """What a task's head returns: `channels` logits per image, a box, or logits per pixel."""

    form: Literal["vector", "box", "map"]
    channels: int = SIDES

    def common(self, scale: float) -> int:
        return round_to(COMMON[self.form] * scale)


@dataclass(frozen=True)
class Maps:
    """What a backbone gives, from fine to coarse; each has half the height and width of the one
    before."""

    widths: tuple[int, ...]
    coarsest: tuple[int, int]  # height and width, pixels
    stride: int  # of the finest


def write(tape: Tape, xs: Sequence[Wire], answer: Answer, maps: Maps, scale: float) -> Wire:
    """The operators of a head."""
    common = answer.common(scale)
    if answer.form == "map":
        y = tape.conv(xs[-1], common, norm=True)
        for x in reversed(xs[:-1]):
            y = tape.upsample(y, 2)
            y = tape.add(y, tape.conv(x, common, norm=True), act="relu" if x is xs[0] else "")
        y = tape.conv(y, answer.channels, bias=True)
        return tape.upsample(y, maps.stride) if maps.stride > 1 else y
    pooled = []
    for x, halvings in zip(xs, reversed(range(len(xs))), strict=True):
        size = 2**halvings
        small = tape.avgpool(x, kernel=size, stride=size) if halvings else x
        pooled.append(tape.conv(small, common, norm=True))
    y, *others = pooled
    for other in others:
        y = tape.add(y, other, act="relu" if other is others[-1] else "")
    if answer.form == "vector":
        return tape.linear(tape.gap(y), answer.channels)
    return tape.linear(tape.linear(tape.flatten(y), HIDDEN, act="relu"), SIDES)


class Lateral(nn.Module):
    """A map in the common number of channels."""

    def __init__(self, c_in: int, c_out: int) -> None:
        super().__init__()
        self.conv, self.norm = Conv2d(c_in, c_out), BatchNorm2d(c_out)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.conv(x))


class Head(nn.Module):
    """The maps in common channels; subclasses add them up and answer."""

    def __init__(self, answer: Answer, maps: Maps, scale: float) -> None:
        super().__init__()
        self.common = answer.common(scale)
        self.laterals = nn.ModuleList(Lateral(width, self.common) for width in maps.widths)

    def down(self, xs: Sequence[Tensor]) -> Tensor:
        """All in the size of the coarsest."""
        every = zip(self.laterals, xs, reversed(range(len(xs))), strict=True)
        first, *others = (
            lateral(F.avg_pool2d(x, 2**halvings) if halvings else x)
            for lateral, x, halvings in every
        )
        for other in others:
            first = first + other
        return F.relu(first)

    def up(self, xs: Sequence[Tensor]) -> Tensor:
        """All in the size of the finest."""
        *others, last = (lateral(x) for lateral, x in zip(self.laterals, xs, strict=True))
        for other in reversed(others):
            last = grown(last) + other
        return F.relu(last)


class Vector(Head):
    def __init__(self, answer: Answer, maps: Maps, scale: float) -> None:
        super().__init__(answer, maps, scale)
        self.out = Linear(self.common, answer.channels)

    def forward(self, xs: Sequence[Tensor], noise: Noise | None = None) -> Tensor:
        y = self.down(xs).mean((2, 3))
        return self.out(noise.features(y) if noise else y)


class Box(Head):
    """Reads where things are, so for images of one size."""

    def __init__(self, answer: Answer, maps: Maps, scale: float) -> None:
        super().__init__(answer, maps, scale)
        height, width = maps.coarsest
        self.hidden = Linear(self.common * height * width, HIDDEN)
        self.out = Linear(HIDDEN, SIDES)

    def forward(self, xs: Sequence[Tensor], noise: Noise | None = None) -> Tensor:
        y = F.relu(self.hidden(self.down(xs).flatten(1)))
        return self.out(noise.features(y) if noise else y)


class Map(Head):
    """Logits at the size of the images."""

    def __init__(self, answer: Answer, maps: Maps, scale: float) -> None:
        super().__init__(answer, maps, scale)
        self.stride = maps.stride
        self.out = nn.Conv2d(self.common, answer.channels, 1)

    def forward(self, xs: Sequence[Tensor], noise: Noise | None = None) -> Tensor:
        y = self.out(self.up(xs))
        return grown(y, self.stride) if self.stride > 1 else y


HEADS: dict[str, type[Head]] = {"vector": Vector, "box": Box, "map": Map}


def build(answer: Answer, maps: Maps, scale: float) -> Head:
    return HEADS[answer.form](answer, maps, scale)


def grown(x: Tensor, factor: int = 2) -> Tensor:
    """Bilinear, as the operator `upsample`."""
    return F.interpolate(x, scale_factor=factor, mode="bilinear", align_corners=False)
