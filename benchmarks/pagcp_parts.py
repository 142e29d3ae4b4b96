"""The parts of the pruning benchmark, in order (`python -m benchmarks.pagcp`)."""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch

from benchmarks import contract, pagcp_experiment, pagcp_rows
from benchmarks.pagcp_experiment import NETWORKS, PILOT, Experiment
from benchmarks.pagcp_rows import (
    BY_MACS,
    EQUAL,
    FLOPS,
    LATENCY,
    ONE_SHOT,
    PAGCP,
    RIVALS,
    STALE,
    SUMMED,
)
from benchmarks.pagcp_tables import CONVERGED, SEEDS, moved, report

PARTS = ("gate", "dense", "pilot", "flops", "latency", "controls", "ablations", "seeds")
ABLATED = "class_box"  # the network that ablations are run on
ABLATIONS = {EQUAL: FLOPS, SUMMED: FLOPS, ONE_SHOT: FLOPS, STALE: FLOPS, BY_MACS: LATENCY}


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
    passed = list(experiments)
    for part in (part for part in PARTS if part in parts):
        for experiment in passed:
            work(part, experiment)
        if part == "gate":
            passed = [one for one in experiments if converged(one)]
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
    if part == "gate":
        pagcp_rows.half(experiment, 0)
        pagcp_rows.dense(experiment, 0)
    elif part == "dense":
        pagcp_rows.dense(experiment, 0)
        pagcp_rows.tuned(experiment, 0)
    elif part == "pilot":
        for epochs in PILOT[experiment.name]:
            pagcp_rows.pilot(experiment, epochs)
    elif part in (FLOPS, LATENCY):
        for method in (PAGCP, *RIVALS):
            pagcp_rows.pruned(experiment, method, 0, part)
    elif part == "controls":
        pagcp_rows.small(experiment, 0, LATENCY)
        pagcp_rows.scratch(experiment, 0, LATENCY)
    elif part == "ablations":
        for method, cost in ABLATIONS.items() if experiment.name == ABLATED else ():
            pagcp_rows.pruned(experiment, method, 0, cost)
    else:
        for seed in range(1, SEEDS):
            for method in (PAGCP, *strongest(experiment, LATENCY)):
                pagcp_rows.pruned(experiment, method, seed, LATENCY)


def converged(experiment: Experiment) -> bool:
    """Not shown to be otherwise, on validation images: a rise by half a point or more counts where
    its interval is above 0, since few images make any two trainings differ by more."""
    for goal, (points, low, _) in moved(experiment, "val").items():
        if points >= CONVERGED and low > 0:
            print(
                f"{experiment.name}: {goal} rose by {points:.2f} points in the second half of the "
                "training; no other part is run. Train longer, or choose --parts without gate"
            )
            return False
    return True


def strongest(experiment: Experiment, cost: str, n: int = 2) -> list[str]:
    """The baselines inside the target whose worst goal changed least, on validation images."""
    before = pagcp_rows.tuned(experiment, 0)["val"]
    worst: dict[str, float] = {}
    for method in RIVALS:
        row = pagcp_rows.pruned(experiment, method, 0, cost)
        if not pagcp_rows.missed(row, cost):
            worst[method] = min(row["val"][goal] / before[goal] - 1 for goal in before)
    return sorted(worst, key=worst.__getitem__, reverse=True)[:n]
