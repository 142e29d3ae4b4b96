"""The parts of the pruning benchmark, in order, and its tables (`python -m benchmarks.pagcp`)."""

from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np
import torch

from benchmarks import contract, pagcp_experiment, pagcp_rows
from benchmarks.pagcp_experiment import NETWORKS, Experiment, Key
from benchmarks.pagcp_rows import (
    DENSE,
    EQUAL,
    FLOPS,
    LATENCY,
    LONGER,
    ONE_SHOT,
    PAGCP,
    RIVALS,
    SCRATCH,
    SMALL,
    SUMMED,
    TUNED,
)

PARTS = ("dense", "flops", "latency", "controls", "ablations", "seeds", "longer")
SEEDS = 3
COLUMNS = ("MACs %", "params %", "ms %", "speed-up / MACs", "untuned", "tuned", "low", "seconds")


def run(doc: str | None, argv: list[str] | None = None) -> int:
    parser = contract.parser(doc)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--networks", nargs="+", choices=NETWORKS, default=list(NETWORKS))
    parser.add_argument("--folder", type=Path, help="for networks and trainings; keep it")
    arguments = parser.parse_args(argv)
    outcome = contract.Outcome("pagcp")
    torch.set_num_threads(1)
    if arguments.quick:
        experiment = quick()
        experiments, parts = [experiment] if experiment else [], ["dense"]
    else:
        folder = arguments.folder or Path(tempfile.gettempdir(), "nasctl-benchmark-pagcp")
        rows = contract.Rows(contract.RESULTS / "pagcp.rows.jsonl")
        found = [pagcp_experiment.load(name, rows, folder) for name in arguments.networks]
        experiments, parts = [one for one in found if one], arguments.parts
    if not experiments:
        return outcome.skip("NASCTL_DATA/tiny_imagenet_20 and NASCTL_DATA/camvid are absent")
    for part in (part for part in PARTS if part in parts):
        for experiment in experiments:
            work(part, experiment)
    if arguments.quick:
        # by the published bounds: an untrained network has no room, and would be loosened in vain
        pagcp_rows.pruned(experiments[0], EQUAL, 0, FLOPS)
    for experiment in experiments:
        report(experiment, outcome)
    return outcome.finish(arguments.save and not arguments.quick)


def quick() -> Experiment | None:
    """Eight images of CamVid and two steps each, in a folder of its own."""
    folder = Path(tempfile.mkdtemp())
    found = pagcp_experiment.load("street", contract.Rows(folder / "rows.jsonl"), folder)
    return found and pagcp_experiment.shortened(found, images=8, steps=2)


def work(part: str, experiment: Experiment) -> None:
    """All rows of one part, the most telling first."""
    if part == "dense":
        pagcp_rows.dense(experiment, 0)
        pagcp_rows.tuned(experiment, 0)
    elif part in (FLOPS, LATENCY):
        for method in (PAGCP, *RIVALS):
            pagcp_rows.pruned(experiment, method, 0, part)
    elif part == "controls":
        for cost in (LATENCY, FLOPS):
            pagcp_rows.small(experiment, 0, cost)
            pagcp_rows.scratch(experiment, 0, cost)
    elif part == "ablations":
        for method in (EQUAL, SUMMED, ONE_SHOT):
            pagcp_rows.pruned(experiment, method, 0, FLOPS)
    elif part == "longer":
        pagcp_rows.longer(experiment, 0)
    else:
        for seed in range(1, SEEDS):
            for method in (PAGCP, *strongest(experiment, LATENCY)):
                pagcp_rows.pruned(experiment, method, seed, LATENCY)


def strongest(experiment: Experiment, cost: str, n: int = 2) -> list[str]:
    """The baselines inside the target whose worst goal changed least, on validation images."""
    before = pagcp_rows.tuned(experiment, 0)["val"]
    worst: dict[str, float] = {}
    for method in RIVALS:
        row = pagcp_rows.pruned(experiment, method, 0, cost)
        if "infeasible" not in row and not pagcp_rows.missed(row, cost):
            worst[method] = min(row["val"][goal] / before[goal] - 1 for goal in before)
    return sorted(worst, key=worst.__getitem__, reverse=True)[:n]


# ---- the tables ----------------------------------------------------------------------------------


