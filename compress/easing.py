"""Prune no further than the target asks: which channels come back first.

An extension of PAGCP, in its own currency: what a width costs the tasks per cost that it saves.
The worst bargains are undone first, wherever they are, so that layers which hardly cost anything to
run are left alone unless the target cannot do without them.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from compress.units import Unit


@dataclass(frozen=True)
class Bargain:
    """Pruning `unit` from width `wide` to width `narrow`: growth of losses per cost saved."""

    unit: Unit
    wide: int
    narrow: int
    price: float


def bargains(unit: Unit, grown: Mapping[int, float], saved: Mapping[int, float]) -> list[Bargain]:
    """The way from the whole unit to its narrowest accepted width, prices rising: corners of the
    lower convex hull of growth over savings, both against the whole unit.

    `grown` by width, widest first, in one currency for all units; `saved` has the same widths.
    """
    points = [(0.0, 0.0, unit.width)]
    worst = 0.0
    for width, growth in grown.items():
        worst = max(worst, growth)  # what a narrower width costs, a wider one cost at most
        if saved[width] > points[-1][0]:
            points.append((saved[width], worst, width))
    hull: list[tuple[float, float, int]] = []
    for point in points:
        while len(hull) > 1 and _price(hull[-2], hull[-1]) >= _price(hull[-1], point):
            hull.pop()
        hull.append(point)
    pairs = zip(hull, hull[1:], strict=False)
    return [Bargain(unit, wide[2], narrow[2], _price(wide, narrow)) for wide, narrow in pairs]


def _price(wide: tuple[float, float, int], narrow: tuple[float, float, int]) -> float:
    return (narrow[1] - wide[1]) / (narrow[0] - wide[0])


def worst_first(every: Iterable[Bargain]) -> list[Bargain]:
    """The order in which bargains are undone. A unit's own come narrowest first, as its prices
    rise; equal prices keep it so."""
    return sorted(every, key=lambda one: (-one.price, one.narrow))
