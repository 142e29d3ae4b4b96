"""Has a training collapsed? Supernets sometimes fall back to chance late and stay there: the loss
jumps to ln(classes) and does not move again (reported of AttentiveNAS at epochs 4 and 169).

A `Watch` is a value that is saved with the weights, so a resumed training judges as one that was
never stopped.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

MARGIN = 0.05  # nats around ln(classes)
PATIENCE = 20  # steps
MAX_HALVINGS = 3


@dataclass(frozen=True)
class Watch:
    """What a training's losses have said so far."""

    halvings: int = 0  # of the learning rate, after collapses
    learned: bool = False  # it has been below chance for PATIENCE steps in a row
    below: int = 0  # steps in a row below chance, at most PATIENCE
    stuck: int = 0  # steps in a row at chance, after having learned
    finite: bool = True

    def after(self, losses: Sequence[float], chance: float) -> Watch:
        """The watch after a step. `chance`: ln(classes), or infinity where the loss has no such
        level; losses[0] is the largest network's."""
        finite = all(map(math.isfinite, losses))
        below = min(self.below + 1, PATIENCE) if losses[0] < chance - MARGIN else 0
        stuck = self.stuck + 1 if self.learned and abs(losses[0] - chance) <= MARGIN else 0
        learned = self.learned or below == PATIENCE
        return replace(self, learned=learned, below=below, stuck=stuck, finite=finite)

    @property
    def collapsed(self) -> bool:
        return not self.finite or self.stuck >= PATIENCE

    @property
    def calm(self) -> bool:
        """Weights of this moment may be returned to."""
        return self.finite and (self.below == PATIENCE or not self.learned)

    def rolled_back(self) -> Watch:
        """Afresh with half the learning rate."""
        return Watch(halvings=self.halvings + 1)
