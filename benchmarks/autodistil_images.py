"""The space vit on CIFAR-10: a short supernet, and whether its front is better than random."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from benchmarks import contract
from nas import pareto, space, tasks
from nas.judge import calibration_images, child, evaluate
from nas.recipe import Recipe
from nas.sampling import sandwich
from nas.supernet import train
from nas.tasks import Task

STEPS, QUICK_STEPS = 600, 1
NETWORKS, QUICK_NETWORKS = 24, 2


def make(rows: contract.Rows, *, quick: bool) -> None:
    folder = contract.data("cifar10")
    if folder is None:
        return
    key = {"part": "images", "quick": quick}
    if rows.get(key) is None:
        rows.add(key, found(tasks.load(str(folder / "cifar10_train.parquet")), quick=quick))


def found(task: Task, *, quick: bool) -> dict[str, Any]:
    """Losses and accuracies on validation images of random members, and of those on the front."""
    made = space.load("vit", channels=3, classes=10, size=32)
    steps, networks = (QUICK_STEPS, QUICK_NETWORKS) if quick else (STEPS, NETWORKS)
    recipe = Recipe(steps=steps, batch=16 if quick else 64, lr=0.03, clip_norm=1.0)
    torch.manual_seed(0)
    net = made.supernet()
    for _ in train(net, sandwich(made, recipe), task, recipe):
        pass
    calibration = calibration_images(task, 64)
    drawn = made.sample(np.random.default_rng(1), networks)
    genes = np.stack([made.smallest, made.largest, *drawn])
    macs = made.costs(genes)[:, 0]
    scores = [evaluate(child(net, made, row, calibration), task, task.val, 32) for row in genes]
    losses = [score.cross_entropy for score in scores]
    front = pareto.front(np.column_stack([macs, losses])).tolist()
    return {
        "macs": macs.tolist(),
        "loss": losses,
        "accuracy": [score.accuracy for score in scores],
        "front": front,
    }