def report(experiment: Experiment, outcome: contract.Outcome) -> None:
    """What there is of one network's rows."""
    name, rows = experiment.name, experiment.rows
    dense, tuned = (rows.get(experiment.key(method, 0)) for method in (DENSE, TUNED))
    if not (dense and tuned):
        return
    for goal, value in dense["test"].items():
        outcome.figures[f"{name}_{goal}"] = value
        outcome.figures[f"{name}_{goal}_tuned"] = tuned["test"][goal]
    longer = rows.get(experiment.key(LONGER, 0))
    if longer:
        for split in ("val", "test"):
            moved = max(longer[split][goal] - dense[split][goal] for goal in dense[split])
            outcome.figures[f"{name}_longer_{split}_points"] = 100 * moved
        points = outcome.figures[f"{name}_longer_val_points"]
        outcome.aim(f"{name} converged", "twice the training < 0.5 point", points, points < 0.5)
    for cost in (FLOPS, LATENCY):
        methods = (PAGCP, *RIVALS, EQUAL, SUMMED, ONE_SHOT, SCRATCH, SMALL)
        found = {method: rows.get(experiment.key(method, 0, cost=cost)) for method in methods}
        here = {method: row for method, row in found.items() if row}
        if not here:
            continue
        print(f"\n{name}, to {pagcp_rows.TARGETS[cost]:.0%} of the {cost}; the worst goal's change")
        print("on test in %: untuned against dense, tuned against dense with the same fine-tuning,")
        print("and the lower end of its 95 % interval over images. Behind (!): over the target as")
        print("measured afterwards, and so not compared")
        over = {method for method in here if late(here[method], cost)}
        table = [[f"{m} (!)" if m in over else m, *line(row)] for m, row in here.items()]
        print(contract.table(["method", *COLUMNS], table))
        compared(f"{name}_{cost}", here, outcome, over)
    pooled(experiment, outcome)


def late(row: Key, cost: str) -> bool:
    return "infeasible" not in row and pagcp_rows.missed(row, cost)


def line(row: Key) -> list[object]:
    if "infeasible" in row:
        return ["-"] * len(COLUMNS)
    share = float(np.median(row["ms_shares"]))
    untuned = row.get("untuned")
    return [
        100 * row["macs_share"],
        100 * row["params_share"],
        100 * share,
        row["macs_share"] / share,
        100 * worst(untuned["change"]) if untuned else "-",
        100 * worst(row["change"]),
        100 * worst(row["change"], at=1),
        row.get("prune_seconds", "-"),
    ]


def worst(change: dict[str, list[float]], at: int = 0) -> float:
    """Of all goals; `at` 0 is the change, 1 and 2 are the ends of its interval."""
    return min(values[at] for values in change.values())


def compared(name: str, rows: dict[str, Key], outcome: contract.Outcome, over: set[str]) -> None:
    """Figures of every method, and the issue's aims for PAGCP. Those `over` the target are nobody's
    rivals: a network that is allowed more is better for that."""
    feasible = {method: row for method, row in rows.items() if "infeasible" not in row}
    for method, row in feasible.items():
        outcome.figures[f"{name}_{method.replace(' ', '_')}_worst"] = worst(row["change"])
    ours = feasible.get(PAGCP)
    if ours is None:
        return
    low, share = worst(ours["change"], at=1), float(np.median(ours["ms_shares"]))
    removed = 1 - max(ours["macs_share"], ours["params_share"])
    efficiency = ours["macs_share"] / share
    outcome.aim(f"{name} removed", ">= 60 % of MACs and parameters", removed, removed >= 0.6)
    outcome.aim(f"{name} worst goal", "95 % lower bound >= -2 %", low, low >= -0.02)
    outcome.aim(f"{name} speed", ">= 0.85 of the MACs ratio", efficiency, efficiency >= 0.85)
    rivals = {method: row for method, row in feasible.items() if method not in {PAGCP, *over}}
    if rivals:
        ahead = worst(ours["change"]) - max(worst(row["change"]) for row in rivals.values())
        met = ahead > 0 and PAGCP not in over
        outcome.aim(f"{name} rivals", "worst goal better than any other's", ahead, met)


def pooled(experiment: Experiment, outcome: contract.Outcome) -> None:
    """Those trained with several seeds: mean over seeds, its interval over images, worst seed."""
    table = []
    for method in (PAGCP, *RIVALS):
        keys = [experiment.key(method, seed, cost=LATENCY) for seed in range(SEEDS)]
        rows = [row for row in map(experiment.rows.get, keys) if row and "change" in row]
        if len(rows) < SEEDS:
            continue
        befores = [experiment.key(TUNED, seed) for seed in range(SEEDS)]
        changes = experiment.changes(befores, keys)
        seeds = [worst(row["change"]) for row in rows]
        for goal, (value, low, high) in changes.items():
            figures = [f"{100 * v:+.2f}" for v in (value, low, high)]
            table.append([method, goal, *figures, f"{100 * min(seeds):+.2f}"])
        name = f"{experiment.name}_{LATENCY}_{SEEDS}_seeds_{method}"
        outcome.figures[f"{name}_worst_low"] = worst(changes, at=1)
    if table:
        print(f"\n{experiment.name}, {SEEDS} seeds, change on test in %")
        print(contract.table(["method", "goal", "mean", "low", "high", "worst of a seed"], table))
