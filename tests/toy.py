"""A space without torch, written as a user would write a module, and an analytic problem on it."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from hw_profiles.op import Tape
from nas.search import Problem
from nas.space import Gene, SearchSpace

MODULE = '''
from dataclasses import dataclass
from hw_profiles.op import Tape
from nas.space import Gene, SearchSpace

@dataclass(frozen=True)
class Arch:
    resolution: int
    widths: tuple[int, ...]

class Space(SearchSpace):
    """One elastic convolution and, if deep, another."""
    arch_type = Arch
    slots = {"a": ("width0",), "b": ("depth", "width0", "width1")}

    def __init__(self, *, channels=3, classes=10, size=32, width=None):
        self.channels, self.classes, self.size = channels, classes, size
        self.genes = (
            Gene("depth", (1, 2)),
            Gene("width0", (8, 16, 24)),
            Gene("width1", (8, 16), ("depth", 2)),
        )

    def decode(self, genes):
        value = self.values(genes)
        widths = [value["width0"], value["width1"]][: value["depth"]]
        return Arch(self.size, tuple(widths))

    def ops(self, arch):
        tape = Tape(self.channels, arch.resolution)
        x = tape.input
        for slot, width in zip("ab", arch.widths):
            tape.slot = slot
            x = tape.conv(x, width, kernel=3)
        return tape.ops

    def build(self, arch):
        raise NotImplementedError
'''


@dataclass(frozen=True)
class Arch:
    levels: tuple[int, ...]


class Space(SearchSpace):
    """`n` genes of `options` levels: the analytic toy of the search's tests."""

    arch_type = Arch

    def __init__(self, n: int = 10, options: int = 4) -> None:
        self.genes = tuple(Gene(f"g{i}", tuple(range(options))) for i in range(n))
        self.slots = {f"s{i}": (f"g{i}",) for i in range(n)}

    def decode(self, genes):
        return Arch(tuple(self.values(genes).values()))

    def ops(self, arch):
        tape = Tape(1, 4)
        for i, level in enumerate(arch.levels):
            tape.slot = f"s{i}"
            tape.conv(tape.input, 1 + level)
        return tape.ops

    def build(self, arch):
        raise NotImplementedError


def problem(space=None, *, budget_ms=None, seed=0, limits=()):
    """Latency is additive; cross-entropy falls with every gene, unequally, and two interact."""
    space = space or Space()
    rng = np.random.default_rng(99)
    slow, good = rng.uniform(0.2, 1, (2, len(space.genes)))

    def latency(genes):
        value = 1 + genes @ slow
        return value, 1.1 * value

    def evaluate(genes):
        both = 0.2 * (genes[0] > 1) * (genes[1] > 1)
        ce = 3 - 0.4 * float(good @ np.sqrt(genes)) - both
        return float(ce), float(np.exp(-ce))

    return Problem(space, latency, evaluate, budget_ms, seed, limits)
