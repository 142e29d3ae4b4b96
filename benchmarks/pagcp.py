"""Pruning networks of several tasks: PAGCP against its rivals and controls, on real data.

Parts, in order (`--parts` chooses): `gate` (is the dense network converged? the second half of its
training should change every metric by less than half a point; a network that surely gained more
goes no further),
`dense` (with the fine-tuning that all others get), `pilot` (PAGCP to the FLOPs target with short
and long fine-tuning, on validation images), `flops` and `latency` (PAGCP and every baseline to one
target of each), `controls` (PAGCP's shape from scratch, a small network taught by the dense one; at
equal milliseconds), `ablations` (of class_box) and `seeds` (two more trainings of PAGCP and its two
strongest rivals, which validation images choose).

Rows go to benchmarks/results/pagcp.rows.jsonl as they finish, their networks and evidence to
`--folder`; the same command goes on where it was stopped, in the middle of a training if need be.
Losses that steer pruning are of validation images, which are held out of train; test images are
judged once per row, for the table alone.
"""

from __future__ import annotations

import sys


def main(argv: list[str] | None = None) -> int:
    # not above: processes that measure import this module again, and torch takes them two seconds
    from benchmarks import pagcp_parts

    return pagcp_parts.run(__doc__, argv)


if __name__ == "__main__":
    sys.exit(main())
