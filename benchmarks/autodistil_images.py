"""The space vit on CIFAR-10: a short supernet, and a search of it against random networks.

Both evaluate as many networks on validation images, in turn with their multiply-adds; the front of
each is then judged once on test images.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks import contract, strategies
from nas import pareto, space, tasks
from nas.judge import calibration_images, child, evaluate
from nas.recipe import Recipe
from nas.sampling import sandwich
from nas.search import Candidate, Problem
from nas.supernet import train
from nas.tasks import Split, Task

STEPS, QUICK_STEPS = 300, 1
EVALUATIONS, QUICK_EVALUATIONS = 48, 2  # of each
METHODS = {"search": "nsga2", "random": "random"}

Row = Callable[[dict[str, Any], Callable[[], dict[str, Any]]], dict[str, Any]]


def make(row: Row, folder: Path, *, quick: bool) -> None:
    source = contract.data("cifar10")
    if source is None:
        return
    row(
        {"part": "images", "quick": quick},
        lambda: found(tasks.load(str(source)), folder / "vit.safetensors", quick=quick),
    )


def found(task: Task, state: Path, *, quick: bool) -> dict[str, Any]:
    """{"fronts": {method: genes, MACs, accuracy on val and test, hypervolume on both}}."""
    made = space.load("vit", channels=3, classes=10, size=32)
    steps = QUICK_STEPS if quick else STEPS
    recipe = Recipe(steps=steps, batch=16 if quick else 64, lr=0.03, clip_norm=1.0)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        net = made.supernet()
    for _ in train(net, sandwich(made, recipe), task, recipe, resume=state):
        pass
    state.unlink(missing_ok=True)
    calibration = calibration_images(task, 64)
    val, test = (_some(part, 256 if quick else len(part)) for part in (task.val, task.test))

    def judged(genes: Any, part: Split = val) -> tuple[float, float]:
        score = evaluate(child(net, made, genes, calibration), task, part, 32)
        return score.cross_entropy, score.accuracy

    def mmacs(genes: Any) -> tuple[Any, Any]:
        costs = made.costs(genes)[:, 0] / 1e6
        return costs, costs

    problem = Problem(made, mmacs, judged)
    evaluations = QUICK_EVALUATIONS if quick else EVALUATIONS
    known = {
        method: strategies.searched(problem, name, evaluations) for method, name in METHODS.items()
    }
    errors = [1 - candidate.accuracy for candidate in known["random"]]
    most = float(mmacs(made.largest[None])[0][0]) * 1.01
    return {
        "fronts": {
            method: _front(some, (most, float(np.median(errors))), lambda g: judged(g, test)[1])
            for method, some in known.items()
        }
    }


def _some(part: Split, n: int) -> Split:
    return Split(part.images[:n], part.labels[:n])


def _front(
    known: Sequence[Candidate], reference: tuple[float, float], tested: Callable[[Any], float]
) -> dict[str, Any]:
    """By validation images; areas are of (MMACs, error) below the reference."""
    points = np.array([(c.latency_ms, 1 - c.accuracy) for c in known])
    best = [known[at] for at in pareto.front(points)]
    test = [tested(np.array(candidate.genes)) for candidate in best]
    val = [candidate.accuracy for candidate in best]
    mmacs = [candidate.latency_ms for candidate in best]
    areas = [
        pareto.hypervolume(np.column_stack([mmacs, 1 - np.array(side)]), reference)
        for side in (val, test)
    ]
    genes = [list(candidate.genes) for candidate in best]
    return {"genes": genes, "mmacs": mmacs, "val": val, "test": test, "hypervolume": areas}
