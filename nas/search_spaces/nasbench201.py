"""NAS-Bench-201: 15,625 cells of six edges and five operators (Dong and Yang, arXiv 2001.00326).

A stem, three stages of five equal cells at 16, 32 and 64 channels, a residual block that halves the
image between stages. Inside a cell every node adds up what its edges bring. A choice space: its
supernet holds both convolutions of every edge, a stand-alone network only what its edges name.

`index_of` and `genes_at` translate to the benchmark's own numbering, `to_string` and `from_string`
to its text. Both list edges by the node they end in (0>1, 0>2, 1>2, 0>3, ...), genes by the node
they start from (0>1, 0>2, 0>3, 1>2, ...), as the published tables of metrics do.
"""

from __future__ import annotations

import itertools
import random
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, partial

import numpy as np
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from hw_profiles.op import Op, Tape, Wire, live_elements
from nas.choice import Blend, ChoiceNetwork
from nas.elastic import BatchNorm2d, Conv2d, Linear, Middle, Noise, Residual, round_to
from nas.errors import NasctlError
from nas.space import Gene, Genes, SearchSpace

#: from the cheapest up, so that the last option of every gene is the largest network's
OPS = ("none", "skip_connect", "avg_pool_3x3", "nor_conv_1x1", "nor_conv_3x3")
KERNELS = {"nor_conv_1x1": 1, "nor_conv_3x3": 3}
EDGES = ((0, 1), (0, 2), (0, 3), (1, 2), (1, 3), (2, 3))
NODES = 4
#: position in EDGES of each edge in the order of the text and of the benchmark's numbering
BY_END = tuple(EDGES.index((a, b)) for b in range(1, NODES) for a in range(b))
STAGES = (16, 32, 64)  # channels
CELLS = 5  # per stage


@dataclass(frozen=True)
class Arch:
    resolution: int
    width: int  # channels of the first stage; each later one has twice those before
    edges: tuple[str, ...]  # operator of each of EDGES
    cells: int = CELLS


class Space(SearchSpace):
    arch_type = Arch

    def __init__(
        self, *, channels: int = 3, classes: int = 10, size: int = 32, width: float | None = None
    ) -> None:
        self.channels, self.classes, self.size = channels, classes, size
        self.resolution = max(4, round(size / 4) * 4)  # two halvings must come out even
        self.width = round_to(STAGES[0] * (width or 1.0))
        self.genes = tuple(Gene(f"edge{a}{b}.op", tuple(range(len(OPS)))) for a, b in EDGES)
        into = {node: [f"edge{a}{b}.op" for a, b in EDGES if b == node] for node in range(1, NODES)}
        edges = {f"edge{a}{b}": (f"edge{a}{b}.op",) for a, b in EDGES}
        self.slots = {"rest": (), **edges, **{f"node{b}": tuple(into[b]) for b in into}}

    def decode(self, genes: Genes) -> Arch:
        return Arch(self.resolution, self.width, tuple(OPS[int(gene)] for gene in genes))

    def ops(self, arch: Arch) -> list[Op]:
        tape = Tape(self.channels, arch.resolution)
        tape.slot = "rest"
        x = tape.conv(tape.input, arch.width, kernel=3, norm=True)
        for stage in range(len(STAGES)):
            if stage:
                tape.slot = "rest"
                x = _reduction_ops(tape, x)
            for _ in range(arch.cells):
                x = _cell_ops(tape, x, arch.edges)
        tape.slot = "rest"
        x = tape.gap(tape.act(x, "relu", norm=True))
        tape.linear(x, self.classes)
        return tape.ops

    def build(self, arch: Arch) -> CellNet:
        return CellNet(arch, self.channels, self.classes, every=False)

    def supernet(self) -> CellNet:
        return CellNet(self.decode(self.largest), self.channels, self.classes, every=True)

    def peak_elements(self, genes: Genes) -> NDArray[np.float64]:
        """As for every space, by a walk over `ops`: what is live while an edge runs depends on all
        six, so there are no tables. Cells are alike: two of the first stage have every moment."""
        rows, back = np.unique(genes, axis=0, return_inverse=True)
        ends = (self.channels, self.resolution, self.width, self.classes)
        peaks = [_peak(ends, tuple(row)) for row in rows.tolist()]
        return np.array(peaks, np.float64)[back.reshape(-1)]


