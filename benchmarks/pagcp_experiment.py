"""What the rows of the pruning benchmark share: data, networks, trainings, judging.

A row's network, the evidence of its test images and its unfinished training lie in a folder under
the row's name, so that a run that was stopped goes on in the middle of a training, and intervals
between rows can be computed when all are there.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks import contract, multitask_nets
from nas import checkpoint, multitask, paired
from nas.elastic import channels_last
from nas.errors import NasctlError
from nas.multitask import MultiTask
from nas.multitask_training import Schedule, train

WIDTHS = (32, 32, 64, 128)

Key = dict[str, Any]


@dataclass(frozen=True)
class Experiment:
    """One multi-task and its network."""

    name: str
    task: MultiTask
    build: Callable[[Sequence[int]], nn.Module]
    dense: Schedule
    tuning: Schedule  # what follows pruning
    rows: contract.Rows
    folder: Path
    #: of a row's measurement: fresh processes, and for how long each measures
    processes: int = 3
    turns_s: float = 8.0

    def key(self, method: str, seed: int, **more: str) -> Key:
        return {"network": self.name, "method": method, "seed": seed, **more}

    @property
    def example(self) -> Tensor:
        return self.task.normalise(self.task.train.images[:1])

    def initial(self, seed: int, widths: Sequence[int] = WIDTHS) -> nn.Module:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return channels_last(self.build(widths))

    def row(self, key: Key, work: Callable[[], Key]) -> Key:
        """The row of that name, from `work()` if it is not on disk yet."""
        known = self.rows.get(key)
        if known is not None:
            return known
        began = time.monotonic()
        found = {**work(), "seconds": round(time.monotonic() - began, 1)}
        self.rows.add(key, found)
        print(json.dumps({**key, **found}), flush=True)
        return found

    def trained(
        self, key: Key, net: nn.Module, schedule: Schedule, teacher: nn.Module | None = None
    ) -> nn.Module:
        """`net` after `schedule`, in eval mode: from the folder if it was trained before, by the
        same schedule."""
        done, state = self.path(key, "net.safetensors"), self.path(key, "state.safetensors")
        schedule = replace(schedule, seed=key["seed"])
        if done.exists():
            tensors, said = checkpoint.read(done)
            if said["schedule"] != str(schedule):
                raise NasctlError(f"trained by {said['schedule']}, not {schedule}", where=str(done))
            checkpoint.fill(net, tensors, done)
            return net.eval()
        for _ in train(net, self.task, schedule, teacher=teacher, resume=state):
            pass
        checkpoint.write(done, net.state_dict(), {"schedule": str(schedule)})
        state.unlink(missing_ok=True)
        return net.eval()

    def network(self, seed: int) -> nn.Module:
        """The dense one, converged."""
        return self.trained(self.key("dense", seed), self.initial(seed), self.dense)

    def judged(self, key: Key, net: nn.Module) -> dict[str, dict[str, float]]:
        """Metrics on test and val; the evidence of the test images is kept."""
        seen = multitask.evidence(net, self.task, self.task.test)
        checkpoint.write(self.path(key, "evidence.safetensors"), seen, {})
        val = multitask.evidence(net, self.task, self.task.val)
        return {"test": multitask.scores(self.task, seen), "val": multitask.scores(self.task, val)}

    def changes(self, before: Sequence[Key], after: Sequence[Key]) -> dict[str, list[float]]:
        """Each goal's change on test, relative, with its 95 % interval; one key per seed."""
        seen = [[self._evidence(key) for key in keys] for keys in (before, after)]
        found = {}
        for goal in self.task.goals:
            old, new = ([one[goal.name] for one in side] for side in seen)
            got = paired.change(goal, old, new, rng=np.random.default_rng(0))
            found[goal.name] = [got.value, got.low, got.high]
        return found

    def _evidence(self, key: Key) -> Mapping[str, Tensor]:
        return checkpoint.read(self.path(key, "evidence.safetensors"))[0]

    def path(self, key: Key, kind: str) -> Path:
        name = "-".join(str(value) for value in key.values()).replace(" ", "_")
        return self.folder / f"{name}.{kind}"


#: data, shorter side in pixels, network, dense training, fine-tuning. Rates are the usual ones for
#: the batch, not searched; fine-tuning has a third of the rate and of the length (the paper's is as
#: long as training). A sixth left 1 to 2 points to gain, on validation images.
_SETTINGS: dict[str, tuple[str, int, Callable[..., nn.Module], Schedule, Schedule]] = {
    "class_box": (
        "tiny_imagenet_20",
        48,
        multitask_nets.class_box,
        Schedule(steps=140 * 80, batch=64, lr=0.1),  # 40 epochs: 1.2 points less on validation
        Schedule(steps=140 * 26, batch=64, lr=0.03),
    ),
    "street": (
        "camvid",
        96,
        multitask_nets.street,
        Schedule(steps=22 * 180, batch=16, lr=0.05),
        Schedule(steps=22 * 60, batch=16, lr=0.02),
    ),
}
NETWORKS = tuple(_SETTINGS)


def load(name: str, rows: contract.Rows, folder: Path) -> Experiment | None:
    """None where its data is absent."""
    source, size, build, dense, tuning = _SETTINGS[name]
    path = contract.data(source)
    if path is None:
        return None
    task = multitask.load(str(path), size=size)
    return Experiment(name, task, build, dense, tuning, rows, folder)


def shortened(experiment: Experiment, images: int, steps: int) -> Experiment:
    """Few images and steps, for a quick run whose figures mean nothing."""
    task = experiment.task
    train, val, test = (
        split.at(torch.arange(min(images, len(split)))) for split in task.splits.values()
    )
    task = replace(task, train=train, val=val, test=test)
    few = Schedule(steps=steps, batch=8, lr=0.05)
    return replace(experiment, task=task, dense=few, tuning=few, processes=1, turns_s=1.0)
