"""The loop of every training that can be stopped: step, save when due, yield.

A step is a function of its number and of the state that the steps before it left, never of a
generator's history. So a training that goes on from its file ends exactly as if it had not stopped.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, TypeVar

import torch
from torch import Tensor, nn

from nas import checkpoint, parallel


class Report(Protocol):
    """What a step gives to the caller of a training."""

    @property
    def step(self) -> int:
        """Steps done so far; fewer than before where a step has returned to an earlier state."""


class State(Protocol):
    """What a training is between two steps, on disk."""

    def load(self) -> int:
        """Return to what is on disk, if anything is; the steps done until then."""

    def save(self, done: int) -> None: ...


R = TypeVar("R", bound=Report)


@dataclass(frozen=True)
class Weights:
    """The state of most trainings: a network, its optimiser and the step in one file.

    Without a `path` nothing is read or written. `identity` names all that the result depends on: a
    file that another one is written in is refused (NasctlError). Of several processes the first
    alone reads and writes.
    """

    path: Path | None
    net: nn.Module
    optimiser: torch.optim.Optimizer
    identity: str

    def load(self) -> int:
        if self.path is None:
            return 0
        return checkpoint.load(self.path, self.net, self.optimiser, self.identity)

    def save(self, done: int, *, safe: Mapping[str, Tensor] | None = None, notes: str = "") -> None:
        """`safe` and `notes` as in `checkpoint.save`."""
        if self.path is None or not parallel.workers().first:
            return
        state = checkpoint.state(self.net, self.optimiser)
        checkpoint.save(self.path, state, done, self.identity, safe=safe, notes=notes)


def train(
    step: Callable[[int], R], state: State, steps: int, save_every_s: float
) -> Generator[R, None, None]:
    """Call `step(done)` from where `state` was left until `steps` are done, yielding its reports.

    The state is saved every `save_every_s` seconds, after the last step, and when the caller closes
    the generator.
    """
    done = state.load()
    saved_at = time.monotonic()
    while done < steps:
        report = step(done)
        done = report.step
        due = done == steps or time.monotonic() - saved_at > save_every_s
        if due:
            state.save(done)
            saved_at = time.monotonic()
        try:
            yield report
        except GeneratorExit:
            # The caller stops between two steps, where weights and momentum agree. (An interrupt
            # inside a step is not caught: the file of the last save stands.)
            if not due:
                state.save(done)
            raise
