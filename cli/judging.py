"""Judging files by the task that their bundle says they are for."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from cli import bundling
from cli.bundling import Feeds
from deploy.interface import Interface
from hw_profiles import runtimes
from nas import multitask, tasks
from nas.data import module
from nas.data.examples import Examples
from nas.errors import NasctlError
from nas.multitask import MultiTask

BATCH = 64

Run = Callable[[Feeds], dict[str, np.ndarray]]  # inputs by name [N, ...] -> outputs by name


@dataclass(frozen=True, eq=False)
class Judge:
    """A task's data, and how a file is fed with it."""

    task: MultiTask
    interface: Interface

    def halves(self, seed: int) -> tuple[Examples, Examples]:
        """The validation images in two: those that decide, and those that say what it cost."""
        val = self.task.val
        rows = torch.randperm(len(val), generator=torch.Generator().manual_seed(seed))
        middle = len(rows) // 2
        return val.at(rows[:middle]), val.at(rows[middle:])

    def batches(self, split: Examples, batch: int = BATCH) -> Iterator[tuple[Feeds, Examples]]:
        """All of a split in order, as the file is fed."""
        for rows in torch.arange(len(split)).split(batch):
            part = split.at(rows)
            inputs = bundling.fed(self.interface, part.images).contiguous().numpy()
            yield {self.interface.input: inputs}, part

    def evidence(self, run: Run, split: Examples) -> dict[str, Tensor]:
        """What each goal's metric needs to know of each image, by goal."""
        found: dict[str, list[Tensor]] = {goal.name: [] for goal in self.task.goals}
        for inputs, part in self.batches(split):
            outputs = {name: torch.from_numpy(value) for name, value in run(inputs).items()}
            answers = multitask.answers(outputs, self.task)
            for goal in self.task.goals:
                found[goal.name].append(goal.evidence(answers, part.targets))
        return {name: torch.cat(parts) for name, parts in found.items()}

    def scores(self, run: Run, split: Examples) -> dict[str, float]:
        return multitask.scores(self.task, self.evidence(run, split))


def judge(interface: Interface, data: str | None) -> Judge:
    """The data that a bundle was made with, at `data` if they are not where they were.

    Raises NasctlError for other data than those, and for data that are code, which nobody but the
    user names: a bundle may be a stranger's.
    """
    module.require_typed(data, interface.data)
    reference = data or interface.data
    if interface.classification:
        single = tasks.load(reference, size=interface.data_size)
        fingerprint, task = single.fingerprint, multitask.single(single, single.size)
    else:
        task = multitask.load(reference, size=interface.data_size).only(interface.goals)
        fingerprint = task.fingerprint
    if fingerprint != interface.data_sha256:
        raise NasctlError(
            "are not the data that the model was made with",
            where=f"--data {reference}",
            next=f"They were at {interface.data}; nothing is judged or calibrated by others.",
        )
    return Judge(task, interface)


def runner(
    model: bytes | Path, runtime: str, *, threads: int = 1, precision: str | None = None
) -> Run:
    """A file in a runtime of this machine."""
    library = runtimes.load_module(runtime)
    session = library.load(model, threads=threads, precision=precision)
    # engines are compiled for one example at a time
    alone = any(shape[0] == 1 for shape in session.inputs.values())

    def run(feeds: Feeds) -> dict[str, np.ndarray]:
        found = [library.run(session, part) for part in (singly(feeds) if alone else [feeds])]
        outputs = (np.concatenate(each) for each in zip(*found, strict=True))
        return dict(zip(session.outputs, outputs, strict=True))

    return run


def singly(feeds: Feeds) -> Iterator[Feeds]:
    """One example after the other."""
    for at in range(min(map(len, feeds.values()))):
        yield {name: values[at : at + 1] for name, values in feeds.items()}


def spent(
    before: Mapping[str, float], after: Mapping[str, float], bound: dict[str, float]
) -> float:
    """The largest share of its bound (a relative drop) that any goal uses; 1 is all of it. A metric
    that is not a number is beyond any bound."""
    shares = [
        (before[name] - after[name]) / max(abs(before[name]), 1e-12) / bound[name] for name in bound
    ]
    return max(share if math.isfinite(share) else math.inf for share in shares)
