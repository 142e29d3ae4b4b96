"""The BigNAS space: MobileNetV3-style inverted residuals with squeeze-excite (arXiv 2003.11142).

Elastic per stage: width, depth and depthwise kernel; elastic input resolution; expansion is fixed
at 6 (1 in the first stage). The table below is the one in the public re-implementation
xfey/pytorch-BigNAS (commit a41a9fc), which agrees with the paper's: three lines of it, the middle
widths of stage 7 and of the last convolution, are ours (multiples of 8 and 64 between the ends).

Every block has a shortcut (2x2 average pool and 1x1 convolution where shapes change) and ends in a
zero-initialised norm. `size` is the largest resolution: below 96 px the strides of the stem and of
stages 2 and 6 become 1, so that 32 x 32 images keep an 8 x 8 map. `width` scales the channels; its
default is 1, or 1/4 below 96 px, where the ImageNet widths would cost 0.6 GMACs per image.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import islice
from typing import NamedTuple

import torch.nn.functional as F
from torch import Tensor, nn

from hw_profiles.op import Op, Tape, Wire
from nas.elastic import (
    BatchNorm2d,
    Conv2d,
    DepthwiseConv2d,
    Linear,
    Middle,
    Network,
    Noise,
    Residual,
    SqueezeExcite,
    round_to,
)
from nas.space import Gene, Genes, SearchSpace


class Stage(NamedTuple):
    widths: tuple[int, ...]
    depths: tuple[int, ...]
    kernels: tuple[int, ...]
    expand: int
    stride: int
    small_stride: int  # for images below 96 px


STEM = (32, 40)
STAGES = (
    Stage((16, 24), (1, 2), (3,), 1, 1, 1),
    Stage((24, 32), (2, 3), (3,), 6, 2, 1),
    Stage((40, 48), (2, 3), (3, 5), 6, 2, 2),
    Stage((80, 88), (2, 3, 4), (3, 5), 6, 2, 2),
    Stage((112, 120, 128), (2, 3, 4, 5, 6), (3, 5), 6, 1, 1),
    Stage((192, 200, 208, 216), (2, 3, 4, 5, 6), (3, 5), 6, 2, 1),
    Stage((320, 336, 352), (1, 2), (3, 5), 6, 1, 1),
)
LAST = (1280, 1344, 1408)
#: resolutions as shares of the largest: 192, 224, 256, 288, 320 in the paper
RESOLUTIONS = (0.6, 0.7, 0.8, 0.9, 1.0)
SMALL = 96  # px


@dataclass(frozen=True)
class Arch:
    resolution: int
    stem: int
    widths: tuple[int, ...]  # per stage, as are the next two
    depths: tuple[int, ...]
    kernels: tuple[int, ...]
    last: int


class Space(SearchSpace):
    arch_type = Arch

    def __init__(
        self, *, channels: int = 3, classes: int = 10, size: int = 32, width: float | None = None
    ) -> None:
        self.channels, self.classes, self.size = channels, classes, size
        self.small = size < SMALL
        width = width or (0.25 if self.small else 1.0)
        step = 4 if self.small else 32
        resolutions = sorted({max(step, round(size * r / step) * step) for r in RESOLUTIONS})
        genes = [Gene("resolution", tuple(resolutions)), Gene("stem", _scaled(STEM, width))]
        for s, stage in enumerate(STAGES):
            genes.append(Gene(f"stage{s}.width", _scaled(stage.widths, width)))
            genes.append(Gene(f"stage{s}.depth", stage.depths))
            genes.append(Gene(f"stage{s}.kernel", stage.kernels))
        genes.append(Gene("last", _scaled(LAST, width)))
        self.genes = tuple(genes)
        self.slots = self._slots()

    def _slots(self) -> dict[str, tuple[str, ...]]:
        slots: dict[str, tuple[str, ...]] = {"stem": ("resolution", "stem")}
        before = "stem"
        for s in range(len(STAGES)):
            own = tuple(f"stage{s}.{what}" for what in ("width", "depth", "kernel"))
            slots[f"stage{s}"] = ("resolution", before, *own)
            before = f"stage{s}.width"
        slots["last"] = ("resolution", before, "last")
        return slots

    def decode(self, genes: Genes) -> Arch:
        value = self.values(genes)
        widths, depths, kernels = (
            tuple(value[f"stage{s}.{what}"] for s in range(len(STAGES)))
            for what in ("width", "depth", "kernel")
        )
        return Arch(value["resolution"], value["stem"], widths, depths, kernels, value["last"])

    def ops(self, arch: Arch) -> list[Op]:
        tape = Tape(self.channels, arch.resolution)
        tape.slot = "stem"
        stride = 1 if self.small else 2
        x = tape.conv(tape.input, arch.stem, kernel=3, stride=stride, norm=True, act="hswish")
        for s, stage in enumerate(STAGES):
            tape.slot = f"stage{s}"
            for b in range(arch.depths[s]):
                shape = BlockShape(
                    arch.widths[s],
                    arch.kernels[s],
                    stage.expand,
                    _stride(stage, b, self.small),
                    first=b == 0,
                )
                x = _block_ops(tape, x, shape)
        tape.slot = "last"
        x = tape.gap(tape.conv(x, arch.last, norm=True, act="hswish"))
        tape.linear(x, self.classes)
        return tape.ops

    def build(self, arch: Arch) -> MobileNet:
        return MobileNet(arch, self.channels, self.classes, small=self.small)


def _scaled(options: tuple[int, ...], width: float) -> tuple[int, ...]:
    return tuple(sorted({round_to(option * width) for option in options}))


def _stride(stage: Stage, block: int, small: bool) -> int:
    if block:
        return 1
    return stage.small_stride if small else stage.stride


class BlockShape(NamedTuple):
    width: int
    kernel: int
    expand: int
    stride: int
    first: bool  # of its stage: its shortcut is a convolution, because the width changes


def _block_ops(tape: Tape, x: Wire, shape: BlockShape) -> Wire:
    shortcut, y, width = x, x, shape.width
    if shape.stride == 2:
        shortcut = tape.avgpool(shortcut)
    if shape.first:
        shortcut = tape.conv(shortcut, width, norm=True)
    if shape.expand > 1:
        y = tape.conv(y, x.c * shape.expand, norm=True, act="hswish")
    y = tape.conv(
        y,
        y.c,
        kernel=shape.kernel,
        stride=shape.stride,
        groups=y.c,
        norm=True,
        act="hswish",
    )
    gate = tape.conv(tape.gap(y), SqueezeExcite.bottleneck(y.c), bias=True, act="relu")
    gate = tape.conv(gate, y.c, bias=True, act="hsigmoid")
    y = tape.conv(tape.mul(y, gate), width, norm=True)
    return tape.add(y, shortcut)


class Block(Residual):
    """x + project(se(depthwise(expand(x)))), hard-swish between, linear at the end."""

    def __init__(self, c_in: int, shape: BlockShape) -> None:
        super().__init__()
        self.shape, width = shape, shape.width
        mid = c_in * shape.expand
        if shape.expand > 1:
            self.expand = Conv2d(c_in, mid)
            self.expand_norm = BatchNorm2d(mid)
        self.depthwise = DepthwiseConv2d(mid, shape.kernel, shape.stride)
        self.depthwise_norm = BatchNorm2d(mid)
        self.se = SqueezeExcite(mid)
        self.project = Conv2d(mid, width)
        self.project_norm = BatchNorm2d(width)
        nn.init.zeros_(self.project_norm.weight)
        if shape.first:
            self.shortcut = Conv2d(c_in, width)
            self.shortcut_norm = BatchNorm2d(width)

    def forward(
        self, x: Tensor, width: int, kernel: int, noise: Noise | None, depth: float
    ) -> Tensor:
        y = x
        if self.shape.expand > 1:
            # read off x: the middle width follows the previous stage's, as in the paper's space
            y = F.hardswish(self.expand_norm(self.expand(y, x.shape[1] * self.shape.expand)))
        y = F.hardswish(self.depthwise_norm(self.depthwise(y, kernel)))
        y = self.project_norm(self.project(self.se(y), width))
        if noise:
            y = noise.branch(y, depth)
        if self.shape.stride == 2:
            x = F.avg_pool2d(x, 2)
        if self.shape.first:
            x = self.shortcut_norm(self.shortcut(x, width))
        return x + y

    def middles(self) -> list[Middle]:
        """The gate's bottleneck; and the expanded channels, where the block makes its own."""
        reduce, expand = self.se.reduce, self.se.expand
        assert reduce.bias is not None
        gate = ((reduce.weight, 0), (reduce.bias, 0), (expand.weight, 1))
        found = [Middle(gate, expand.weight)]
        if self.shape.expand > 1:
            assert expand.bias is not None
            norms = (*self.expand_norm.per_channel(), *self.depthwise_norm.per_channel())
            gate = ((reduce.weight, 1), (expand.weight, 0), (expand.bias, 0))
            filters = ((self.expand.weight, 0), (self.depthwise.weight, 0))
            tensors = (*filters, *norms, *gate, (self.project.weight, 1))
            found.append(Middle(tensors, self.project.weight))
        return found


