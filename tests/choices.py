"""A choice space of milliseconds: three layers, each an identity or one of two convolutions."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

from torch import nn

from hw_profiles.op import Tape
from nas.choice import ChoiceNetwork
from nas.space import Gene, SearchSpace

OPS = ("skip", "k1", "k3")
KERNELS = {"k1": 1, "k3": 3}
WIDTH = 8


@dataclass(frozen=True)
class Arch:
    resolution: int
    ops: tuple[str, ...]


class Space(SearchSpace):
    arch_type = Arch

    def __init__(self, *, channels=1, classes=4, size=8, width=None, layers=3):
        self.channels, self.classes, self.size = channels, classes, size
        self.genes = tuple(Gene(f"layer{at}.op", (0, 1, 2)) for at in range(layers))
        self.slots = {"ends": (), **{f"layer{at}": (f"layer{at}.op",) for at in range(layers)}}

    def decode(self, genes):
        return Arch(self.size, tuple(OPS[int(gene)] for gene in genes))

    def ops(self, arch):
        tape = Tape(self.channels, arch.resolution)
        tape.slot = "ends"
        x = tape.conv(tape.input, WIDTH, kernel=3)
        for at, op in enumerate(arch.ops):
            tape.slot = f"layer{at}"
            if op != "skip":
                x = tape.conv(x, WIDTH, kernel=KERNELS[op], norm=True, act="relu")
        tape.slot = "ends"
        tape.linear(tape.gap(x), self.classes)
        return tape.ops

    def build(self, arch):
        return Net(self, arch, [(op,) for op in arch.ops])

    def supernet(self):
        return Net(self, self.decode(self.largest), [OPS] * len(self.genes))


class Net(ChoiceNetwork):
    def __init__(self, space, arch, held):
        super().__init__()
        self.arch = arch
        self.stem = nn.Conv2d(space.channels, WIDTH, 3, padding=1, bias=False)
        self.layers = nn.ModuleList(
            nn.ModuleDict({op: self._conv(KERNELS[op]) for op in ops if op in KERNELS})
            for ops in held
        )
        self.head = nn.Linear(WIDTH, space.classes)

    @staticmethod
    def _conv(kernel):
        conv = nn.Conv2d(WIDTH, WIDTH, kernel, padding=kernel // 2, bias=False)
        return nn.Sequential(conv, nn.BatchNorm2d(WIDTH), nn.ReLU())

    def forward(self, x, arch=None, noise=None, blend=None):
        x = self.stem(x)
        for at, op in enumerate((arch or self.arch).ops):
            run = partial(self._layer, at)
            x = run(op, x) if blend is None else blend(at, x, [partial(run, op) for op in OPS])
        return self.head(x.mean((2, 3)))

    def _layer(self, at, op, x):
        return self.layers[at][op](x) if op in KERNELS else x
