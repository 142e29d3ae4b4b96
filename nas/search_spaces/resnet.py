"""A slimmable residual network for small images: the quick default on a CPU.

Stem 3x3, three stages of basic blocks at 1/2, 1/4 and 1/8 of the input, average pool, linear head.
Elastic: width and depth of each stage, and each block's middle width. Every block is residual
(transitions too: 2x2 average pool, then 1x1) and ends in a zero-initialised norm, as BigNAS wants
(arXiv 2003.11142, section 3.1), so at initialisation all depths and middle widths agree.

Stages begin at half resolution because a full-resolution stage takes most of a CPU's time and gives
the least accuracy per second of training at 32 x 32.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor, nn

from hw_profiles.op import Op, Tape, Wire
from nas.elastic import (
    BatchNorm2d,
    Conv2d,
    Linear,
    Middle,
    Network,
    Noise,
    Residual,
    round_to,
)
from nas.space import Gene, Genes, SearchSpace

STAGES = 3
WIDTHS = ((16, 24, 32), (32, 48, 64), (64, 96, 128))
MIDS = ((16, 24, 32), (32, 48, 64), (64, 96, 128))
DEPTHS = (1, 2)
STEM = 16


@dataclass(frozen=True)
class Arch:
    resolution: int
    stem: int
    widths: tuple[int, ...]  # channels of each stage
    mids: tuple[tuple[int, ...], ...]  # per stage, per block; their number is the stage's depth


class Space(SearchSpace):
    arch_type = Arch

    def __init__(
        self, *, channels: int = 3, classes: int = 10, size: int = 32, width: float | None = None
    ) -> None:
        self.channels, self.classes, self.size = channels, classes, size
        width = width or 1.0
        # three halvings must come out even; the nearest such size (28 px becomes 32)
        self.resolution = max(8, round(size / 8) * 8)
        self.stem = round_to(STEM * width)
        genes: list[Gene] = []
        for s in range(STAGES):
            genes.append(Gene(f"stage{s}.width", _scaled(WIDTHS[s], width)))
            genes.append(Gene(f"stage{s}.depth", DEPTHS))
            for b in range(max(DEPTHS)):
                needs = (f"stage{s}.depth", b + 1) if b else None
                genes.append(Gene(f"stage{s}.block{b}.mid", _scaled(MIDS[s], width), needs))
        self.genes = tuple(genes)
        self.slots = {"stem": (), **self._block_slots(), "head": (f"stage{STAGES - 1}.width",)}

    def _block_slots(self) -> dict[str, tuple[str, ...]]:
        slots = {}
        for s in range(STAGES):
            for b in range(max(DEPTHS)):
                reads = [f"stage{s}.width", f"stage{s}.depth", f"stage{s}.block{b}.mid"]
                if b == 0 and s:
                    reads.append(f"stage{s - 1}.width")
                slots[f"stage{s}.block{b}"] = tuple(reads)
        return slots

    def decode(self, genes: Genes) -> Arch:
        value = self.values(genes)
        return Arch(
            resolution=self.resolution,
            stem=self.stem,
            widths=tuple(value[f"stage{s}.width"] for s in range(STAGES)),
            mids=tuple(
                tuple(value[f"stage{s}.block{b}.mid"] for b in range(value[f"stage{s}.depth"]))
                for s in range(STAGES)
            ),
        )

    def ops(self, arch: Arch) -> list[Op]:
        tape = Tape(self.channels, arch.resolution)
        tape.slot = "stem"
        x = tape.conv(tape.input, arch.stem, kernel=3, norm=True, act="relu")
        for s, (width, mids) in enumerate(zip(arch.widths, arch.mids, strict=True)):
            for b, mid in enumerate(mids):
                tape.slot = f"stage{s}.block{b}"
                x = _block_ops(tape, x, width, mid, first=b == 0)
        tape.slot = "head"
        tape.linear(tape.gap(x), self.classes)
        return tape.ops

    def build(self, arch: Arch) -> ResNet:
        return ResNet(arch, self.channels, self.classes)


def _scaled(options: tuple[int, ...], width: float) -> tuple[int, ...]:
    return tuple(sorted({round_to(option * width) for option in options}))


def _block_ops(tape: Tape, x: Wire, width: int, mid: int, *, first: bool) -> Wire:
    shortcut = x
    if first:
        shortcut = tape.conv(tape.avgpool(x), width, norm=True)
    y = tape.conv(x, mid, kernel=3, stride=2 if first else 1, norm=True, act="relu")
    y = tape.conv(y, width, kernel=3, norm=True)
    return tape.add(y, shortcut, act="relu")


class Block(Residual):
    """relu(x + conv(relu(conv(x)))); the first block of a stage halves the map."""

    def __init__(self, c_in: int, width: int, mid: int, *, first: bool) -> None:
        super().__init__()
        self.conv1 = Conv2d(c_in, mid, 3, stride=2 if first else 1)
        self.norm1 = BatchNorm2d(mid)
        self.conv2 = Conv2d(mid, width, 3)
        self.norm2 = BatchNorm2d(width)
        nn.init.zeros_(self.norm2.weight)
        self.first = first
        if first:
            self.shortcut = Conv2d(c_in, width)
            self.shortcut_norm = BatchNorm2d(width)

    def forward(self, x: Tensor, width: int, mid: int, noise: Noise | None, depth: float) -> Tensor:
        y = F.relu(self.norm1(self.conv1(x, mid)))
        y = self.norm2(self.conv2(y, width))
        if noise:
            y = noise.branch(y, depth)
        if self.first:
            x = self.shortcut_norm(self.shortcut(F.avg_pool2d(x, 2), width))
        return F.relu(x + y)

    def middles(self) -> list[Middle]:
        tensors = ((self.conv1.weight, 0), *self.norm1.per_channel(), (self.conv2.weight, 1))
        return [Middle(tensors, self.conv2.weight)]


class ResNet(Network):
    """Built at `arch`; `net(x, smaller)` runs any architecture that fits inside it."""

    def __init__(self, arch: Arch, channels: int, classes: int) -> None:
        super().__init__()
        self.arch = arch
        self.stem = Conv2d(channels, arch.stem, 3)
        self.stem_norm = BatchNorm2d(arch.stem)
        self.stages = nn.ModuleList()
        c = arch.stem
        for width, mids in zip(arch.widths, arch.mids, strict=True):
            blocks = nn.ModuleList()
            for b, mid in enumerate(mids):
                blocks.append(Block(c, width, mid, first=b == 0))
                c = width
            self.stages.append(blocks)
        self.head = Linear(c, classes)

    def forward(self, x: Tensor, arch: Arch | None = None, noise: Noise | None = None) -> Tensor:
        arch = arch or self.arch
        x = F.relu(self.stem_norm(self.stem(x)))
        ran, blocks = 0, sum(map(len, arch.mids))
        for stage, width, mids in zip(self.stages, arch.widths, arch.mids, strict=True):
            for block, mid in zip(stage.children(), mids, strict=False):  # a short arch stops early
                ran += 1
                x = block(x, width, mid, noise, ran / blocks)
        x = x.mean((2, 3))
        return self.head(noise.features(x) if noise else x)
