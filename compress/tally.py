"""What networks of one pruning cost, each figure on record: sessions differ, so a pruning that goes
on after a kill comes to the same network only by the figures that it saw before."""

from __future__ import annotations

import statistics
from dataclasses import dataclass

from torch import nn

from compress.cost import against, sessions, shape_of
from compress.job import Job
from compress.record import Record


@dataclass(frozen=True)
class Tally:
    job: Job
    known: Record

    def of(self, net: nn.Module) -> float:
        key = f"{self.job.cost.unit} of {shape_of(net)}"
        return self.known.of(key, lambda: self.job.cost.of(net, self.job.example_inputs))

    def against(self, net: nn.Module, target: float) -> float:
        """As sure as it has to be to tell whether the target is met."""
        job, key = self.job, f"{self.job.cost.unit} of {shape_of(net)} against {target}"
        return self.known.of(key, lambda: against(job.cost, target, net, job.example_inputs))

    def confirmed(self, net: nn.Module) -> float:
        """Taken anew, of what `against` let through."""
        key = f"{self.job.cost.unit} of {shape_of(net)}, confirmed"
        return self.known.of(key, lambda: self.job.cost.confirmed(net, self.job.example_inputs))

    def saved(self, before: nn.Module, after: nn.Module) -> float:
        """The median of what sessions say that each see both."""
        job, key = self.job, f"{self.job.cost.unit} from {shape_of(before)} to {shape_of(after)}"

        def taken() -> float:
            pairs = sessions(job.cost, [before, after], job.example_inputs)
            return statistics.median(old - new for old, new in pairs)

        return self.known.of(key, taken)
