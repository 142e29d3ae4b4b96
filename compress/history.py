"""What was pruned, by index: replayed on a fresh copy of the network it gives the same one, bit by
bit. Ratios would not do: norms recomputed on another network may choose other filters."""

from __future__ import annotations

import copy
import json
from dataclasses import dataclass

from torch import nn

from compress.graph import Graph, Inputs
from nas.errors import NasctlError


@dataclass(frozen=True)
class Step:
    """Outputs of the module `root` that went, counted on the network as it then was."""

    root: str
    indices: tuple[int, ...]


@dataclass(frozen=True)
class History:
    steps: tuple[Step, ...] = ()

    def then(self, *steps: Step) -> History:
        return History((*self.steps, *steps))

    def replay(self, net: nn.Module, example_inputs: Inputs) -> nn.Module:
        """A pruned copy of `net`, which must be the network the first step was taken on."""
        net = copy.deepcopy(net).eval()
        for step in self.steps:
            Graph(net, example_inputs).prune_(step.root, step.indices)
        return net

    def to_json(self) -> str:
        return json.dumps([[step.root, list(step.indices)] for step in self.steps])

    @classmethod
    def from_json(cls, text: str) -> History:
        """Raises NasctlError for anything else than what `to_json` wrote."""
        try:
            return cls(tuple(Step(str(root), _indices(found)) for root, found in json.loads(text)))
        except (ValueError, TypeError) as error:
            raise NasctlError(f"not a history of pruning ({error})", where="history") from error


def _indices(found: list[int]) -> tuple[int, ...]:
    if not all(isinstance(index, int) and index >= 0 for index in found):
        raise ValueError(f"indices {found!r:.60}")
    return tuple(found)
