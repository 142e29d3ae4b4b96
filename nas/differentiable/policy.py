"""What a differentiable search learns, and the latency that it learns it under.

The distribution is a product of categoricals over the space's genes. Latency is a sum over the
parts of a network (`SearchSpace.tables`), so its expectation under such a distribution is exact and
differentiable: a weighted sum of table entries, for parts that read several genes too.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from hw_profiles.latency import LatencyTable
from hw_profiles.op import Op
from nas.errors import NasctlError
from nas.space import Genes, SearchSpace, Table

Array = NDArray[np.float64]


class Policy(nn.Module):
    """Logits [G, K] in double precision, -inf where a gene has fewer options, with Adam's moments:
    buffers, so that a checkpoint of the module is all that a search has learned."""

    logits: Tensor
    first: Tensor
    second: Tensor
    count: Tensor

    def __init__(self, sizes: NDArray[np.int64]) -> None:
        super().__init__()
        there = torch.arange(int(sizes.max())) < torch.from_numpy(sizes)[:, None]
        zeros = torch.zeros(there.shape, dtype=torch.float64)
        self.register_buffer("logits", zeros.masked_fill(~there, -torch.inf))
        self.register_buffer("first", zeros.clone())
        self.register_buffer("second", zeros.clone())
        self.register_buffer("count", torch.zeros((), dtype=torch.float64))

    @property
    def probs(self) -> Tensor:
        return self.logits.softmax(1)

    def entropy(self) -> float:
        """As a share of the uniform distribution's: 1 at first, 0 when settled."""
        terms = torch.special.entr(self.probs).sum()
        most = torch.isfinite(self.logits).sum(1).double().log().sum()
        return float(terms / most)

    def draw(self, generator: torch.Generator) -> Genes:
        """One row [G]."""
        return torch.multinomial(self.probs, 1, generator=generator)[:, 0].numpy()

    @torch.no_grad()
    def step(self, gradient: Tensor, rate: float, decays: tuple[float, float]) -> None:
        """Adam (arXiv 1412.6980). With a first decay of 0, what has no gradient stays."""
        self.count += 1
        self.first.lerp_(gradient, 1 - decays[0])
        self.second.lerp_(gradient.square(), 1 - decays[1])
        mean = self.first / (1 - decays[0] ** self.count)
        scale = (self.second / (1 - decays[1] ** self.count)).sqrt() + 1e-8
        self.logits -= rate * mean / scale


@dataclass(frozen=True)
class Latency:
    """Milliseconds of any network: a constant and one table entry per part.

    Raises NasctlError if an entry is not a number: a table that lacks an operator must say so.
    """

    constant_ms: float
    tables: Sequence[Table]
    sizes: NDArray[np.int64]  # options of each gene [G]

    def __post_init__(self) -> None:
        if not all(np.isfinite(values).all() for _, _, values in self.tables):
            raise NasctlError("an operator without a latency", where="latency table")

    def of(self, rows: Genes) -> Array:
        """[N] of rows [N, G]."""
        parts = [values[rows[:, at] @ strides].reshape(-1) for at, strides, values in self.tables]
        return self.constant_ms + np.sum(np.broadcast_arrays(*parts, np.zeros(len(rows))), axis=0)

    def expected(self, probs: Tensor) -> Tensor:
        """Under independent genes of these probabilities [G, K]; linear in those of each gene."""
        total = probs.new_tensor(self.constant_ms)
        for at, _, values in self.tables:
            shape = [int(self.sizes[gene]) for gene in at]
            part = torch.from_numpy(values).to(probs).reshape(shape or [1])
            for gene in at:
                part = torch.tensordot(probs[gene, : part.shape[0]], part, dims=([0], [0]))
            total = total + part.sum()
        return total


def latency_of(space: SearchSpace, name: str, table: LatencyTable) -> Latency:
    """Upper ends of the table's 90 % interval, which is what a budget is held against."""
    nothing = np.zeros(len(table.columns(_any_op(space))))
    constant = float(table.combine(nothing, name)[2])

    def high(op: Op) -> Array:
        return np.array([float(table.combine(table.columns(op), name)[2]) - constant])

    return Latency(constant, space.tables(high), space.sizes)


def free(space: SearchSpace) -> Latency:
    """A millisecond whatever is chosen: for timing a step where no latency is known."""
    nothing = [np.zeros((int(size), 1)) for size in space.sizes]
    tables = [([at], np.array([1]), values) for at, values in enumerate(nothing)]
    return Latency(1.0, tables, space.sizes)


def _any_op(space: SearchSpace) -> Op:
    return space.ops(space.decode(space.largest))[0]
