"""What the rows of the pruning benchmark share: data, networks, trainings, judging.

A row's network, the evidence of its test images and its unfinished training lie in a folder under
the row's name, so that a run that was stopped goes on in the middle of a training, and intervals
between rows can be computed when all are there. A row whose files are gone is made again.
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
from compress import losses
from compress.objective import Objective
from nas import checkpoint, multitask, paired
from nas.data import camvid
from nas.data.examples import Examples
from nas.elastic import channels_last, recalibrate
from nas.errors import NasctlError
from nas.multitask import BATCH_EVAL, MultiTask
from nas.multitask_training import Schedule, train

WIDTHS = (32, 32, 64, 128)
TO_TEST = 2000  # of class_box's training images: 1,000 tell a class change to 3 points only
BLOCK = 12  # neighbouring frames of CamVid, a frame per second: alike, so drawn or held out as one
EVERY = 4  # of those blocks is held out of CamVid's train
NORMS = 512  # training images that norms are estimated on anew

SPLITS = ("test", "val")  # what networks are judged on

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
    block: int = 1  # neighbouring test images that are drawn together
    #: of a row's measurement: fresh processes, and for how long each measures
    processes: int = 3
    turns_s: float = 4.0

    def key(self, method: str, seed: int, **more: str) -> Key:
        return {"network": self.name, "method": method, "seed": seed, **more}

    @property
    def example(self) -> Tensor:
        return self.task.normalise(self.task.train.images[:1])

    @property
    def objectives(self) -> list[Objective]:
        return [Objective(goal.name, goal.loss) for goal in self.task.goals]

    def of_epochs(self, schedule: Schedule, epochs: int) -> Schedule:
        return replace(schedule, steps=epochs * (len(self.task.train) // schedule.batch))

    def initial(self, seed: int, widths: Sequence[int] = WIDTHS) -> nn.Module:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return channels_last(self.build(widths))

    def row(self, key: Key, work: Callable[[], Key]) -> Key:
        """The row of that name, from `work()` if it or its files are not on disk."""
        known = self.known(key)
        if known is not None:
            return known
        began = time.monotonic()
        found = {**work(), "seconds": round(time.monotonic() - began, 1)}
        self.rows.add(key, found)
        print(json.dumps({**key, **found}), flush=True)
        return found

    def known(self, key: Key) -> Key | None:
        """A row on disk; one of a judged network only with the network and the evidence."""
        row = self.rows.get(key)
        kinds = ("net", *SPLITS) if row and "test" in row else ()
        return row if all(self.path(key, f"{k}.safetensors").exists() for k in kinds) else None

    def trained(
        self, key: Key, net: nn.Module, schedule: Schedule, teacher: nn.Module | None = None
    ) -> nn.Module:
        """`net` after `schedule`, in eval mode: from the folder if it was trained before, by the
        same schedule. The schedule's seed is added to the key's."""
        done, state = self.path(key, "net.safetensors"), self.path(key, "state.safetensors")
        schedule = replace(schedule, seed=schedule.seed + key["seed"])
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

    def renormed(self, net: nn.Module) -> nn.Module:
        """With the norms' statistics of this network, not of the one it was cut from."""
        return recalibrate(net, self.some(NORMS).split(BATCH_EVAL))

    def some(self, n: int) -> Tensor:
        """Training images, not augmented, of all parts of the set: neighbours may be alike."""
        train = self.task.train
        at = torch.linspace(0, len(train) - 1, min(n, len(train))).long()
        return self.task.normalise(train.at(at).images)

    def judged(self, key: Key, net: nn.Module) -> dict[str, Mapping[str, float]]:
        """Metrics on test and val, and losses on test; the evidence of both is kept."""
        found: dict[str, Mapping[str, float]] = {}
        for name in SPLITS:
            seen = multitask.evidence(net, self.task, self.task.splits[name])
            checkpoint.write(self.path(key, f"{name}.safetensors"), seen, {})
            found[name] = multitask.scores(self.task, seen)
        batches = list(self.task.batches(self.task.test))
        return {**found, "loss": losses.measure(net, self.objectives, batches).values}

    def changes(
        self, before: Sequence[Key], after: Sequence[Key], split: str = "test"
    ) -> dict[str, list[float]]:
        """Each goal's change, relative, with its 95 % interval; one key per seed."""
        seen = [[self._evidence(key, split) for key in keys] for keys in (before, after)]
        found = {}
        for goal in self.task.goals:
            got = paired.change(
                goal,
                *([one[goal.name] for one in side] for side in seen),
                rng=np.random.default_rng(0),
                block=self.block,
                trainings=True,
            )
            found[goal.name] = [got.value, got.low, got.high]
        return found

    def _evidence(self, key: Key, split: str) -> Mapping[str, Tensor]:
        return checkpoint.read(self.path(key, f"{split}.safetensors"))[0]

    def path(self, key: Key, kind: str) -> Path:
        name = "-".join(str(value) for value in key.values()).replace(" ", "_")
        return self.folder / f"{name}.{kind}"


