"""How the permitted growth of a loss is shared out among units (PAGCP's lambda equation).

The thresholds of L units are d0, d0 * lambda, d0 * lambda^2, ...; lambda is the root of
prod(1 + d0 * lambda^i) = D, so that units which use up their thresholds use up D between them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

from nas.errors import UsageError

#: of the logarithm of D, times the number of units: 0.06 of a growth to 6 over 51 units (YOLOv5s)
FIRST_SHARE = math.log(1.06) / math.log(6) * 51


def solve(first: float, total: float, n: int) -> float:
    """lambda for d0 = `first`, D = `total` and `n` units, by bisection: the product grows with it.

    Raises UsageError where the first unit alone would be permitted as much as all are, or more.
    """
    if n == 1:
        return 1.0
    if not 0 < first < total - 1:
        raise UsageError(
            f"{100 * first:g} % for the first unit",
            where="first",
            allowed=f"above 0, below the {100 * (total - 1):g} % of the whole",
        )

    def excess(factor: float) -> float:
        return sum(math.log1p(first * factor**i) for i in range(n)) - math.log(total)

    low, high = 0.0, 1.0
    while excess(high) < 0:
        low, high = high, 2 * high
    while high - low > 1e-15 * high:
        middle = (low + high) / 2
        if not low < middle < high:
            break
        low, high = (middle, high) if excess(middle) < 0 else (low, middle)
    return high


class Schedule:
    """Thresholds of every task for the first, second, ... unit that is pruned.

    Tasks with other bounds D get the same shares of the logarithm of theirs, so that each task's
    thresholds multiply to its own D.
    """

    def __init__(self, bounds: Mapping[str, float], first: float | None, n: int) -> None:
        loosest = max(bounds.values())
        if first is None:
            first = loosest ** min(1.0, FIRST_SHARE / n) - 1
        elif n == 1:
            first = loosest - 1
        self.factor = solve(first, loosest, n)
        self._logs = {task: math.log(total) for task, total in bounds.items()}
        self._shares = [math.log1p(first * self.factor**i) / math.log(loosest) for i in range(n)]

    @property
    def ascending(self) -> bool:
        """Thresholds grow, so the unit whose pruning saves least goes first."""
        return self.factor > 1

    def thresholds(self, accepted: int) -> dict[str, float]:
        """d of each task for the unit that would be number `accepted` (from 0) to be pruned."""
        return {t: math.expm1(log * self._shares[accepted]) for t, log in self._logs.items()}
