"""The two networks that the benchmarks of multi-task methods work on; plain torch modules.

`class_box`: a residual backbone shared by a class and a box, for `tiny_imagenet_20` at 48 pixels.
`street`: a residual encoder and a decoder with lateral connections, for `camvid` at 48 x 64, with a
label map, its boundaries and the classes in the picture.

Sized so that one core of a CPU trains either to convergence in minutes; widths are multiples of 16.
A network can be named as `benchmarks.multitask_nets:class_box`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

CLASSES = 20  # of tiny_imagenet_20
LABELS = 11  # of CamVid


def class_box(widths: Sequence[int] = (32, 32, 64, 128)) -> nn.Module:
    return ClassBox(widths)


def street(widths: Sequence[int] = (32, 32, 64, 128)) -> nn.Module:
    return Street(widths)


class Unit(nn.Sequential):
    """Convolution, norm, and a ReLU unless it ends a residual branch."""

    def __init__(
        self, c_in: int, c_out: int, kernel: int = 3, stride: int = 1, *, relu: bool = True
    ) -> None:
        conv = nn.Conv2d(c_in, c_out, kernel, stride, kernel // 2, bias=False)
        super().__init__(conv, nn.BatchNorm2d(c_out), *([nn.ReLU()] if relu else []))


class Block(nn.Module):
    """relu(x + conv(conv(x))); with a stride, x goes through a convolution of its own."""

    def __init__(self, c_in: int, c_out: int, stride: int) -> None:
        super().__init__()
        self.first = Unit(c_in, c_out, stride=stride)
        self.second = Unit(c_out, c_out, relu=False)
        self.across: nn.Module = nn.Identity()
        if stride > 1 or c_in != c_out:
            self.across = Unit(c_in, c_out, 1, stride, relu=False)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.second(self.first(x)) + self.across(x))


class Backbone(nn.Module):
    """A stem at 1/2 of the image, then stages of two blocks at 1/4, 1/8 and 1/16: all four maps."""

    def __init__(self, widths: Sequence[int]) -> None:
        super().__init__()
        self.stem = Unit(3, widths[0], stride=2)
        self.stages = nn.ModuleList(
            nn.Sequential(Block(c_in, c_out, 2), Block(c_out, c_out, 1))
            for c_in, c_out in zip(widths, widths[1:], strict=False)
        )

    def forward(self, x: Tensor) -> list[Tensor]:
        maps = [self.stem(x)]
        for stage in self.stages:
            maps.append(stage(maps[-1]))
        return maps


class ClassBox(nn.Module):
    """For images of 48 x 48: the class reads the mean of the last map, the box reads all of it."""

    def __init__(self, widths: Sequence[int]) -> None:
        super().__init__()
        last = widths[-1]
        self.backbone = Backbone(widths)
        self.class_head = nn.Sequential(
            Unit(last, last, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(last, CLASSES)
        )
        self.box_head = nn.Sequential(
            Unit(last, last // 2, 1),
            nn.Flatten(),
            nn.Linear(last // 2 * 9, last),
            nn.ReLU(),
            nn.Linear(last, 4),
        )

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        x = self.backbone(x)[-1]
        return {"class": self.class_head(x), "box": self.box_head(x)}


class Street(nn.Module):
    """Maps are merged from coarse to fine, each by concatenation; answers are at full size."""

    def __init__(self, widths: Sequence[int]) -> None:
        super().__init__()
        self.backbone = Backbone(widths)
        stem, fine, middle, coarse = widths
        self.merge_middle = Unit(coarse + middle, middle)
        self.merge_fine = Unit(middle + fine, fine)
        self.merge_stem = Unit(fine + stem, stem, 1)  # 3 x 3 here would be a third of all work
        self.seg_head = nn.Conv2d(stem, LABELS, 1)
        self.edge_head = nn.Sequential(Unit(stem, 16), nn.Conv2d(16, 1, 1))
        self.presence_head = nn.Sequential(
            Unit(coarse, coarse, 1),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(coarse, LABELS),
        )

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        stem, fine, middle, coarse = self.backbone(x)
        y = self.merge_middle(torch.cat([_twice(coarse), middle], 1))
        y = self.merge_fine(torch.cat([_twice(y), fine], 1))
        y = self.merge_stem(torch.cat([_twice(y), stem], 1))
        return {
            "seg": _twice(self.seg_head(y)),
            "edge": _twice(self.edge_head(y)),
            "presence": self.presence_head(coarse),
        }


def _twice(x: Tensor) -> Tensor:
    return F.interpolate(x, scale_factor=2, mode="bilinear", align_corners=False)
