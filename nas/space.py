"""SearchSpace: declared genes, one decoder to an Arch, and everything that follows from them.

A space is one file in `nas/search_spaces/` (or the user's own module) with a class `Space`. It
declares `genes` (name -> options, when active) and `slots` (parts of the network and the genes that
each reads), and gives `decode`, `ops` and `build`. Sampling, mutation, crossover, encoding and
vectorised cost are written here, once, on integer arrays `genes[N, G]` of option indices.

Imports without torch.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from hw_profiles.op import Op, live_elements
from nas.data import module
from nas.errors import NasctlError, unknown

if TYPE_CHECKING:
    from nas.elastic import Network

Genes = NDArray[np.int64]  # [N, G] or [G], indices into each gene's options
#: (which genes [K], strides [K], values [combinations, ...]); a combination's row: genes @ strides
Table = tuple[list[int], NDArray[np.int64], NDArray[np.float64]]


@dataclass(frozen=True)
class Gene:
    """One decision. Inactive (and canonically 0) unless the gene `needs[0]`, declared before it,
    is active and >= `needs[1]`."""

    name: str
    options: tuple[int, ...]  # ascending: the last is the largest network's
    needs: tuple[str, int] | None = None

    def needed_at(self, value: int) -> bool:
        """Is it active when the gene it needs has this value?"""
        return self.needs is None or value >= self.needs[1]


class SearchSpace(ABC):
    """What a space file fills in; everything else about a space is derived."""

    genes: tuple[Gene, ...]
    #: slot name -> the genes that its ops depend on; every op of `ops(arch)` names its slot
    slots: Mapping[str, tuple[str, ...]]
    arch_type: type
    reads: str = "images"  # [N, channels, resolution, resolution]; or "text": token numbers [N, S]

    @abstractmethod
    def decode(self, genes: Genes) -> Any:
        """The Arch of one row of genes [G]."""

    @abstractmethod
    def ops(self, arch: Any) -> list[Op]:
        """Every operator of the network in execution order: the only description of its cost."""

    @abstractmethod
    def build(self, arch: Any) -> Network:
        """A network `net(x, arch=None)`, freshly initialised, that runs any arch up to this one."""

    def supernet(self) -> Network:
        """A network that runs every arch of the space: the largest, where sizes are what is chosen;
        a space that chooses operators overrides this by a network that holds all of them."""
        return self.build(self.decode(self.largest))

    # ---- derived -------------------------------------------------------------------------------

    def __getstate__(self) -> dict[str, Any]:
        """For other processes: without the compiled tables, which are closures."""
        return {name: value for name, value in vars(self).items() if not callable(value)}

    @property
    def sizes(self) -> NDArray[np.int64]:
        """Number of options of each gene [G]."""
        return np.array([len(gene.options) for gene in self.genes])

    @property
    def index(self) -> dict[str, int]:
        return {gene.name: at for at, gene in enumerate(self.genes)}

    @property
    def largest(self) -> Genes:
        return self.sizes - 1

    @property
    def smallest(self) -> Genes:
        return np.zeros(len(self.genes), np.int64)

    def active(self, genes: Genes) -> NDArray[np.bool_]:
        """Which genes have an effect, [N, G] for genes [N, G]."""
        index, mask = self.index, np.ones(genes.shape, bool)
        for at, gene in enumerate(self.genes):
            if gene.needs:
                on, least = index[gene.needs[0]], gene.needs[1]
                enough = np.array(self.genes[on].options)[genes[..., on]] >= least
                mask[..., at] = mask[..., on] & enough
        return mask

    def canonical(self, genes: Genes) -> Genes:
        return np.where(self.active(genes), genes, 0)

    def values(self, genes: Genes) -> dict[str, int]:
        """gene name -> chosen option, for one row."""
        return {g.name: g.options[int(i)] for g, i in zip(self.genes, genes, strict=True)}

    def sample(self, rng: np.random.Generator, n: int) -> Genes:
        """`n` rows, each gene uniform over its options."""
        return self.canonical(self._uniform(rng, n))

    def _uniform(self, rng: np.random.Generator, n: int) -> Genes:
        """As `rng.integers(0, sizes)` to a part in 10^7, in half the time."""
        return (rng.random((n, len(self.genes)), np.float32) * self.sizes).astype(np.int64)

    def mutate(self, genes: Genes, rng: np.random.Generator, rate: float = 0.1) -> Genes:
        """Each gene redrawn with probability `rate`; at least one per row."""
        flip = rng.random(genes.shape, np.float32) < rate
        flip[np.arange(len(genes)), rng.integers(0, genes.shape[1], len(genes))] = True
        return self.canonical(np.where(flip, self._uniform(rng, len(genes)), genes))

    def crossover(self, a: Genes, b: Genes, rng: np.random.Generator) -> Genes:
        """Uniform crossover, row by row."""
        return self.canonical(np.where(rng.random(a.shape, np.float32) < 0.5, a, b))

    def encode(self, genes: Genes) -> NDArray[np.float32]:
        """One-hot rows [N, sum of options]; an inactive gene is all zeros."""
        option = np.where(self.active(genes), genes, -1).astype(np.int16)
        rows = np.empty((len(genes), int(self.sizes.sum())), np.float32)
        ends = self.sizes.cumsum()
        for at, (size, end) in enumerate(zip(self.sizes, ends, strict=True)):
            for chosen in range(size):
                rows[:, end - size + chosen] = option[:, at] == chosen
        return rows

    def count(self) -> int:
        """Number of distinct architectures (a gene that needs another is counted per option)."""
        followers: dict[str, list[Gene]] = {}
        for gene in self.genes:
            if gene.needs:
                followers.setdefault(gene.needs[0], []).append(gene)

        def ways(gene: Gene) -> int:
            return sum(
                math.prod(ways(f) for f in followers.get(gene.name, []) if f.needed_at(option))
                for option in gene.options
            )

        return math.prod(ways(gene) for gene in self.genes if not gene.needs)

    def fold(self, per_op: Callable[[Op], NDArray[np.float64]]) -> Callable[[Genes], Any]:
        """A function genes [N, G] -> [N, K] that sums `per_op(op)` [K] over the ops of each row.

        `ops` is called once per combination of the genes that a slot reads; a row is then one
        gather per slot. Equal to `sum(per_op(op) for op in ops(decode(row)))`, which is tested.
        """
        tables = self.tables(per_op)
        return lambda genes: sum(table[genes[:, at] @ strides] for at, strides, table in tables)

    def tables(self, per_op: Callable[[Op], NDArray[np.float64]]) -> list[Table]:
        """What `fold` looks up: per slot, sums of `per_op(op)` for every combination of genes."""

        def of_slot(ops: list[Op], slot: str) -> NDArray[np.float64]:
            return sum(per_op(op) for op in ops if op.slot == slot) + 0.0 * per_op(ops[0])

        return self._tables(of_slot)

    @cached_property
    def costs(self) -> Callable[[Genes], NDArray[np.float64]]:
        """A function genes [N, G] -> [N, 2]: MACs and parameters."""
        return self.fold(lambda op: np.array([op.macs, op.params], np.float64))

    @cached_property
    def peak_elements(self) -> Callable[[Genes], NDArray[np.float64]]:
        """A function genes [N, G] -> [N]: activation elements live at the peak, batch 1.

        Equal to `peak_activation_bytes(ops(decode(row)), 1)`, which is tested for every space: what
        is live while a slot runs must depend on the genes that the slot reads alone.
        """

        def of_slot(ops: list[Op], slot: str) -> NDArray[np.float64]:
            live = zip(ops, live_elements(ops), strict=True)
            return np.array(max((size for each, size in live if each.slot == slot), default=0))

        tables = self._tables(of_slot)
        return lambda genes: np.max(
            [table[genes[:, at] @ strides] for at, strides, table in tables], axis=0
        )

    def _tables(self, of_slot: Callable[[list[Op], str], NDArray[np.float64]]) -> list[Table]:
        """Per slot, `of_slot(ops, slot)` for every combination of the genes that it reads."""
        index, tables = self.index, []
        for slot, names in self.slots.items():
            at = [index[name] for name in names]
            shape = [len(self.genes[i].options) for i in at]
            rows = []
            for combination in itertools.product(*map(range, shape)):
                genes = self.smallest.copy()  # the other slots as short as they get
                genes[at] = combination
                ops = self.ops(self.decode(self.canonical(genes)))
                rows.append(of_slot(ops, slot))
            strides = np.array([math.prod(shape[i + 1 :]) for i in range(len(shape))], np.int64)
            tables.append((at, strides, np.array(rows, np.float64)))
        return tables


def scalar(per_op: Callable[[Op], float]) -> Callable[[Op], NDArray[np.float64]]:
    """For `fold`: a per-op number as a vector of one."""
    return lambda op: np.array([per_op(op)], np.float64)


def arch_to_dict(arch: Any) -> dict[str, Any]:
    return dataclasses.asdict(arch)


def arch_from_dict(arch_type: type, fields: Mapping[str, Any]) -> Any:
    """The inverse of `arch_to_dict` after a trip through JSON."""

    def tuples(value: Any) -> Any:
        return tuple(tuples(item) for item in value) if isinstance(value, list | tuple) else value

    return arch_type(**{name: tuples(value) for name, value in fields.items()})


def names() -> list[str]:
    """Every shipped space, by file name."""
    folder = Path(__file__).parent / "search_spaces"
    return sorted(path.stem for path in folder.glob("*.py") if not path.stem.startswith("_"))


def load(
    name: str,
    *,
    channels: int = 3,
    classes: int = 10,
    size: int = 32,
    width: float | None = None,
) -> SearchSpace:
    """The space `name` (a file here, or `my_pkg.my_mod`) for images of the given dimensions."""
    if "." not in name and name not in names():
        raise unknown("space", name, names(), where="--space")
    module_name = name if "." in name else f"nas.search_spaces.{name}"
    made = module.call(
        module.attribute(f"{module_name}:Space", "--space"),
        "--space",
        channels=channels,
        classes=classes,
        size=size,
        width=width,
    )
    if not isinstance(made, SearchSpace):
        raise NasctlError(
            f"{name}.Space is no SearchSpace", where="--space", next="See docs/add_a_space.md."
        )
    return made
