"""AutoDistil's spaces: encoders of text with identical layers (arXiv 2201.12507, table 1).

Genes: layers, hidden width, heads and MLP ratio (in halves). GRIDS holds the paper's three
sub-spaces of 256 networks each; `within` makes such a space inside any teacher. A network of l
layers out of L keeps numbers floor(i L / l), the paper's "alternate" ones; its layers keep their
numbers, so extraction copies by name. Heads keep the teacher's size at every hidden width.

Where the paper's code and tables disagree we count what is there: real tensors (its cost formula
shrinks heads that its code does not), and integers (its ratios, cut to four digits, lose a column).

Networks read token numbers [N, S] of one segment; places that hold the padding number are masked.
The vector of segment 0 is part of every position's. The head reads the mean over the tokens.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple, cast

import torch
from torch import Tensor, nn

from hw_profiles.op import Op, Tape, Wire
from nas.elastic import Linear, Network, Noise, round_to
from nas.errors import UsageError
from nas.seen import Heads, Seen
from nas.space import Gene, Genes, SearchSpace
from nas.transformer import Attention, LayerNorm, Mlp, Table

STEP = 32  # of hidden widths: the paper's, and what tiles of every device divide
NARROW = (8, 2)  # of teachers that are narrower


@dataclass(frozen=True)
class Frame:
    """What all networks of a space have of their teacher."""

    vocabulary: int = 30522
    positions: int = 512
    head: int = 64  # channels of one head
    padding: int = 0  # the number of the padding token
    eps: float = 1e-12  # of the layer norms


@dataclass(frozen=True)
class Grid:
    """The options of a space, each ascending."""

    layers: tuple[int, ...]
    hidden: tuple[int, ...]
    heads: tuple[int, ...]
    halves: tuple[int, ...]  # MLP width over hidden width, times 2

    def __post_init__(self) -> None:
        for name, options in vars(self).items():
            whole = options and all(type(option) is int and option > 0 for option in options)
            if not whole or list(options) != sorted(set(options)):
                raise UsageError(
                    f"{list(options)}", where=name, allowed="ascending whole numbers above zero"
                )
        for hidden in self.hidden:
            if odd := [half for half in self.halves if hidden * half % 2]:
                raise UsageError(
                    f"hidden width {hidden} times {odd[0]}/2 is no whole number", where="halves"
                )


def _up(first: int, last: int, step: int = 1) -> tuple[int, ...]:
    return tuple(range(first, last + 1, step))


#: table 1 of the paper, for its teacher of 12 layers, 768 wide, with 12 heads
GRIDS = {
    "tiny": Grid(_up(4, 7), _up(128, 224, STEP), _up(7, 10), _up(4, 7)),
    "small": Grid(_up(9, 12), _up(256, 352, STEP), _up(7, 10), _up(5, 8)),
    "base": Grid(_up(9, 12), _up(544, 640, STEP), _up(9, 12), _up(5, 8)),
}


@dataclass(frozen=True)
class Arch:
    layers: tuple[int, ...]  # the numbers of those that are kept
    hidden: int
    heads: int
    mlp: int


class Space(SearchSpace):
    """Of text: `size` is the number of tokens that costs are for; `channels` means nothing."""

    arch_type = Arch
    reads = "text"

    def __init__(
        self,
        *,
        channels: int = 1,
        classes: int = 2,
        size: int = 128,
        width: float | None = None,
        grid: Grid = GRIDS["tiny"],
        frame: Frame = Frame(),
    ) -> None:
        if size > frame.positions:
            raise UsageError(
                f"{size} tokens, but positions for {frame.positions}", where="--sequence"
            )
        self.channels, self.classes, self.size, self.frame = channels, classes, size, frame
        hidden = grid.hidden
        if width is not None:
            hidden = tuple(sorted({round_to(wide * width) for wide in grid.hidden}))
        self.genes = (
            Gene("layers", grid.layers),
            Gene("hidden", hidden),
            Gene("heads", grid.heads),
            Gene("halves", grid.halves),
        )
        every = tuple(gene.name for gene in self.genes)
        self.slots = {"embeddings": ("hidden",), "layers": every, "head": ("hidden",)}

    def decode(self, genes: Genes) -> Arch:
        value, most = self.values(genes), self.genes[0].options[-1]
        return Arch(
            kept(value["layers"], most),
            value["hidden"],
            value["heads"],
            value["hidden"] * value["halves"] // 2,
        )

    def ops(self, arch: Arch) -> list[Op]:
        tape, frame = Tape(1, self.size), self.frame
        tape.slot = "embeddings"
        # a wire of 1 x tokens x 1, not of a square image
        tokens = Wire(tape.input.at, 1, self.size, 1)
        x = tape.embed(tokens, frame.vocabulary + frame.positions, arch.hidden)
        x = tape.layernorm(x)
        tape.slot = "layers"
        for _ in arch.layers:
            x = _layer_ops(tape, x, arch, frame.head)
        tape.slot = "head"
        tape.linear(tape.gap(x), self.classes)
        return tape.ops

    def build(self, arch: Arch) -> Bert:
        return Bert(arch, self.frame, self.classes)


def kept(depth: int, of: int) -> tuple[int, ...]:
    """The numbers of the layers that a network of `depth` layers has, of `of`."""
    return tuple(at * of // depth for at in range(depth))


def within(layers: int, hidden: int, heads: int, mlp: int) -> dict[str, Grid]:
    """Three sub-spaces inside a teacher of these sizes: table 1 for the paper's own, else its idea
    (thin and deep, the sizes of each close together). These shares of a teacher's sizes are ours: a
    teacher of 384 channels cannot spare three quarters of them. MLPs are no wider than its own.
    """
    if (layers, hidden, heads, mlp) == (12, 768, 12, 3072):
        return dict(GRIDS)
    step = next((step for step in (STEP, *NARROW) if step <= hidden), 1)
    found = {}
    for name, share in SHARES.items():
        wide = tuple(step * tiles for tiles in _between(hidden // step, share.hidden))
        widest = 2 * mlp // wide[-1]  # as halves
        halves = tuple(half for half in share.halves if half <= widest)
        found[name] = Grid(
            _between(layers, share.layers),
            wide,
            _between(heads, share.heads),
            halves or (max(1, widest),),
        )
    return found


class Share(NamedTuple):
    """The lowest and the highest option, as shares of the teacher's size."""

    layers: tuple[float, float]
    hidden: tuple[float, float]
    heads: tuple[float, float]
    halves: tuple[int, ...]


