"""Heads on maps of several resolutions: one per task, outside the backbone that is searched.

Every head reads all maps, so that whatever a backbone computes is on a route to an answer. From
fine to coarse maps are averaged down and added, for a vector (classes, presence) or a box; from
coarse to fine they are brought up and added, for a label map (as semantic FPN, arXiv 1901.02446).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch.nn.functional as F
from torch import Tensor, nn

from hw_profiles.op import Tape, Wire
from nas.elastic import BatchNorm2d, Conv2d, Linear, Noise, round_to

COMMON = {"vector": 96, "box": 64, "map": 32}  # channels in which maps are added
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
    y = tape.conv(xs[0], common, norm=True)
    for x in xs[1:]:
        y = tape.avgpool(y)
        y = tape.add(y, tape.conv(x, common, norm=True), act="relu" if x is xs[-1] else "")
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
        first, *others = (lateral(x) for lateral, x in zip(self.laterals, xs, strict=True))
        for other in others:
            first = F.avg_pool2d(first, 2) + other
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
