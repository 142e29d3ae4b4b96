"""The chain from supernet to engine: does each form compute what the one before it did?"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from nas.errors import ParityFailed

#: root of the squared difference over the squared outputs, of the worst output. fp32: another order
#: of sums. fp16 and bf16 round to 11 and 8 bits in every layer. An INT8 network may be far off on
#: few images and right on the task, which is judged by its metric; a wrong scale is above even this
TOLERANCE = {"fp32": 1e-4, "fp16": 1e-2, "bf16": 5e-2, "int8": 0.3}

Outputs = Mapping[str, np.ndarray]  # by name, of the same inputs [N, ...]


@dataclass(frozen=True, slots=True)
class Link:
    """Two neighbours in the chain, how far apart they are and how far they may be."""

    name: str  # "onnx = engine"
    precision: str  # the coarser one of the two
    error: float

    @property
    def tolerance(self) -> float:
        return TOLERANCE[self.precision]

    @property
    def holds(self) -> bool:
        return self.error <= self.tolerance  # also false of nan


def link(name: str, precision: str, before: Outputs, after: Outputs) -> Link:
    """Raises ParityFailed where the outputs are not even of the same names and shapes."""
    shapes = [{key: value.shape for key, value in side.items()} for side in (before, after)]
    if shapes[0] != shapes[1]:
        raise ParityFailed(f"outputs are {shapes[0]} and {shapes[1]}", where=name)
    errors = [_relative(before[key], after[key]) for key in before]
    return Link(name, precision, max(errors) if all(map(math.isfinite, errors)) else math.inf)


def require(links: list[Link]) -> None:
    """Raises ParityFailed naming the first link that does not hold."""
    for one in links:
        if not one.holds:
            raise ParityFailed(
                f"outputs differ by {one.error:.3g} of their size",
                where=one.name,
                allowed=f"up to {one.tolerance:g} in {one.precision}",
                next="Export or build it again; if it stays, report this network.",
            )


def coarsest(observed: str) -> str:
    """Of what `observed_precision` says ("int8 18, fp32 3"), the precision with the fewest bits;
    fp32 where nothing is told."""
    words = {part.split()[0] for part in observed.split(", ")}
    return next((name for name in ("int8", "bf16", "fp16") if name in words), "fp32")


def _relative(before: np.ndarray, after: np.ndarray) -> float:
    wanted, got = before.astype(np.float64), after.astype(np.float64)
    scale = math.sqrt(float(np.square(wanted).sum()))
    return math.sqrt(float(np.square(wanted - got).sum())) / max(scale, 1e-30)
