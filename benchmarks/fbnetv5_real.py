"""Part `real` of the FBNetV5 benchmark: one supernet for several tasks, on images, and its rivals.

What is run is in `fbnetv5_experiment`; rows go to benchmarks/results/fbnetv5_real.rows.jsonl.
"""

from __future__ import annotations

import itertools
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import contract
from benchmarks.fbnetv5_experiment import (
    METHODS,
    SETTINGS,
    Experiment,
    Setting,
    own_training,
    wall_time,
)
from benchmarks.fbnetv5_latency import SECONDS, Network, milliseconds
from nas import multitask, tasks
from nas.data.examples import Examples
from nas.goals import classes
from nas.multitask import MultiTask
from nas.multitask_training import Schedule

TIMED = 12  # rounds of steps of each search, in turn
MOST_TIME = 1.1  # of a search for one task

Found = dict[tuple[str, str, str], list[dict[str, Any]]]  # data, task, method -> rows of seeds
Picked = tuple[Experiment, str, Network]  # who found what: the method's name, task and genes


def run(outcome: contract.Outcome, seeds: int, folder: Path) -> None:
    """Every row, the most telling first; then the tables."""
    rows = contract.Rows(contract.RESULTS / "fbnetv5_real.rows.jsonl")
    loaded = []
    for setting in SETTINGS:
        path = contract.data(setting.data)
        if path is None:
            print(f"skipped: NASCTL_DATA/{setting.data} is absent")
            continue
        loaded.append((setting, multitask.load(str(path), size=setting.size)))
    folder.mkdir(parents=True, exist_ok=True)
    experiments = [
        Experiment(setting, task, seed, rows, folder)
        for seed in range(seeds)
        for setting, task in loaded
    ]
    _all(outcome, experiments, TIMED, SECONDS)


def quick(outcome: contract.Outcome, folder: Path) -> None:
    """Every part at work on a few digits: its figures mean nothing."""
    few = Schedule(steps=4, batch=16, lr=0.05)
    setting = Setting("digits", 8, 0.25, few, replace(few, steps=2))
    rows = contract.Rows(folder / "rows.jsonl")
    _all(outcome, [Experiment(setting, digits(), 0, rows, folder, judged=2, short=2)], 1, 0.5)


def _all(
    outcome: contract.Outcome, experiments: list[Experiment], rounds: int, seconds: float
) -> None:
    """Searches are timed for `rounds` steps, and files for `seconds` in each process."""
    for experiment in experiments:
        if experiment.seed == 0:
            _report_time(outcome, experiment, wall_time(experiment, rounds)["seconds_per_step"])
    found: Found = {}
    trained: dict[str, set[Network]] = {}
    for experiment in experiments:
        data = experiment.setting.data
        for method, picks in METHODS.items():
            for name, picked in picks(experiment).items():
                network = (name, tuple(picked))
                row = {**own_training(experiment, *network), "network": network}
                found.setdefault((data, name, method), []).append(row)
                trained.setdefault(data, set()).add(network)
    one_each = {experiment.setting.data: experiment for experiment in reversed(experiments)}
    for data, networks in trained.items():
        ms = milliseconds(one_each[data], networks, seconds)
        for row in itertools.chain(*(rows for key, rows in found.items() if key[0] == data)):
            row["ms"] = ms[row["network"]]
    _report(outcome, found)


def digits() -> MultiTask:
    """Which digit, and whether it is odd."""
    one = tasks.load("digits")
    train, val, test = (
        Examples(part.images[:n], {"digit": part.labels[:n], "odd": part.labels[:n] % 2})
        for part, n in ((one.train, 128), (one.val, 32), (one.test, 32))
    )
    goals = (
        classes("digit", target="digit", n_classes=10),
        classes("odd", target="odd", n_classes=2),
    )
    return MultiTask("digits", goals, train, val, test)


def _report_time(outcome: contract.Outcome, experiment: Experiment, seconds: list[float]) -> None:
    data = experiment.setting.data
    for count, each in enumerate(seconds, 1):
        share = each / seconds[0]
        print(f"{data}: {count} tasks, {each:.3f} s per step, {share:.3f} of one task's")
        outcome.figures[f"{data}: time of {count} tasks"] = share
    share = seconds[-1] / seconds[0]
    aim = f"<= {MOST_TIME} of one task's time"
    outcome.aim(f"time_{data}", aim, share, share <= MOST_TIME)


def _report(outcome: contract.Outcome, found: Found) -> None:
    """Mean, deviation and worst over seeds; what one run gains relative to each rival."""
    lines = []
    for (data, name, method), rows in found.items():
        test = np.array([row["test"] for row in rows])
        macs = float(np.mean([row["macs"] for row in rows])) / 1e6
        cells = [float(test.mean()), float(test.std()), float(test.min())]
        ms = float(np.mean([row["ms"] for row in rows]))
        told = (*(f"{cell:.4f}" for cell in cells), f"{macs:.2f}", f"{ms:.3f}", len(rows))
        lines.append([data, name, method, *told])
        outcome.figures[f"{data}, {name}: {method}"] = cells[0]
        outcome.figures[f"{data}, {name}: {method}, ms"] = ms
    header = ["data", "task", "method", "test", "dev", "worst", "MMACs", "ms", "n"]
    print(contract.table(header, lines))
    pairs = list(dict.fromkeys((data, name) for data, name, _ in found))
    for rival in list(METHODS)[1:]:
        gains = np.array(
            [
                ours["test"] / theirs["test"] - 1
                for data, name in pairs
                for ours, theirs in zip(
                    found[data, name, "one run"], found[data, name, rival], strict=True
                )
                if theirs["test"] > 0
            ]
        )
        print(f"one run against {rival}: {gains.mean():+.2%} (worst {gains.min():+.2%})")
        outcome.figures[f"gain on {rival}"] = float(gains.mean())
        label = rival.replace(" ", "_").replace(",", "")
        outcome.aim(f"against_{label}", "gain >= 0", float(gains.mean()), gains.mean() >= 0)
