"""Distributions over operators against random search and RoBoT, at equal work and equal latency.

Part `search`: CIFAR-10 in the FBNet space; latencies are the Raspberry Pi 4's table of blocks
(HW-NAS-Bench; of the full width, so here a target like another), and those of `--table`, a file
that `nasctl profile --space fbnet` made here. Learners train one supernet for `--epochs`; random
search and RoBoT (with the scores of untrained networks that `nasctl search` gives it) train sixteen
networks for twice as many steps in all, which is what the steps of a learner's distribution cost by
one path. Gumbel's mixture takes some ten times that. What each finds inside the budget is then
trained alone by one recipe and judged once on test images. Part `memory`: what a step of each
method holds.

Rows go to benchmarks/results/differentiable.rows.jsonl as they finish; the same command goes on
where it was stopped, in the middle of a training if need be.
"""

from __future__ import annotations

import itertools
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks import contract, differentiable_memory
from benchmarks.fbnet_blocks import block_latency
from benchmarks.supernet_training import Experiment, alone, shortened
from cli.features import IMAGES, PROXIES
from hw_profiles.latency import LatencyTable
from nas import differentiable, scores, space, strategies, supernet, tasks
from nas.differentiable.learning import Goal, Searched, learn
from nas.differentiable.policy import Latency, latency_of
from nas.elastic import channels_last
from nas.search import Array, Candidate, Problem, row_keys
from nas.space import Genes
from nas.supernet import Course

PARTS = ("memory", "search")
RIVALS = ("random", "robot")
SHARES = (0.35, 0.6)
METHODS = (*differentiable.names(), *RIVALS)
WORK = 2.0  # of the learners' steps of weights: what rivals train
Named = tuple[str, Latency]


@dataclass(frozen=True)
class Setting:
    """One run of part `search`."""

    experiments: list[Experiment]
    named: list[Named]  # latencies
    final: int  # steps of the network that was found
    shares: Sequence[float]  # budgets, from the fastest network to the slowest
    methods: Sequence[str] = METHODS
    candidates: int = 16  # networks that a search judges at the end, or trains a little


@dataclass(frozen=True)
class Target:
    """A device, how fast a network has to be on it and how many a search may judge."""

    device: str
    latency: Latency
    budget_ms: float
    candidates: int


def main(argv: list[str] | None = None) -> int:
    parser = contract.parser(__doc__)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--size", type=int, default=32)
    parser.add_argument("--width", type=float, default=0.5, help="of the space's channels")
    parser.add_argument("--epochs", type=float, default=10.0, help="of each search")
    parser.add_argument("--final", type=float, default=20.0, help="epochs of the network found")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--table", type=Path, help="latencies of this machine, fbnet's own")
    parser.add_argument("--shares", nargs="+", type=float, default=SHARES, help="budgets")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=METHODS)
    parser.add_argument("--folder", type=Path, help="for unfinished trainings; kept between runs")
    arguments = parser.parse_args(argv)
    outcome = contract.Outcome("differentiable")
    torch.set_num_threads(1 if arguments.quick else arguments.threads)
    if "memory" in arguments.parts:
        differentiable_memory.run(outcome, quick=arguments.quick)
    if "search" in arguments.parts:
        folders = {name: contract.data(name) for name in ("cifar10", "hwnasbench")}
        if absent := [name for name, path in folders.items() if path is None]:
            return outcome.skip(f"NASCTL_DATA/{absent[0]} is absent")
        made = _quick if arguments.quick else _full
        _search(made(arguments, str(folders["cifar10"])), outcome)
    return outcome.finish(arguments.save)


def _full(arguments: Any, data: str) -> Setting:
    task = tasks.load(data, size=arguments.size)
    found = space.load("fbnet", classes=task.n_classes, size=task.size, width=arguments.width)
    rows = contract.Rows(contract.RESULTS / "differentiable.rows.jsonl")
    folder = arguments.folder or Path(tempfile.gettempdir(), "nasctl-benchmark-differentiable")
    steps, final = (round(e * len(task.train) / 128) for e in (arguments.epochs, arguments.final))
    key = {"data": "cifar10", "size": arguments.size, "width": arguments.width}
    key |= {"epochs": arguments.epochs, "final": arguments.final}
    experiments = [
        Experiment(task, found, steps, 128, seed, rows, folder, {**key, "seed": seed})
        for seed in range(arguments.seeds)
    ]
    latencies = _latencies(found, arguments.table)
    return Setting(experiments, latencies, final, arguments.shares, arguments.methods)


