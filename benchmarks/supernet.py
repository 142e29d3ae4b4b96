"""Children of one supernet against the same networks trained alone; what a sandwich step costs.

Parts, in order of importance (`--parts` chooses): `step` (cost of a step beside its four networks
alone and a set-active implementation), `children` (accuracy inside the supernet, extracted, trained
alone for the same images and for the same compute, without and with distillation from the
supernet's largest), `ablations` (one switch per row, a fifth of the length), `ranks` (supernet's
order of networks against their order alone) and `rates` (the networks alone with two more learning
rates; the table takes the best of what there is).

Rows go to benchmarks/results/supernet.rows.jsonl as they finish; the same command goes on where it
was stopped, in the middle of a training if need be. Learning rates are chosen on validation
images; test images are read for the table alone.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks import contract, supernet_ablations, supernet_ranks, supernet_step
from benchmarks.supernet_training import Experiment, across, alone, inside, shortened
from nas import space, supernet, tasks
from nas.elastic import Network
from nas.space import Genes

PARTS = ("step", "children", "ablations", "ranks", "rates")
NETWORKS = 5
RATES = (0.2, 0.1, 0.4)  # the recipe's own first


def main(argv: list[str] | None = None) -> int:
    parser = contract.parser(__doc__)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--size", type=int, default=16, help="pixels, so that minutes suffice")
    parser.add_argument("--epochs", type=float, default=4.0, help="of the supernet")
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--folder", type=Path, help="for unfinished trainings; kept between runs")
    arguments = parser.parse_args(argv)
    outcome = contract.Outcome("supernet")
    torch.set_num_threads(1 if arguments.quick else arguments.threads)
    if "step" in arguments.parts:
        supernet_step.run(outcome, quick=arguments.quick)
    rest = [part for part in arguments.parts if part != "step"]
    if not rest:
        return outcome.finish(arguments.save)
    folder = contract.data("cifar10")
    if folder is None and not arguments.quick:
        return outcome.skip("NASCTL_DATA/cifar10 is absent")
    experiments = quick() if arguments.quick else full(arguments, str(folder))
    for experiment in experiments:
        if {"children", "rates"} & set(rest):
            children(experiment)
    for part, module in (("ablations", supernet_ablations), ("ranks", supernet_ranks)):
        if part in rest:
            module.run(experiments[0], outcome)
    for experiment in experiments:
        if "rates" in rest:
            other_rates(experiment)
    if {"children", "rates"} & set(rest):
        report(experiments, outcome)
    return outcome.finish(arguments.save)


def full(arguments: Any, data: str) -> list[Experiment]:
    task = tasks.load(data, size=arguments.size)
    found = space.load("resnet", classes=task.n_classes, size=task.size)
    rows = contract.Rows(contract.RESULTS / "supernet.rows.jsonl")
    folder = arguments.folder or Path(tempfile.gettempdir(), "nasctl-benchmark-supernet")
    steps = round(arguments.epochs * len(task.train) / 128)
    key = {"data": "cifar10", "size": arguments.size, "epochs": arguments.epochs}
    return [
        Experiment(task, found, steps, 128, seed, rows, folder, {**key, "seed": seed})
        for seed in range(arguments.seeds)
    ]


def quick() -> list[Experiment]:
    """Every part at work on a few digits: its figures mean nothing."""
    task = shortened(tasks.load("digits", size=8), 256)
    found = space.load("resnet", channels=1, classes=task.n_classes, size=task.size, width=0.25)
    folder = Path(tempfile.mkdtemp())
    rows = contract.Rows(folder / "rows.jsonl")
    key = {"data": "digits", "seed": 0}
    return [Experiment(task, found, 8, 32, 0, rows, folder, key)]


# ---- children ------------------------------------------------------------------------------------


def children(experiment: Experiment) -> None:
    """The rows of one seed and the first learning rate, the most telling first."""
    net = experiment.supernet()
    networks = across(experiment, NETWORKS)
    for at, genes in enumerate(networks):
        _cut_out(experiment, net, at, genes)
    teacher = experiment.child(net, experiment.space.largest)
    for at, genes in enumerate(networks):
        _alone(experiment, at, genes, "alone", RATES[0])
    for at, genes in enumerate(networks):
        _alone(experiment, at, genes, "distilled", RATES[0], teacher=teacher)
    for at, genes in enumerate(networks):
        steps = same_compute(experiment, genes, len(networks))
        _alone(experiment, at, genes, "same compute", RATES[0], steps=steps)


def other_rates(experiment: Experiment) -> None:
    """Only for those that saw the same images: `same compute` keeps the first rate."""
    networks = across(experiment, NETWORKS)
    teacher = experiment.child(experiment.supernet(), experiment.space.largest)
    for how, taught_by in (("alone", None), ("distilled", teacher)):
        for rate in RATES[1:]:
            for at, genes in enumerate(networks):
                _alone(experiment, at, genes, how, rate, teacher=taught_by)


def same_compute(experiment: Experiment, genes: Genes, networks: int) -> int:
    """Steps alone that cost a supernet's training divided among the networks that were asked of it,
    in MACs: the largest, the smallest and two average ones per step of the supernet."""
    found = experiment.space
    pool = found.sample(np.random.default_rng(0), 500)
    average = float(np.mean([experiment.macs(row) for row in pool]))
    step = experiment.macs(found.largest) + experiment.macs(found.smallest) + 2 * average
    return max(1, round(experiment.steps * step / networks / experiment.macs(genes)))


def _cut_out(experiment: Experiment, net: Network, at: int, genes: Genes) -> None:
    arch = experiment.space.decode(genes)
    calibration = supernet.calibration_images(experiment.task)
    cost = {"macs": experiment.macs(genes), "params": experiment.params(genes)}

    def extracted(_: Path) -> dict[str, Any]:
        return {**experiment.judged(experiment.child(net, genes), arch.resolution), **cost}

    def within(_: Path) -> dict[str, Any]:
        return {**experiment.judged(inside(net, arch, calibration), arch.resolution), **cost}

    experiment.row({"part": "children", "network": at, "how": "extracted"}, extracted)
    experiment.row({"part": "children", "network": at, "how": "inside"}, within)


def _alone(
    experiment: Experiment,
    at: int,
    genes: Genes,
    how: str,
    rate: float,
    *,
    steps: int | None = None,
    teacher: Network | None = None,
) -> None:
    recipe = replace(experiment.recipe, lr=rate, steps=steps or experiment.steps)

    def work(state: Path) -> dict[str, Any]:
        net = alone(experiment, genes, recipe, state, teacher)
        judged = experiment.judged(net, net.arch.resolution)
        return {**judged, "images": recipe.steps * recipe.batch}

    experiment.row({"part": "children", "network": at, "how": how, "lr": rate}, work)


# ---- the table -----------------------------------------------------------------------------------


def report(experiments: Sequence[Experiment], outcome: contract.Outcome) -> None:
    tables = [table_of(experiment) for experiment in experiments]
    print("test accuracy in %, mean over seeds; rates chosen on validation images")
    hows = ["inside", "extracted", "alone", "distilled", "same compute"]
    every = np.array([[[row[how] for how in hows] for row in rows] for rows in tables]) * 100
    mean = every.mean(0)
    header = ["MMACs", *hows, "child - alone", "child - distilled"]
    child, single, taught = (mean[:, hows.index(how)] for how in hows[1:4])
    gaps = np.stack([child - single, child - taught], 1)
    macs = [row["macs"] / 1e6 for row in tables[0]]
    cells = np.concatenate([mean, gaps], 1)
    rows = [[f"{m:.2f}", *(f"{v:.2f}" for v in row)] for m, row in zip(macs, cells, strict=True)]
    print(contract.table(header, rows))
    described(every, hows, outcome)


def table_of(experiment: Experiment) -> list[dict[str, Any]]:
    """Per network its MACs and the test accuracy of every way of training it."""
    rows: list[dict[str, Any]] = []
    for at in range(NETWORKS):
        name = {**experiment.key, "part": "children", "network": at}
        found: dict[str, Any] = {}
        for how in ("inside", "extracted"):
            row = experiment.rows.get({**name, "how": how}) or {}
            found |= {how: row["test_accuracy"], "macs": row["macs"]}
        for how in ("alone", "distilled", "same compute"):
            tried = [experiment.rows.get({**name, "how": how, "lr": rate}) for rate in RATES]
            best = max((row for row in tried if row), key=lambda row: row["val_accuracy"])
            found[how] = best["test_accuracy"]
        rows.append(found)
    return rows


def described(every: np.ndarray, hows: list[str], outcome: contract.Outcome) -> None:
    """`every`: [seeds, networks, ways], in per cent."""
    way = {how: every[:, :, at] for at, how in enumerate(hows)}
    for how in hows:
        outcome.figures[f"children_{how.replace(' ', '_')}"] = float(way[how].mean())
    for other in ("alone", "distilled", "same compute"):
        gap = way["extracted"] - way[other]
        label = f"child_minus_{other.replace(' ', '_')}"
        outcome.figures |= {label: float(gap.mean()), f"{label}_worst": float(gap.min())}
        print(
            f"child minus {other}: {gap.mean():+.2f} points, deviation over networks and seeds "
            f"{gap.std():.2f}, worst {gap.min():+.2f}"
        )
    mean = outcome.figures["child_minus_alone"]
    outcome.aim("children", "mean of child minus alone >= 0 points", mean, mean >= 0)
    largest = float((way["extracted"] - way["alone"])[:, -1].mean())
    outcome.aim("largest", "child minus alone >= -0.5 points", largest, largest >= -0.5)
    apart = float(np.abs(way["extracted"] - way["inside"]).max())
    outcome.aim("extraction", "extracted within 0.1 point of inside", apart, apart <= 0.1)


if __name__ == "__main__":
    sys.exit(main())
