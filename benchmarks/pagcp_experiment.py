"""What the rows of the pruning benchmark share: data, networks, trainings, judging.

A row's network, the evidence of its test images and its unfinished training lie in a folder under
the row's name, so that a run that was stopped goes on in the middle of a training, and paired
intervals between rows can be computed later.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks import contract, multitask_nets
from nas import checkpoint, multitask
from nas.elastic import channels_last
from nas.multitask import MultiTask
from nas.multitask_training import Schedule, train

Key = dict[str, Any]


@dataclass(frozen=True)
class Experiment:
    """One multi-task with its network. Trained twice as long, the dense one changes by less than
    half a point (part `dense` shows it)."""

    name: str
    task: MultiTask
    build: Callable[[Sequence[int]], nn.Module]
    widths: tuple[int, ...]
    dense: Schedule
    tuning: Schedule  # what follows pruning
    rows: contract.Rows
    folder: Path

    def key(self, method: str, seed: int, **more: Any) -> Key:
        return {"network": self.name, "method": method, "seed": seed, **more}

    def initial(self, seed: int, widths: Sequence[int] | None = None) -> nn.Module:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return channels_last(self.build(widths or self.widths))

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
        """`net` after `schedule`, in eval mode: from the folder if it was trained before."""
        done, state = self.file(key, "net"), self.file(key, "state")
        if done.exists():
            checkpoint.fill(net, checkpoint.read(done)[0], done)
            return net.eval()
        schedule = replace(schedule, seed=key["seed"])
        for _ in train(net, self.task, schedule, teacher=teacher, resume=state):
            pass
        checkpoint.write(done, net.state_dict(), {})
        state.unlink(missing_ok=True)
        return net.eval()

    def dense_network(self, seed: int) -> nn.Module:
        return self.trained(self.key("dense", seed), self.initial(seed), self.dense)

    def judged(self, key: Key, net: nn.Module) -> Key:
        """Metrics on val and test; the evidence of the test images is kept."""
        seen = multitask.evidence(net, self.task, self.task.test)
        checkpoint.write(self.file(key, "evidence"), seen, {})
        val = multitask.evidence(net, self.task, self.task.val)
        return {
            "test": multitask.scores(self.task, seen),
            "val": multitask.scores(self.task, val),
        }

    def evidence(self, key: Key) -> dict[str, Tensor]:
        """Of the test images, as kept when the row was made."""
        return checkpoint.read(self.file(key, "evidence"))[0]

    def file(self, key: Key, kind: str) -> Path:
        name = "-".join(str(value) for value in key.values()).replace(" ", "_")
        return self.folder / f"{name}.{kind}.safetensors"


def experiments(rows: contract.Rows, folder: Path) -> dict[str, Experiment]:
    """Those whose data is there."""
    made = {}
    for name, (source, size, build, dense, tuning) in _SETTINGS.items():
        path = contract.data(source)
        if path is not None:
            task = multitask.load(str(path), size=size)
            widths = (32, 32, 64, 128)
            made[name] = Experiment(name, task, build, widths, dense, tuning, rows, folder)
    return made


#: data, shorter side in pixels, network, dense training, fine-tuning. Rates: the usual ones for the
#: batch, not searched; the fine-tuning's is a third, its length a sixth.
_SETTINGS: dict[str, tuple[str, int, Callable[..., nn.Module], Schedule, Schedule]] = {
    "class_box": (
        "tiny_imagenet_20",
        48,
        multitask_nets.class_box,
        Schedule(steps=140 * 40, batch=64, lr=0.1),
        Schedule(steps=140 * 7, batch=64, lr=0.03),
    ),
    "street": (
        "camvid",
        96,
        multitask_nets.street,
        Schedule(steps=22 * 100, batch=16, lr=0.05),
        Schedule(steps=22 * 16, batch=16, lr=0.02),
    ),
}
