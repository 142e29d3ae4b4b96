"""One search for many tasks against a search per task, where the truth is known.

Part `tables`: TransNAS-Bench-101, every network of the micro space with its final validation metric
on each task of the table. One query is one network trained; the one run hears all tasks' losses of
it, a search of one task only that task's. All use `nas.fbnetv5` with the same settings, which were
chosen in part `dev` (the macro space and three invented landscapes), never on the micro space.

Part `real` (`fbnetv5_real`): one supernet for the tasks of tiny_imagenet_20 and of camvid.

Rows go to benchmarks/results/fbnetv5*.rows.jsonl as they finish; the same command goes on there.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

import torch

from benchmarks import contract, fbnetv5_real, fbnetv5_tables
from benchmarks.fbnetv5_tables import Bench

PARTS = {"tables": fbnetv5_tables.reported, "dev": fbnetv5_tables.development}

REAL = "real"


def main(argv: list[str] | None = None) -> int:
    parser = contract.parser(__doc__)
    parser.add_argument("--part", choices=[*PARTS, REAL], default="tables")
    parser.add_argument("--seeds", type=int, default=2, help="of part real")
    parser.add_argument("--folder", type=Path, help="for unfinished trainings; kept between runs")
    arguments = parser.parse_args(argv)
    if arguments.part == REAL:
        return _real(arguments)
    outcome = contract.Outcome("fbnetv5")
    folder = contract.data("transnasbench101")
    if folder is None:
        return outcome.skip("NASCTL_DATA/transnasbench101 is absent")
    rows = None if arguments.quick else contract.Rows(contract.RESULTS / "fbnetv5.rows.jsonl")
    PARTS[arguments.part](Bench(folder, outcome, rows, quick=arguments.quick))
    return outcome.finish(arguments.save)


def _real(arguments: argparse.Namespace) -> int:
    torch.set_num_threads(1)
    outcome = contract.Outcome("fbnetv5_real")
    if arguments.quick:
        with tempfile.TemporaryDirectory() as folder:
            fbnetv5_real.quick(outcome, Path(folder))
    else:
        kept = Path(tempfile.gettempdir(), "nasctl-benchmark-fbnetv5")
        fbnetv5_real.run(outcome, arguments.seeds, arguments.folder or kept)
    return outcome.finish(arguments.save)


if __name__ == "__main__":
    sys.exit(main())