SHARES = {
    "tiny": Share((1 / 2, 2 / 3), (1 / 3, 5 / 12), (7 / 12, 5 / 6), _up(4, 7)),
    "small": Share((2 / 3, 5 / 6), (1 / 2, 2 / 3), (7 / 12, 5 / 6), _up(5, 8)),
    "base": Share((5 / 6, 1), (3 / 4, 11 / 12), (3 / 4, 1), _up(5, 8)),
}


def _between(whole: int, share: tuple[float, float]) -> tuple[int, ...]:
    """All whole numbers between two shares of `whole`, one at least."""
    low = max(1, math.ceil(whole * share[0] - 1e-9))
    return _up(low, max(low, math.floor(whole * share[1] + 1e-9)))


def _layer_ops(tape: Tape, x: Wire, arch: Arch, head: int) -> Wire:
    inner = arch.heads * head
    q, k, v = (tape.project(x, inner) for _ in "qkv")
    y = tape.project(tape.attention(q, k, v, arch.heads), x.c)
    x = tape.layernorm(tape.add(y, x))
    y = tape.project(tape.project(x, arch.mlp, act="gelu"), x.c)
    return tape.layernorm(tape.add(y, x))


class Layer(nn.Module):
    """norm(x + attention(x)), then norm(x + mlp(x))."""

    def __init__(self, arch: Arch, frame: Frame) -> None:
        super().__init__()
        self.attention = Attention(arch.hidden, arch.heads, frame.head)
        self.attention_norm = LayerNorm(arch.hidden, frame.eps)
        self.mlp = Mlp(arch.hidden, arch.mlp)
        self.mlp_norm = LayerNorm(arch.hidden, frame.eps)

    def forward(
        self, x: Tensor, arch: Arch, mask: Tensor, noise: Noise | None, depth: float
    ) -> tuple[Tensor, Heads]:
        y, heads = self.attention(x, arch.heads, mask)
        x = self.attention_norm(x + (noise.branch(y, depth) if noise else y))
        y = self.mlp(x, arch.mlp)
        return self.mlp_norm(x + (noise.branch(y, depth) if noise else y)), heads


class Bert(Network):
    """Built at `arch`; `net(tokens, smaller)` runs any architecture that fits inside it."""

    def __init__(self, arch: Arch, frame: Frame, classes: int) -> None:
        super().__init__()
        self.arch, self.frame = arch, frame
        self.words = Table(frame.vocabulary, arch.hidden)
        self.places = Table(frame.positions, arch.hidden)
        self.norm = LayerNorm(arch.hidden, frame.eps)
        self.layers = nn.ModuleDict({str(n): Layer(arch, frame) for n in arch.layers})
        self.head = Linear(arch.hidden, classes)

    def forward(self, x: Tensor, arch: Arch | None = None, noise: Noise | None = None) -> Tensor:
        """Logits [N, classes] of token numbers [N, S]."""
        logits = self.look(x, arch, noise).logits
        assert logits is not None
        return logits

    def stack(self) -> list[Layer]:
        """Its layers, in order."""
        return [cast(Layer, layer) for layer in self.layers.values()]

    def look(self, x: Tensor, arch: Arch | None = None, noise: Noise | None = None) -> Seen:
        """What each layer computes on the way: `features` are what the layers write [N, S, C]."""
        arch = arch or self.arch
        there = x != self.frame.padding
        places = torch.arange(x.shape[1], device=x.device)
        x = self.norm(self.words(x, arch.hidden) + self.places(places, arch.hidden))
        features: list[Tensor] = []
        attention: list[Heads] = []
        for ran, number in enumerate(arch.layers, 1):
            depth = ran / len(arch.layers)
            layer = self.layers[str(number)]
            x, heads = layer(x, arch, there[:, None, None], noise, depth)
            features.append(x)
            attention.append(heads)
        weight = there[..., None].to(x)
        mean = (x * weight).sum(1) / weight.sum(1)
        logits = self.head(noise.features(mean) if noise else mean)
        return Seen(tuple(features), tuple(attention), (arch.heads,) * len(features), there, logits)