def _quick(arguments: Any, data: str) -> Setting:
    """Every part at work on a few digits: its figures mean nothing."""
    task = shortened(tasks.load("digits", size=8), 256)
    found = space.load("fbnet", channels=1, classes=task.n_classes, size=8, width=0.25)
    folder = Path(tempfile.mkdtemp())
    rows = contract.Rows(folder / "rows.jsonl")
    key = {"data": "digits", "seed": 0}
    experiments = [Experiment(task, found, 6, 32, 0, rows, folder, key)]
    return Setting(experiments, _latencies(found, None), 2, (0.35,), candidates=3)


def _latencies(found: space.SearchSpace, table: Path | None) -> list[Named]:
    named = [("raspi4 blocks", block_latency(found, "raspi4"))]
    if table is not None:
        named.append(("this machine", latency_of(found, "fbnet", LatencyTable.load(table))))
    return named


def _search(setting: Setting, outcome: contract.Outcome) -> None:
    every = itertools.product(setting.experiments, _targets(setting), setting.methods)
    _report([_row(*each, setting.final) for each in every], outcome)


def _targets(setting: Setting) -> list[Target]:
    space_ = setting.experiments[0].space
    found = []
    for device, latency in setting.named:
        low, high = latency.of(np.stack([space_.smallest, space_.largest])).tolist()
        budgets = [low + share * (high - low) for share in setting.shares]
        found += [Target(device, latency, ms, setting.candidates) for ms in budgets]
    return found


def _row(experiment: Experiment, target: Target, method: str, final: int) -> dict[str, Any]:
    """What a method found, and what that is worth trained alone."""
    name: dict[str, Any] = {"part": "search", "device": target.device, "method": method}
    name["budget_ms"] = round(target.budget_ms, 4)
    search = _learned if method in differentiable.names() else _tried

    def searched(state: Path) -> dict[str, Any]:
        genes, said = search(experiment, target, method, state)
        ms = float(target.latency.of(genes[None])[0])
        return {"genes": genes.tolist(), "latency_ms": ms, "macs": experiment.macs(genes), **said}

    found = experiment.row({**name, "what": "found"}, searched)

    def trained(state: Path) -> dict[str, Any]:
        recipe = replace(experiment.recipe, steps=final)
        net = alone(experiment, np.array(found["genes"]), Course(experiment.task, recipe), state)
        return experiment.judged(net, net.arch.resolution)

    # by its genes: what another search found under this name is another network
    own = experiment.row({**name, "what": "trained", "genes": found["genes"]}, trained)
    return {**name, "seed": experiment.seed, **found, "test_accuracy": own["test_accuracy"]}


def _learned(
    experiment: Experiment, target: Target, method: str, state: Path
) -> tuple[Genes, dict[str, float]]:
    """The best, by inherited weights, of what the learned distribution proposes."""
    found, task = experiment.space, experiment.task
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(experiment.seed)
        whole = Searched(channels_last(found.supernet()), found)
    goal = Goal(target.latency, target.budget_ms)
    said = {"expected_ms": 0.0, "entropy": 1.0}
    course, how = Course(task, experiment.recipe), differentiable.load(method)
    for step in learn(whole, course, method=how, goal=goal, resume=state):
        said = {"expected_ms": step.latency_ms, "entropy": step.entropy}
    images = supernet.calibration_images(task)

    def inherited(genes: Genes) -> tuple[float, float]:
        child = supernet.child(whole.net, found, genes, images)
        score = supernet.evaluate(child, task, task.val, child.arch.resolution)
        return score.cross_entropy, score.accuracy

    problem = _problem(experiment, target, inherited)
    problem = replace(problem, policy=whole.policy.logits.numpy())
    return _best(problem, method, target.candidates), said