@cache
def _peak(ends: tuple[int, int, int, int], genes: tuple[int, ...]) -> int:
    channels, size, width, classes = ends
    space = Space(channels=channels, classes=classes, size=size)
    edges = tuple(OPS[gene] for gene in genes)
    return max(live_elements(space.ops(Arch(size, width, edges, cells=2))))


def _cell_ops(tape: Tape, x: Wire, edges: Sequence[str]) -> Wire:
    nodes = [x]
    for node in range(1, NODES):
        arriving = []
        for (start, end), op in zip(EDGES, edges, strict=True):
            if end == node and op != "none":
                tape.slot = f"edge{start}{end}"
                arriving.append(_edge_ops(tape, nodes[start], op))
        tape.slot = f"node{node}"
        total = arriving[0] if arriving else tape.act(x, "zero")
        for other in arriving[1:]:
            total = tape.add(total, other)
        nodes.append(total)
    return nodes[-1]


def _edge_ops(tape: Tape, x: Wire, op: str) -> Wire:
    if op == "skip_connect":
        return x
    if op == "avg_pool_3x3":
        return tape.avgpool(x, kernel=3, stride=1)
    return tape.conv(tape.act(x, "relu"), x.c, kernel=KERNELS[op], norm=True)


def _reduction_ops(tape: Tape, x: Wire) -> Wire:
    y = tape.conv(tape.act(x, "relu"), 2 * x.c, kernel=3, stride=2, norm=True, act="relu")
    y = tape.conv(y, y.c, kernel=3, norm=True)
    return tape.add(tape.conv(tape.avgpool(x), y.c), y)


# ---- the network ---------------------------------------------------------------------------------


class ReLUConvBN(nn.Module):
    """norm(conv(relu(x))), of one width."""

    def __init__(self, c_in: int, c_out: int, kernel: int, stride: int = 1) -> None:
        super().__init__()
        self.conv = Conv2d(c_in, c_out, kernel, stride)
        self.norm = BatchNorm2d(c_out)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.conv(F.relu(x)))


class Cell(nn.Module):
    """Holds, per edge, the convolutions it may be asked for; pools and shortcuts have no weights.

    An edge that brings nothing brings zeros, so that a node without any is a map of zeros.
    """

    def __init__(self, channels: int, held: Sequence[Sequence[str]]) -> None:
        super().__init__()
        self.edges = nn.ModuleList(
            nn.ModuleDict(
                {op: ReLUConvBN(channels, channels, KERNELS[op]) for op in ops if op in KERNELS}
            )
            for ops in held
        )

    def forward(self, x: Tensor, edges: Sequence[str], blend: Blend | None = None) -> Tensor:
        nodes = [x]
        for node in range(1, NODES):
            arriving = [
                self._edge(at, nodes[start], edges[at])
                if blend is None
                else blend(at, nodes[start], [partial(self._edge, at, op=op) for op in OPS])
                for at, (start, end) in enumerate(EDGES)
                if end == node and (blend is not None or edges[at] != "none")
            ]
            total = arriving[0] if arriving else x * 0.0
            for other in arriving[1:]:
                total = total + other
            nodes.append(total)
        return nodes[-1]

    def _edge(self, at: int, x: Tensor, op: str) -> Tensor:
        if op == "none":  # only in a blend
            return x * 0.0
        if op == "skip_connect":
            return x
        if op == "avg_pool_3x3":
            return F.avg_pool2d(x, 3, 1, 1, count_include_pad=False)
        return self.edges[at][op](x)  # type: ignore[index]


