"""Coarse-to-fine, evolution, NSGA-II, predictor and random search at equal evaluations.

Part `table` searches NAS-Bench-201 x HW-NAS-Bench: 15,625 networks of which accuracy and latency
are known, so that a search takes a second, many seeds are affordable and the true front is known.
What is searched is validation error; test error is only reported. Part `supernet` does the same on
a supernet of our own, judged as `nasctl search` judges: few seeds, hours.

Figures: hypervolume of (latency, error) inside the budget as a share of what is there to find, and
the regret of the pick (its error minus that of the best network inside). Strategies see the same
problem and nothing else; random search is the rival that all are tested against (Mann-Whitney,
two-sided, Holm's correction over the strategies).
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from benchmarks import contract, nb201
from nas import pareto, search, strategies
from nas.search import GENERATION, Candidate, Problem

DEVICES = ("edgegpu", "raspi4")  # a Jetson TX2 and a Raspberry Pi 4
SHARE = 0.5  # of the networks are inside the latency budget
Array = NDArray[np.float64]


def main(argv: list[str] | None = None) -> int:
    parser = contract.parser(__doc__)
    parser.add_argument("--part", choices=("table", "supernet"), default="table")
    parser.add_argument("--seeds", type=int, help="[30; supernet 3]")
    parser.add_argument("--evaluations", type=int, help="[128; supernet 64]")
    parser.add_argument("--run", type=Path, help="supernet: a finished run of nasctl search")
    arguments = parser.parse_args(argv)
    outcome = contract.Outcome("strategies")
    if arguments.part == "supernet":
        if arguments.run is None:
            return outcome.skip("--part supernet needs --run, a finished `nasctl search`")
        seeds, evaluations = arguments.seeds or 3, arguments.evaluations or 64
        if arguments.quick:
            seeds, evaluations = 1, 2 * GENERATION
        on_supernet(arguments.run, seeds, evaluations, outcome)
        return outcome.finish(arguments.save)
    folders = contract.data("nb201_accuracy"), contract.data("hwnasbench")
    if folders[0] is None or folders[1] is None:
        return outcome.skip("NASCTL_DATA/nb201_accuracy or NASCTL_DATA/hwnasbench is absent")
    seeds, evaluations = arguments.seeds or 30, arguments.evaluations or 128
    if arguments.quick:
        seeds, evaluations = 3, 64
    for device in DEVICES[: 1 if arguments.quick else None]:
        on_table(nb201.load(folders[0], folders[1], device), device, seeds, evaluations, outcome)
    return outcome.finish(arguments.save)


def searched(problem: Problem, name: str, evaluations: int) -> list[Candidate]:
    """What `nas.search.search` evaluates, without the study that would remember it."""
    propose, size = strategies.load(name), strategies.generation(name)
    history: list[Candidate] = []
    for generation in range(-(-evaluations // size)):
        rows = propose(problem, generation, history)[: evaluations - len(history)]
        value, high = problem.latency(rows)
        for row, ms, upper in zip(rows, value, high, strict=True):
            cross_entropy, accuracy = problem.evaluate(row)
            genes = tuple(row.tolist())
            found = Candidate(len(history), genes, float(ms), float(upper), cross_entropy, accuracy)
            history.append(found)
    return history


# ---- on a table ----------------------------------------------------------------------------------


def on_table(
    table: nb201.Table, device: str, seeds: int, evaluations: int, outcome: contract.Outcome
) -> None:
    """All strategies on one device, `seeds` times each."""
    budget = float(np.quantile(table.latency_ms, SHARE))
    inside = table.latency_ms <= budget
    errors = 1 - table.validation[inside]
    # a reference that random search leaves behind at once, so that the area is not all dead ground
    reference = (budget, float(np.median(errors)))
    everything = np.column_stack([table.latency_ms[inside], errors])
    best = pareto.hypervolume(everything, reference)

    def judge(history: Sequence[Candidate]) -> dict[str, float]:
        at = tuple(np.array([c.genes for c in history]).T)
        assert (table.latency_ms[at] <= budget).all(), "a budget was violated"
        points = np.column_stack([table.latency_ms[at], 1 - table.validation[at]])
        pick = search.ranked(history, budget)[0]
        return {
            "hypervolume": pareto.hypervolume(points, reference) / best,
            "regret": pick.cross_entropy - float(errors.min()),
            "test_error": 1 - float(table.test[pick.genes]),
        }

    runs = {
        name: [
            judge(searched(table.problem(budget, seed), name, evaluations)) for seed in range(seeds)
        ]
        for name in strategies.names()
    }
    print(f"\n{device}: budget {budget:.3g} ms, {seeds} seeds, {evaluations} evaluations")
    compare(runs, device, outcome)


def compare(runs: dict[str, list[dict[str, float]]], where: str, outcome: contract.Outcome) -> None:
    """Mean, spread and worst of each strategy, and its p against random search."""
    names = [name for name in runs if name != "random"]
    columns = {name: _columns(found) for name, found in runs.items()}
    p = holm([versus(columns[name], columns["random"]) for name in names])
    significance = dict(zip(names, p, strict=True))
    rows = []
    for name, column in columns.items():
        area = column["hypervolume"]
        spread = area.std(ddof=1) if len(area) > 1 else 0.0
        row: dict[str, float] = {"mean": area.mean(), "std": spread, "worst": area.min()}
        row |= {key: column[key].mean() for key in column if key != "hypervolume"}
        if name in significance:
            row["p_vs_random"] = significance[name]
        outcome.figures |= {f"{where}_{name}_{key}": value for key, value in row.items()}
        shown = [f"{value:.4f}" for value in row.values()]
        rows.append([name, *shown, *([""] * (name == "random"))])
    header = ["strategy", "hypervolume", "spread", "worst"]
    header += [key for key in columns["random"] if key != "hypervolume"] + ["p vs random"]
    print(contract.table(header, rows))
    for name in names:
        area, rival = columns[name]["hypervolume"].mean(), columns["random"]["hypervolume"].mean()
        better = area > rival and significance[name] < 0.05
        aim = "better than random, p < .05 (Holm)"
        outcome.aim(f"{where}_{name}", aim, significance[name], better)


def _columns(found: list[dict[str, float]]) -> dict[str, Array]:
    return {key: np.array([row[key] for row in found]) for key in found[0]}


def versus(a: dict[str, Array], b: dict[str, Array]) -> float:
    """Two-sided p of the hypervolumes' ranks."""
    return float(stats.mannwhitneyu(a["hypervolume"], b["hypervolume"]).pvalue)


