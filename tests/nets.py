"""Small networks of every kind of block, for the contract of proxies, and one of two inputs."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from nas.passes import Batch


def batch(n=16, channels=3, size=8, classes=4, seed=0):
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(n, channels, size, size, generator=generator)
    return Batch(inputs, torch.arange(n) % classes, seed)


def head(channels):
    return [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, 4)]


def conv():
    layers = [nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU(inplace=True)]
    layers += [nn.Conv2d(8, 8, 3, 2, 1, bias=False), nn.BatchNorm2d(8), nn.ReLU(inplace=True)]
    return nn.Sequential(*layers, *head(8))


def depthwise():
    """Depthwise and grouped convolutions, dropout, an activation right behind a convolution."""
    layers = [nn.Conv2d(3, 8, 1), nn.ReLU6(inplace=True)]
    layers += [nn.Conv2d(8, 8, 3, padding=1, groups=8), nn.BatchNorm2d(8), nn.ReLU6()]
    layers += [nn.Conv2d(8, 12, 3, padding=1, groups=4), nn.BatchNorm2d(12), nn.LeakyReLU(0.1)]
    return nn.Sequential(*layers, nn.Dropout(0.1), *head(12))


class Block(nn.Module):
    """Functional activations, a sum in place, and a module that is called twice."""

    def __init__(self, channels):
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(channels)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x):
        y = self.norm2(self.conv2(self.relu(self.norm1(self.conv1(x)))))
        y += x
        return self.relu(y)


class Residual(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.blocks = nn.ModuleList(Block(8) for _ in range(3))
        self.head = nn.Linear(8, 4)

    def forward(self, x):
        x = F.relu(self.stem(x))
        for block in self.blocks:
            x = block(x)
        return self.head(x.mean((2, 3)))


class Gated(nn.Module):
    """Hard-swish, and a squeeze-excite gate whose one ReLU is no code of the network."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(8)
        self.gate = nn.Sequential(nn.Conv2d(8, 4, 1), nn.ReLU(), nn.Conv2d(4, 8, 1))
        self.head = nn.Linear(8, 4)

    def forward(self, x):
        x = F.hardswish(self.norm(self.conv(x)))
        x = x * F.hardsigmoid(self.gate(x.mean((2, 3), keepdim=True)))
        return self.head(x.mean((2, 3)))


class Transformer(nn.Module):
    """Patches as tokens [B, T, C], attention, GELU and layer norms."""

    def __init__(self, activation="gelu"):
        super().__init__()
        self.patches = nn.Conv2d(3, 16, 2, 2)
        self.blocks = nn.Sequential(
            *(
                nn.TransformerEncoderLayer(16, 2, 32, activation=activation, batch_first=True)
                for _ in range(2)
            )
        )
        self.norm = nn.LayerNorm(16)
        self.head = nn.Linear(16, 4)

    def forward(self, x):
        x = self.blocks(self.patches(x).flatten(2).transpose(1, 2))
        return self.head(self.norm(x).mean(1))


KINDS = {
    "conv": conv,
    "depthwise": depthwise,
    "residual": Residual,
    "gated": Gated,
    "transformer": Transformer,
}


def make(kind, seed=0):
    torch.manual_seed(seed)
    return KINDS[kind]()


class Words(nn.Module):
    """Two inputs, one of them of whole numbers."""

    def __init__(self):
        super().__init__()
        self.table, self.head = nn.Embedding(11, 6), nn.Linear(6, 3)

    def forward(self, ids, mask):
        x = self.table(ids) * mask[..., None]
        return self.head(x.sum(1) / mask.sum(1, keepdim=True))
