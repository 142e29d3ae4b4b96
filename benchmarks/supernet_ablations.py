"""Part `ablations` of the supernet benchmark: one switch per row, all of a fifth of the length.

One seed and short runs: differences of less than about a point are noise. Judged on validation
images, extracted and re-calibrated, over the same networks as part `children`.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from benchmarks import contract
from benchmarks.supernet_training import Experiment, Inside, across, finish
from nas import once_for_all, supernet
from nas.elastic import BatchNorm2d, Network
from nas.recipe import Recipe
from nas.sampling import Archs
from nas.supernet import Course

SHORT = 0.2  # of the experiment's steps
NETWORKS = 5
PLAIN = "as shipped"
SWITCHES: dict[str, dict[str, Any]] = {
    PLAIN: {},
    "distillation alone, no labels": {"loss": "kl"},
    "no distillation": {"loss": "labels"},
    "rate of one network": {"lr": 0.05},
    "rate with a floor": {"floor": 0.05},
    "bestup": {"policy": "bestup"},
    "alpha-divergence": {"loss": "alpha"},
    "worstup": {"policy": "worstup"},
    "dropout and drop-connect": {"dropout": 0.1, "drop_connect": 0.1},
    "random augmentation": {"operations": 1, "magnitude": 0.5},
    "average of weights": {"ema": 0.99},
}


def run(experiment: Experiment, outcome: contract.Outcome) -> None:
    short = replace(experiment, steps=max(2, round(SHORT * experiment.steps)))
    rows: dict[str, dict[str, Any]] = {}

    def add(name: str, work: Callable[[Path], Network]) -> None:
        def judged(state: Path) -> dict[str, Any]:
            return _judged(short, work(state))

        rows[name] = short.row({"part": "ablations", "switch": name}, judged)

    def trained(recipe: Recipe, net: Network, state: Path, archs: Archs | None = None) -> Network:
        runs = archs or supernet.sandwich(short.space, recipe)
        finish(supernet.train(net, runs, short.task, recipe, resume=state))
        return net

    def switched(change: dict[str, Any]) -> Callable[[Path], Network]:
        recipe = replace(short.recipe, **change)
        return lambda state: trained(recipe, short.build(short.space.largest), state)

    for name, change in SWITCHES.items():
        add(name, switched(change))
    add("no zero gamma", lambda state: trained(short.recipe, _ones(short), state))
    add(
        "one random network per step, labels",
        lambda state: trained(
            short.recipe, short.build(short.space.largest), state, _single_path(short)
        ),
    )
    add("progressive", lambda state: _progressive(short, state))
    rows["no re-calibration"] = short.row(
        {"part": "ablations", "switch": "no re-calibration"},
        lambda state: _uncalibrated(short, switched({})(state)),
    )
    _report(rows, outcome)


def _judged(experiment: Experiment, net: Network) -> dict[str, Any]:
    accuracy = []
    for genes in across(experiment, NETWORKS):
        child = experiment.child(net, genes)
        judged = experiment.judged(child, child.arch.resolution, test=False)
        accuracy.append(judged["val_accuracy"])
    return {"accuracy": accuracy}


def _uncalibrated(experiment: Experiment, net: Network) -> dict[str, Any]:
    """With the statistics of the largest network's channels, as training left them."""
    archs = [experiment.space.decode(genes) for genes in across(experiment, NETWORKS)]
    nets = [Inside(net, arch).eval() for arch in archs]
    judged = [experiment.judged(n, n.arch.resolution, test=False) for n in nets]
    return {"accuracy": [row["val_accuracy"] for row in judged]}


def _ones(experiment: Experiment) -> Network:
    """A fresh network whose zero-initialised norms start at one instead."""
    net = experiment.build(experiment.space.largest)
    for module in net.modules():
        if isinstance(module, BatchNorm2d) and not module.weight.any():
            nn.init.ones_(module.weight)
    return net


def _single_path(experiment: Experiment) -> Archs:
    def archs(step: int) -> list[Any]:
        rng = np.random.default_rng((experiment.seed, 7, step))
        return [experiment.space.decode(row) for row in experiment.space.sample(rng, 1)]

    return archs


def _progressive(experiment: Experiment, state: Path) -> Network:
    """The largest alone for as many steps, then shrunk for half as many: about the same compute,
    for the largest costs half a sandwich step."""
    net = experiment.build(experiment.space.largest)
    archs, recipe = supernet.alone(net), experiment.recipe
    finish(supernet.train(net, archs, experiment.task, recipe, resume=state))
    teacher = experiment.calibrated(copy.deepcopy(net))
    shrinking = replace(recipe, steps=max(5, recipe.steps // 2), lr=recipe.lr / 2)
    folder = state.with_suffix("")
    course = Course(experiment.task, shrinking, teacher)
    finish(once_for_all.shrink(net, experiment.space, course, folder=folder))
    return net


def _report(rows: dict[str, dict[str, Any]], outcome: contract.Outcome) -> None:
    print("validation accuracy in %, one seed, short runs")
    plain = np.mean(rows[PLAIN]["accuracy"])
    shown = []
    for name, row in rows.items():
        accuracy = 100 * np.array(row["accuracy"])
        gap = float(accuracy.mean() - 100 * plain)
        shown.append([name, *(f"{v:.2f}" for v in [*accuracy, accuracy.mean(), gap])])
        if name != PLAIN:
            outcome.figures[f"ablation_{name.replace(' ', '_')}"] = gap
    sizes = ["smallest", *(f"{at}" for at in range(2, NETWORKS)), "largest"]
    print(contract.table(["switch", *sizes, "mean", f"- {PLAIN}"], shown))