def holm(p: Sequence[float]) -> list[float]:
    """Holm's step-down correction of several p values."""
    order = np.argsort(p)
    scaled = np.array(p)[order] * np.arange(len(p), 0, -1)
    corrected = np.minimum(np.maximum.accumulate(scaled), 1.0)
    return [float(corrected[np.flatnonzero(order == at)[0]]) for at in range(len(p))]


# ---- on a supernet of our own --------------------------------------------------------------------


def on_supernet(folder: Path, seeds: int, evaluations: int, outcome: contract.Outcome) -> None:
    """All strategies over the supernet of a finished run, inside that run's budgets.

    Each network is judged once, whoever proposes it: scores are kept in a file of rows, so that a
    stopped benchmark goes on. Areas are shares of what all searches together found.
    """
    from cli.features import with_features
    from cli.search import resume
    from nas.run import Run

    budget_ms = Run(folder).manifest()["spec"]["latency_ms"]
    with resume(folder, budget_ms) as (job, judge, _):
        problem = judged_once(job, judge)

        def seeded(name: str, seed: int) -> Problem:
            asking = replace(job, spec=job.spec.model_copy(update={"strategy": name}))
            return with_features(asking, replace(problem, seed=seed))

        runs = {
            name: [searched(seeded(name, seed), name, evaluations) for seed in range(seeds)]
            for name in strategies.names()
        }
        assert all(
            len(problem.inside(np.array([c.genes for c in found]))[0]) == len(found) == evaluations
            for some in runs.values()
            for found in some
        ), "a budget was violated, or a search ended early"
    points = {name: [_points(found) for found in some] for name, some in runs.items()}
    everything = np.concatenate([found for some in points.values() for found in some])
    random_errors = np.concatenate(points["random"])[:, 1]
    reference = (float(everything[:, 0].max()) * 1.01, float(np.median(random_errors)))
    best = pareto.hypervolume(everything, reference)
    least = everything[:, 1].min()
    print(f"\n{folder}: {seeds} seeds, {evaluations} evaluations")
    compare(
        {
            name: [
                {
                    "hypervolume": pareto.hypervolume(found, reference) / best,
                    "regret": float(found[:, 1].min() - least),
                }
                for found in some
            ]
            for name, some in points.items()
        },
        "supernet",
        outcome,
    )


def judged_once(job: Any, judge: Callable[[Any], tuple[float, float]]) -> Problem:
    """The run's own search problem, its scores kept on disk by (supernet, network)."""
    from cli import stages

    kept = contract.Rows(contract.RESULTS / "strategies.rows.jsonl")

    def evaluate(genes: Any) -> tuple[float, float]:
        key = {"supernet": job.weights_key, "genes": genes.tolist()}
        row = kept.get(key)
        if row is None:
            cross_entropy, accuracy = judge(genes)
            row = {"cross_entropy": cross_entropy, "accuracy": accuracy}
            kept.add(key, row)
        return row["cross_entropy"], row["accuracy"]

    return stages.make_problem(job, stages.latency_table(job), evaluate)


def _points(found: Sequence[Candidate]) -> Array:
    return np.array([(c.latency_ms, c.cross_entropy) for c in found])


if __name__ == "__main__":
    sys.exit(main())
