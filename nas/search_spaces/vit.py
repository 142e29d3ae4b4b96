"""AutoFormer's space: vision transformers whose layers differ (arXiv 2107.00651, table 1).

Genes: embedding width (one for all layers), depth, and for each layer its heads and MLP ratio (in
halves). From 96 px on the supernet is the paper's "tiny" one (patches of 16 px, heads of 64
channels); below, where its 16 px would leave four patches, a smaller one of ours on patches of
4 px. `width` scales the embedding. Shallower networks keep the first layers.

Norms come before each branch and the last layer of a branch starts at zero, so at initialisation
all depths and MLP widths agree. The head reads the mean over the patches, as the paper's recipe
does. Left out: AutoFormer's relative positions, whose tables would be one more tensor per layer.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import islice
from typing import NamedTuple

import torch
from torch import Tensor, nn

from hw_profiles.op import Op, Tape, Wire
from nas.elastic import Linear, Network, Noise, round_to
from nas.seen import Heads, Seen
from nas.space import Gene, Genes, SearchSpace
from nas.transformer import Attention, LayerNorm, Mlp


class Table(NamedTuple):
    patch: int  # px
    head: int  # channels
    embed: tuple[int, ...]
    depth: tuple[int, ...]
    heads: tuple[int, ...]
    halves: tuple[int, ...]  # MLP width over embedding width, times 2


LARGE = Table(16, 64, (192, 216, 240), (12, 13, 14), (3, 4), (7, 8))
SMALL = Table(4, 32, (96, 128, 160), (4, 5, 6), (3, 4, 5), (2, 3, 4))
SMALL_BELOW = 96  # px


@dataclass(frozen=True)
class Arch:
    resolution: int
    embed: int
    heads: tuple[int, ...]  # per layer; their number is the depth
    mlps: tuple[int, ...]  # per layer: channels in the middle


class Space(SearchSpace):
    arch_type = Arch

    def __init__(
        self, *, channels: int = 3, classes: int = 10, size: int = 32, width: float | None = None
    ) -> None:
        self.channels, self.classes, self.size = channels, classes, size
        self.table = table = SMALL if size < SMALL_BELOW else LARGE
        self.resolution = max(table.patch, round(size / table.patch) * table.patch)
        embed = sorted({round_to(wide * (width or 1.0)) for wide in table.embed})
        genes = [Gene("embed", tuple(embed)), Gene("depth", table.depth)]
        self.slots = {"stem": ("embed",), "head": ("embed",)}
        for at in range(table.depth[-1]):
            needs = ("depth", at + 1) if at >= table.depth[0] else None
            own = f"layer{at}.heads", f"layer{at}.mid"
            genes += [Gene(own[0], table.heads, needs), Gene(own[1], table.halves, needs)]
            self.slots[f"layer{at}"] = ("embed", "depth", *own)
        self.genes = tuple(genes)

    def decode(self, genes: Genes) -> Arch:
        value = self.values(genes)
        layers = range(value["depth"])
        return Arch(
            self.resolution,
            value["embed"],
            tuple(value[f"layer{at}.heads"] for at in layers),
            tuple(value["embed"] * value[f"layer{at}.mid"] // 2 for at in layers),
        )

    def ops(self, arch: Arch) -> list[Op]:
        tape, table = Tape(self.channels, arch.resolution), self.table
        tape.slot = "stem"
        patches = tape.conv(
            tape.input, arch.embed, kernel=table.patch, stride=table.patch, bias=True
        )
        x = tape.position(patches)
        for at, (heads, mid) in enumerate(zip(arch.heads, arch.mlps, strict=True)):
            tape.slot = f"layer{at}"
            x = _layer_ops(tape, x, heads, mid, table.head)
        tape.slot = "head"
        tape.linear(tape.gap(tape.layernorm(x)), self.classes)
        return tape.ops

    def build(self, arch: Arch) -> Vit:
        return Vit(arch, self.table, self.channels, self.classes)


def _layer_ops(tape: Tape, x: Wire, heads: int, mid: int, head: int) -> Wire:
    y = tape.layernorm(x)
    q, k, v = (tape.project(y, heads * head) for _ in "qkv")
    x = tape.add(tape.project(tape.attention(q, k, v, heads), x.c), x)
    y = tape.project(tape.layernorm(x), mid, act="gelu")
    return tape.add(tape.project(y, x.c), x)


class Layer(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, width: int, heads: int, mid: int, head: int) -> None:
        super().__init__()
        self.attention_norm = LayerNorm(width)
        self.attention = Attention(width, heads, head)
        self.mlp_norm = LayerNorm(width)
        self.mlp = Mlp(width, mid)
        for last in (self.attention.output, self.mlp.shrink):
            nn.init.zeros_(last.weight)
            nn.init.zeros_(last.bias)

    def forward(
        self, x: Tensor, heads: int, mid: int, noise: Noise | None, depth: float
    ) -> tuple[Tensor, Heads]:
        y, seen = self.attention(self.attention_norm(x), heads)
        x = x + (noise.branch(y, depth) if noise else y)
        y = self.mlp(self.mlp_norm(x), mid)
        return x + (noise.branch(y, depth) if noise else y), seen


class Vit(Network):
    """Built at `arch`; `net(x, smaller)` runs any architecture that fits inside it."""

    def __init__(self, arch: Arch, table: Table, channels: int, classes: int) -> None:
        super().__init__()
        self.arch, patch = arch, table.patch
        self.patch = nn.Conv2d(channels, arch.embed, patch, patch)
        self.places = nn.Parameter(torch.zeros((arch.resolution // patch) ** 2, arch.embed))
        nn.init.normal_(self.places, std=0.02)
        sizes = zip(arch.heads, arch.mlps, strict=True)
        self.layers = nn.ModuleList(
            Layer(arch.embed, heads, mid, table.head) for heads, mid in sizes
        )
        self.norm = LayerNorm(arch.embed)
        self.head = Linear(arch.embed, classes)

    def forward(self, x: Tensor, arch: Arch | None = None, noise: Noise | None = None) -> Tensor:
        logits = self.look(x, arch, noise).logits
        assert logits is not None
        return logits

    def look(self, x: Tensor, arch: Arch | None = None, noise: Noise | None = None) -> Seen:
        """What each layer computes on the way: `features` are what the layers write [N, S, C]."""
        arch = arch or self.arch
        assert self.patch.bias is not None
        weight, bias = self.patch.weight[: arch.embed], self.patch.bias[: arch.embed]
        x = nn.functional.conv2d(x, weight, bias, self.patch.stride)
        x = x.flatten(2).transpose(1, 2) + self.places[:, : arch.embed]
        features: list[Tensor] = []
        attention: list[Heads] = []
        sizes = zip(self.layers.children(), arch.heads, arch.mlps, strict=False)
        for ran, (layer, heads, mid) in enumerate(islice(sizes, len(arch.heads)), 1):
            x, seen = layer(x, heads, mid, noise, ran / len(arch.heads))
            features.append(x)
            attention.append(seen)
        mean = self.norm(x).mean(1)
        logits = self.head(noise.features(mean) if noise else mean)
        return Seen(tuple(features), tuple(attention), arch.heads, None, logits)
