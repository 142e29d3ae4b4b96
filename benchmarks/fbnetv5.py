"""One search for many tasks against a search per task, where the truth is known.

Part `tables`: TransNAS-Bench-101, every network of the micro space with its final validation metric
on each task of the table. One query is one network trained; the one run hears all tasks' losses of
it, a search of one task only that task's. All use `nas.fbnetv5` with the same settings, which were
chosen in part `dev` (the macro space and three invented landscapes), never on the micro space.

Rows go to benchmarks/results/fbnetv5.rows.jsonl as they finish; the same command goes on there.
"""

from __future__ import annotations

import sys

from benchmarks import contract, fbnetv5_tables
from benchmarks.fbnetv5_tables import Bench

PARTS = {"tables": fbnetv5_tables.reported, "dev": fbnetv5_tables.development}


def main(argv: list[str] | None = None) -> int:
    parser = contract.parser(__doc__)
    parser.add_argument("--part", choices=PARTS, default="tables")
    arguments = parser.parse_args(argv)
    outcome = contract.Outcome("fbnetv5")
    folder = contract.data("transnasbench101")
    if folder is None:
        return outcome.skip("NASCTL_DATA/transnasbench101 is absent")
    rows = None if arguments.quick else contract.Rows(contract.RESULTS / "fbnetv5.rows.jsonl")
    PARTS[arguments.part](Bench(folder, outcome, rows, quick=arguments.quick))
    return outcome.finish(arguments.save)


if __name__ == "__main__":
    sys.exit(main())
