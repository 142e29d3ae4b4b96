"""The chain from supernet to engine: does each form compute what the one before it did?"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from nas.errors import ParityFailed

#: root of the squared difference over the squared outputs, of the worst output. fp32: another order
#: of sums. fp16 and bf16 round to 11 and 8 bits in every layer. An INT8 network may be far off on
#: few images and right on the task, which is judged by its metric; GAIN is what it must keep
TOLERANCE = {"fp32": 1e-4, "fp16": 1e-2, "bf16": 5e-2, "int8": 0.3}
#: how far the best-fit factor between the two sides, of an output or a column of one, may be from
#: 1: rounding is noise, of MobileNets up to 0.06; a wrong scale is not
GAIN = 0.2
LOUD = 3  # a column this many times as far off as the median one is not just noisy,
ROWS = 8  # seen on at least so many values
#: two libraries round one INT8 network's sums apart: as far as INT8 was from float, in what was
#: measured; this many times that, at least BUILT
TWICE, BUILT = 2.0, 5e-2

Outputs = Mapping[str, np.ndarray]  # by name, of the same inputs [N, ...]


@dataclass(frozen=True, slots=True)
class Link:
    """Two neighbours in the chain, how far apart they are and how far they may be."""

    name: str  # "onnx = engine"
    precision: str  # the coarser one of the two
    error: float
    gain: float = 1.0  # of the output or column whose best-fit factor is farthest from 1
    limit: float = math.inf  # of the error, where it is below the precision's

    @property
    def tolerance(self) -> float:
        return min(TOLERANCE[self.precision], self.limit)

    @property
    def holds(self) -> bool:
        return self.error <= self.tolerance and abs(self.gain - 1) <= GAIN  # also false of nan


def link(
    name: str, precision: str, before: Outputs, after: Outputs, limit: float = math.inf
) -> Link:
    """Raises ParityFailed where the outputs are not even of the same names and shapes."""
    shapes = [{key: value.shape for key, value in side.items()} for side in (before, after)]
    if shapes[0] != shapes[1]:
        raise ParityFailed(f"outputs are {shapes[0]} and {shapes[1]}", where=name)
    errors = [_relative(before[key], after[key]) for key in before]
    if not all(map(math.isfinite, errors)):
        return Link(name, precision, math.inf, limit=limit)
    gains = [gain for key in before for gain in _gains(before[key], after[key])]
    worst = max(gains, key=lambda gain: abs(gain - 1), default=1.0)
    return Link(name, precision, max(errors), worst, limit)


def built(from_float: float) -> float:
    """How far an engine may be from the INT8 file that it was built from, which is `from_float`
    away from its float file."""
    return max(BUILT, TWICE * from_float)


def require(links: list[Link]) -> None:
    """Raises ParityFailed naming the first link that does not hold."""
    for one in links:
        if not one.holds:
            said = f"outputs differ by {one.error:.3g} of their size"
            allowed = f"up to {one.tolerance:.3g} in {one.precision}"
            if one.error <= one.tolerance:
                said = f"an output, or a column of one, is {one.gain:.3g} times its size"
                allowed = f"{1 - GAIN:g} to {1 + GAIN:g}"
            raise ParityFailed(
                said,
                where=one.name,
                allowed=allowed,
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


def _gains(before: np.ndarray, after: np.ndarray) -> list[float]:
    """The best-fit factor from `before` to `after`, of the whole and of every column that is much
    farther off than the others: of any other it is noise."""
    wanted, got = _columns(before), _columns(after)
    energy, shared = np.square(wanted).sum(0), (wanted * got).sum(0)
    if not energy.sum() > 0:
        return []
    whole = float(shared.sum() / energy.sum())
    if len(wanted) < ROWS:
        return [whole]
    error = np.square(wanted - got).sum(0)
    loud = (error > LOUD**2 * np.quantile(error, 0.5, method="lower")) & (energy > 0)
    return [whole, *map(float, shared[loud] / energy[loud])]


def _columns(values: np.ndarray) -> np.ndarray:
    """[rows, columns]: a column is a channel of maps, else one of the last axis: a class, a
    coordinate. One number per input is one column."""
    if values.ndim < 2:
        return values.astype(np.float64).reshape(-1, 1)
    axis = 1 if values.ndim > 3 else -1
    return np.moveaxis(values.astype(np.float64), axis, -1).reshape(-1, values.shape[axis])