class Reduction(Residual):
    """The residual block between two stages: twice the channels, half the side."""

    def __init__(self, c_in: int, c_out: int) -> None:
        super().__init__()
        self.first = ReLUConvBN(c_in, c_out, 3, stride=2)
        self.second = ReLUConvBN(c_out, c_out, 3)
        self.shortcut = Conv2d(c_in, c_out)

    def forward(self, x: Tensor) -> Tensor:
        return self.shortcut(F.avg_pool2d(x, 2)) + self.second(self.first(x))

    def middles(self) -> list[Middle]:
        last = self.second.conv.weight
        norm = self.first.norm.per_channel()
        return [Middle(((self.first.conv.weight, 0), *norm, (last, 1)), last)]


class CellNet(ChoiceNetwork):
    """Runs `arch`, or with `every` candidate any architecture of the space.

    Sub-modules are named by stage and edge, whatever the edges hold, so that extraction finds them.
    """

    def __init__(self, arch: Arch, channels: int, classes: int, *, every: bool) -> None:
        super().__init__()
        self.arch = arch
        held = [OPS if every else (op,) for op in arch.edges]
        self.stem = Conv2d(channels, arch.width, 3)
        self.stem_norm = BatchNorm2d(arch.width)
        self.blocks = nn.ModuleList()
        c = arch.width
        for stage in range(len(STAGES)):
            if stage:
                self.blocks.append(Reduction(c, 2 * c))
                c *= 2
            self.blocks.extend(Cell(c, held) for _ in range(arch.cells))
        self.last_norm = BatchNorm2d(c)
        self.head = Linear(c, classes)

    def forward(
        self,
        x: Tensor,
        arch: Arch | None = None,
        noise: Noise | None = None,
        blend: Blend | None = None,
    ) -> Tensor:
        edges = (arch or self.arch).edges
        x = self.stem_norm(self.stem(x))
        for block in self.blocks:
            x = block(x, edges, blend) if isinstance(block, Cell) else block(x)
        x = F.relu(self.last_norm(x)).mean((2, 3))
        return self.head(noise.features(x) if noise else x)


# ---- the benchmark's own names -------------------------------------------------------------------


def to_string(genes: Sequence[int] | Genes) -> str:
    """The benchmark's text, as in `|avg_pool_3x3~0|+|none~0|skip_connect~1|+|...`."""
    by_end = iter(BY_END)
    nodes = (
        "|".join(f"{OPS[int(genes[next(by_end)])]}~{start}" for start in range(end))
        for end in range(1, NODES)
    )
    return "+".join(f"|{node}|" for node in nodes)


def from_string(text: str) -> Genes:
    """Genes [6] of the benchmark's text; raises NasctlError if it is none."""
    words = re.findall(r"\|?([a-z0-9_]+)~\d\|", text)
    genes = np.zeros(len(EDGES), np.int64)
    if len(words) == len(EDGES) and set(words) <= set(OPS):
        genes[list(BY_END)] = [OPS.index(word) for word in words]
    if to_string(genes) != text.strip():
        example = to_string(np.zeros(len(EDGES), np.int64))
        raise NasctlError(f"no NAS-Bench-201 cell: '{text[:80]}'", allowed=f"text like {example}")
    return genes


@cache
def _numbering() -> tuple[tuple[int, ...], ...]:
    """Genes of network 0, 1, ...: the authors enumerated the cells and shuffled them with seed 88
    of Python's generator, so that the numbers follow without their table (tested against it)."""
    theirs = ("none", "skip_connect", "nor_conv_1x1", "nor_conv_3x3", "avg_pool_3x3")
    cells = list(itertools.product((OPS.index(op) for op in theirs), repeat=len(EDGES)))
    random.Random(88).shuffle(cells)
    return tuple(tuple(cell[BY_END.index(at)] for at in range(len(EDGES))) for cell in cells)


@cache
def _numbers() -> dict[tuple[int, ...], int]:
    return {genes: number for number, genes in enumerate(_numbering())}


def genes_at(number: int) -> Genes:
    """Genes [6] of the benchmark's network `number`, 0 to 15,624."""
    return np.array(_numbering()[number], np.int64)


def index_of(genes: Sequence[int] | Genes) -> int:
    """The benchmark's number of the network with these genes."""
    return _numbers()[tuple(int(gene) for gene in genes)]