class MobileNet(Network):
    """Built at `arch`; `net(x, smaller)` runs any architecture that fits inside it.

    The input's resolution is the caller's affair (`nas.elastic.resize`).
    """

    def __init__(self, arch: Arch, channels: int, classes: int, *, small: bool) -> None:
        super().__init__()
        self.arch = arch
        self.stem = Conv2d(channels, arch.stem, 3, stride=1 if small else 2)
        self.stem_norm = BatchNorm2d(arch.stem)
        self.stages = nn.ModuleList()
        c = arch.stem
        for stage, width, depth, kernel in zip(
            STAGES, arch.widths, arch.depths, arch.kernels, strict=True
        ):
            blocks = nn.ModuleList()
            for b in range(depth):
                stride = _stride(stage, b, small)
                shape = BlockShape(width, kernel, stage.expand, stride, first=b == 0)
                blocks.append(Block(c, shape))
                c = width
            self.stages.append(blocks)
        self.last = Conv2d(c, arch.last)
        self.last_norm = BatchNorm2d(arch.last)
        self.head = Linear(arch.last, classes)

    def forward(self, x: Tensor, arch: Arch | None = None, noise: Noise | None = None) -> Tensor:
        arch = arch or self.arch
        ran, blocks = 0, sum(arch.depths)
        x = F.hardswish(self.stem_norm(self.stem(x, arch.stem)))
        for stage, width, depth, kernel in zip(
            self.stages, arch.widths, arch.depths, arch.kernels, strict=True
        ):
            for block in islice(stage.children(), depth):
                ran += 1
                x = block(x, width, kernel, noise, ran / blocks)
        x = F.hardswish(self.last_norm(self.last(x, arch.last))).mean((2, 3))
        return self.head(noise.features(x) if noise else x)