def _tried(
    experiment: Experiment, target: Target, method: str, state: Path
) -> tuple[Genes, dict[str, float]]:
    """The best of CANDIDATES networks by a short training each."""
    steps = max(1, round(WORK * experiment.steps / target.candidates))
    recipe = replace(experiment.recipe, steps=steps)

    def short(genes: Genes) -> tuple[float, float]:
        def trained(own: Path) -> dict[str, Any]:
            net = alone(experiment, genes, Course(experiment.task, recipe), own)
            return experiment.judged(net, net.arch.resolution, test=False)

        name = {"what": "short", "genes": genes.tolist(), "steps": recipe.steps}
        row = experiment.row(name, trained)
        return row["val_cross_entropy"], row["val_accuracy"]

    problem = _with_scores(experiment, _problem(experiment, target, short), method)
    return _best(problem, method, target.candidates), {}


def _with_scores(experiment: Experiment, problem: Problem, method: str) -> Problem:
    """With the scores of untrained networks that `nasctl search` computes, for who asks for any."""
    rows = strategies.drawn(method, problem)
    if rows is None:
        return problem
    images = scores.batch_of(experiment.task, IMAGES, experiment.seed)
    work = scores.scored(scores.Job(experiment.space, images, PROXIES), rows)
    matrix = scores.matrix(work, rows, PROXIES)
    place = {int(key): at for at, key in enumerate(row_keys(rows))}

    def features(genes: Genes) -> dict[str, Array]:
        known = matrix[[place[int(key)] for key in row_keys(genes)]]
        return dict(zip(PROXIES, known.T, strict=True))

    return replace(problem, features=features)


def _problem(
    experiment: Experiment, target: Target, evaluate: Callable[[Genes], tuple[float, float]]
) -> Problem:
    def latency(genes: Genes) -> tuple[Array, Array]:
        ms = target.latency.of(genes)
        return ms, ms

    seed = experiment.seed
    return Problem(experiment.space, latency, evaluate, target.budget_ms, seed)


def _best(problem: Problem, method: str, n: int) -> Genes:
    """Of the first `n` that the strategy asks for."""
    propose, history = strategies.load(method), list[Candidate]()
    for generation in range(n):
        rows = propose(problem, generation, history)[: n - len(history)]
        for genes in rows:
            ms = float(problem.latency(genes[None])[0][0])
            score = problem.evaluate(genes)
            history.append(Candidate(len(history), tuple(genes.tolist()), ms, ms, *score))
        if len(rows) == 0 or len(history) == n:
            break
    return np.array(min(history, key=lambda c: c.cross_entropy).genes)


def _report(rows: list[dict[str, Any]], outcome: contract.Outcome) -> None:
    """Mean, deviation and worst over seeds; a budget that is missed would show as above 1."""
    lines, mean = [], dict[tuple[str, float, str], float]()
    groups = sorted({(row["device"], row["budget_ms"], row["method"]) for row in rows})
    for group in groups:
        own = [r for r in rows if (r["device"], r["budget_ms"], r["method"]) == group]
        accuracy = 100 * np.array([row["test_accuracy"] for row in own])
        used = [row["latency_ms"] / row["budget_ms"] for row in own]
        seconds = float(np.mean([row["seconds"] for row in own]))
        mean[group] = float(accuracy.mean())
        entropy = float(np.mean([row.get("entropy", np.nan) for row in own]))
        cells = [mean[group], float(accuracy.std()), float(accuracy.min()), max(used)]
        lines.append([*group, *(f"{cell:.2f}" for cell in (*cells, entropy)), seconds])
        label = f"{group[0]}, {group[1]:.2f} ms: {group[2]}"
        figures = zip(("mean", "deviation", "worst", "share of budget"), cells, strict=True)
        outcome.figures |= {f"{label}: {what}": value for what, value in figures}
    header = ["device", "budget ms", "method", "test %", "dev", "worst", "of budget"]
    print(contract.table([*header, "entropy", "search s"], lines))
    for device, budget, method in groups:
        if method in RIVALS:
            continue
        for rival in RIVALS:
            if (device, budget, rival) not in mean:
                continue
            gap = mean[device, budget, method] - mean[device, budget, rival]
            name = f"{method}_{rival}_{device}_{budget}".replace(" ", "_")
            outcome.aim(name, f"no worse than {rival}, points", gap, gap >= 0)


if __name__ == "__main__":
    sys.exit(main())