@dataclass(frozen=True)
class _Setting:
    """Rates are the usual ones for the batch, not searched; those of the fine-tuning a third."""

    data: str
    size: int  # shorter side in pixels
    build: Callable[..., nn.Module]
    batch: int
    lr: float
    tuning_lr: float
    epochs: int  # of the dense network
    tuning_epochs: int  # what follows pruning, about a third; the part `pilot` tries half of it
    block: int = 1


_SETTINGS = {
    "class_box": _Setting("tiny_imagenet_20", 48, multitask_nets.class_box, 64, 0.1, 0.03, 80, 26),
    "street": _Setting("camvid", 48, multitask_nets.street, 16, 0.05, 0.02, 180, 60, BLOCK),
}
NETWORKS = tuple(_SETTINGS)
PILOT = {"class_box": (13, 26), "street": (30, 60)}  # epochs of fine-tuning to compare


def load(name: str, rows: contract.Rows, folder: Path) -> Experiment | None:
    """None where its data is absent."""
    setting = _SETTINGS[name]
    path = contract.data(setting.data)
    if path is None:
        return None
    task = multitask.load(str(path), size=setting.size)
    task = _blocks_of(task, path) if setting.block > 1 else _more_to_test(task)
    dense, tuning = (Schedule(0, setting.batch, lr) for lr in (setting.lr, setting.tuning_lr))
    found = Experiment(name, task, setting.build, dense, tuning, rows, folder, setting.block)
    return replace(
        found,
        dense=found.of_epochs(dense, setting.epochs),
        tuning=found.of_epochs(tuning, setting.tuning_epochs),
    )


def _more_to_test(task: MultiTask) -> MultiTask:
    """Tiny ImageNet's val is the test set, and small: the last of train, which is shuffled, too."""
    train, left = task.train, len(task.train) - TO_TEST
    kept, moved = (train.at(rows) for rows in torch.arange(len(train)).split((left, TO_TEST)))
    return replace(task, train=kept, test=_joined([task.test, moved]))


def _blocks_of(task: MultiTask, path: Path) -> MultiTask:
    """CamVid with val from blocks of frames of its train, and its own val in train: that is seven
    seconds of one drive, in which classes are always there or never. Test in the order of frames,
    for intervals."""
    splits = camvid.in_order(path, min(task.shape[1:]))
    train = splits["train"]
    held = torch.arange(len(train)) // BLOCK % EVERY == 0
    kept = _joined([train.at((~held).nonzero()[:, 0]), splits["val"]]).mixed(4)
    return replace(task, train=kept, val=train.at(held.nonzero()[:, 0]), test=splits["test"])


def _joined(parts: Sequence[Examples]) -> Examples:
    names = parts[0].targets
    return Examples(
        torch.cat([part.images for part in parts]),
        {name: torch.cat([part.targets[name] for part in parts]) for name in names},
    )


def shortened(experiment: Experiment, images: int, steps: int) -> Experiment:
    """Few images and steps, for a quick run whose figures mean nothing."""
    task = experiment.task
    train, val, test = (
        split.at(torch.arange(min(images, len(split)))) for split in task.splits.values()
    )
    task = replace(task, train=train, val=val, test=test)
    few = Schedule(steps=steps, batch=8, lr=0.05)
    return replace(experiment, task=task, dense=few, tuning=few, processes=1, turns_s=1.0)
