"""What the parts of the supernet benchmark share: one experiment's data, networks and trainings.

Every training keeps its state in a folder until its row is written, so that a run that was stopped
goes on in the middle of a training.
"""

from __future__ import annotations

import copy
import hashlib
import json
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks import contract
from hw_profiles import op
from nas import supernet
from nas.elastic import Network, channels_last, resize
from nas.judge import BATCH_EVAL
from nas.recipe import Recipe
from nas.space import Genes, SearchSpace
from nas.supernet import Step
from nas.tasks import Split, Task

CHOICES = 500  # random networks among which those of wanted sizes are looked for


@dataclass(frozen=True)
class Experiment:
    """One data set, space, length and seed. `key` names it in the rows."""

    task: Task
    space: SearchSpace
    steps: int
    batch: int
    seed: int
    rows: contract.Rows
    folder: Path
    key: dict[str, Any]

    @property
    def recipe(self) -> Recipe:
        return Recipe(steps=self.steps, batch=self.batch, seed=self.seed)

    def row(self, what: dict[str, Any], work: Callable[[Path], dict[str, Any]]) -> dict[str, Any]:
        """The row of that name, from `work(state file)` if it is not on disk yet."""
        key = {**self.key, **what}
        known = self.rows.get(key)
        if known is not None:
            return known
        name = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:16]
        state = self.folder / f"{name}.safetensors"
        began = time.monotonic()
        found = {**work(state), "seconds": round(time.monotonic() - began, 1)}
        self.rows.add(key, found)
        state.unlink(missing_ok=True)
        print(" ".join(f"{k}={_short(v)}" for k, v in {**what, **found}.items()), flush=True)
        return found

    def macs(self, genes: Genes) -> int:
        return op.macs(self.space.ops(self.space.decode(genes)))

    def params(self, genes: Genes) -> int:
        return op.params(self.space.ops(self.space.decode(genes)))

    def build(self, genes: Genes) -> Network:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)
            return channels_last(self.space.build(self.space.decode(genes)))

    def judged(self, net: nn.Module, resolution: int, *, test: bool = True) -> dict[str, float]:
        """An eval-mode network's accuracy; on test only for what the tables report."""
        splits = {"val": self.task.val, **({"test": self.task.test} if test else {})}
        scores = {n: supernet.evaluate(net, self.task, s, resolution) for n, s in splits.items()}
        return {f"{name}_accuracy": score.accuracy for name, score in scores.items()} | {
            "val_cross_entropy": scores["val"].cross_entropy
        }

    def calibrated(self, net: Network) -> Network:
        images = supernet.calibration_images(self.task)
        return supernet.calibrate(net, images, net.arch.resolution)

    def supernet(self) -> Network:
        """The trained supernet; it stays in the folder."""
        name = hashlib.sha256(json.dumps(self.key, sort_keys=True).encode()).hexdigest()[:16]
        net, path = self.build(self.space.largest), self.folder / f"supernet-{name}.safetensors"
        finish(
            supernet.train(
                net,
                supernet.sandwich(self.space, self.recipe),
                self.task,
                self.recipe,
                resume=path,
            )
        )
        return net

    def child(self, net: Network, genes: Genes) -> Network:
        return supernet.child(net, self.space, genes, supernet.calibration_images(self.task))


def _short(value: object) -> str:
    return f"{value:.4f}" if isinstance(value, float) else str(value)


def finish(steps: Iterable[Step]) -> None:
    for _ in steps:
        pass


def alone(
    experiment: Experiment, genes: Genes, recipe: Recipe, state: Path, teacher: Network | None
) -> Network:
    """The network of `genes` trained from scratch by itself, in eval mode."""
    net = experiment.build(genes)
    archs = supernet.alone(net)
    finish(supernet.train(net, archs, experiment.task, recipe, teacher=teacher, resume=state))
    return experiment.calibrated(net)


def across(experiment: Experiment, n: int) -> list[Genes]:
    """`n` networks from the smallest to the largest, evenly spaced in the logarithm of MACs."""
    found = experiment.space
    pool = found.sample(np.random.default_rng(0), CHOICES)
    macs = np.array([experiment.macs(row) for row in pool], float)
    least, most = (experiment.macs(row) for row in (found.smallest, found.largest))
    wanted = np.geomspace(least, most, n)[1:-1]
    between = [pool[np.abs(np.log(macs / value)).argmin()] for value in wanted]
    return [found.smallest, *between, found.largest]


def in_bands(experiment: Experiment, bands: int, each: int) -> list[list[Genes]]:
    """For each of `bands` sizes, up to `each` different networks within 10 % of its MACs."""
    pool = experiment.space.sample(np.random.default_rng(1), 4 * CHOICES)
    pool = np.unique(pool, axis=0)
    pool = np.random.default_rng(2).permutation(pool)
    macs = np.array([experiment.macs(row) for row in pool], float)
    centres = np.quantile(macs, np.linspace(0, 1, bands + 2)[1:-1])
    return [list(pool[np.abs(macs / centre - 1) <= 0.1][:each]) for centre in centres]


# ---- inside the supernet -------------------------------------------------------------------------


class Inside(nn.Module):
    """A supernet run at one architecture, nothing extracted."""

    def __init__(self, net: Network, arch: Any) -> None:
        super().__init__()
        self.net, self.arch = net, arch

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x, self.arch)


@torch.no_grad()
def inside(net: Network, arch: Any, calibration: Tensor) -> Inside:
    """A copy of the supernet with the norms' statistics of `arch`, gathered where they are needed
    and not by way of an extracted network, so that the two can be compared."""
    net = copy.deepcopy(net)
    seen: dict[nn.BatchNorm2d, list[tuple[Tensor, Tensor]]] = {}

    def watch(norm: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        assert isinstance(norm, nn.BatchNorm2d)
        (x,) = inputs
        seen.setdefault(norm, []).append((x.mean((0, 2, 3)), x.var((0, 2, 3))))

    norms = [module for module in net.modules() if isinstance(module, nn.BatchNorm2d)]
    handles = [norm.register_forward_pre_hook(watch) for norm in norms]
    net.train()
    for images in torch.split(resize(calibration, arch.resolution), BATCH_EVAL):
        net(images, arch)
    for handle in handles:
        handle.remove()
    for norm, moments in seen.items():
        mean, var = (torch.stack(values).mean(0) for values in zip(*moments, strict=True))
        assert norm.running_mean is not None and norm.running_var is not None
        norm.running_mean[: len(mean)], norm.running_var[: len(var)] = mean, var
    return Inside(net, arch).eval()


def shortened(task: Task, n: int) -> Task:
    """The first `n` images of each split, for a quick run."""
    train, val, test = (Split(s.images[:n], s.labels[:n]) for s in task.splits.values())
    return Task(task.name, task.classes, train, val, test, flip=task.flip, pad=task.pad)
