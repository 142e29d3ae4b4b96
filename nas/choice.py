"""Networks that hold every candidate operator of each decision, and how candidates are combined.

A supernet of a choice space runs one architecture, `net(x, arch)`. The differentiable strategies
need more: a decision's output as a mixture of its candidates, or a way to see what the candidates
that were not chosen would have said. They pass a Blend, an argument of one forward pass as the
architecture is, so nothing is stored on a module.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from nas.elastic import Network, Noise

Candidate = Callable[[Tensor], Tensor]
#: (number of the gene, input of the decision, one candidate per option of the gene) -> its output
Blend = Callable[[int, Tensor, Sequence[Candidate]], Tensor]


class ChoiceNetwork(Network):
    """A supernet that, given a `blend`, asks it for the output of every decision; `arch` is then
    what the parts that are not chosen are built like. Cells that repeat ask it once per cell. A
    candidate that brings nothing is `x * 0.0`, so that a gradient can say what it is worth."""

    def forward(
        self,
        x: Tensor,
        arch: Any = None,
        noise: Noise | None = None,
        blend: Blend | None = None,
    ) -> Tensor:
        raise NotImplementedError
