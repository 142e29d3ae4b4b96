"""Pruning networks of several tasks: PAGCP against its rivals and controls, on real data."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import torch

from benchmarks import contract
from benchmarks.pagcp_experiment import Experiment, Key, experiments


def main(argv: list[str] | None = None) -> int:
    parser = contract.parser(__doc__)
    parser.add_argument("--part", nargs="+", default=["dense"])
    parser.add_argument("--network", nargs="+", default=["class_box", "street"])
    parser.add_argument("--folder", type=Path, required=True)
    arguments = parser.parse_args(argv)
    torch.set_num_threads(1)
    rows = contract.Rows(contract.RESULTS / "pagcp.rows.jsonl")
    found = experiments(rows, arguments.folder)
    for part in arguments.part:
        for name in arguments.network:
            {"dense": dense, "longer": longer}[part](found[name])
    return 0


def dense(experiment: Experiment) -> None:
    key = experiment.key("dense", 0)

    def work() -> Key:
        return experiment.judged(key, experiment.dense_network(0))

    experiment.row(key, work)


def longer(experiment: Experiment) -> None:
    key = experiment.key("dense twice as long", 0)
    schedule = replace(experiment.dense, steps=2 * experiment.dense.steps)

    def work() -> Key:
        net = experiment.trained(key, experiment.initial(0), schedule)
        return experiment.judged(key, net)

    experiment.row(key, work)


if __name__ == "__main__":
    sys.exit(main())
