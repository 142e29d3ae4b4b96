"""Pruning networks of several tasks: PAGCP against its rivals and controls, on real data.

Parts, the most telling first (`--parts` chooses): `dense` (converged, and with the fine-tuning that
all others get), `flops` and `latency` (PAGCP and every baseline to one target of each), `controls`
(PAGCP's shape from scratch, a small network taught by the dense one), `ablations`, `seeds` (two
more trainings of PAGCP and its two strongest rivals, which validation images choose) and `longer`
(what twice the dense training changes).

Rows go to benchmarks/results/pagcp.rows.jsonl as they finish; the same command goes on where it was
stopped, in the middle of a training if need be. Losses that steer pruning are of validation images,
which are held out of train (CamVid brings its own); test images are judged once per row, for the
table alone.
"""

from __future__ import annotations

import sys


def main(argv: list[str] | None = None) -> int:
    # not above: processes that measure import this module again, and torch takes them two seconds
    from benchmarks import pagcp_parts

    return pagcp_parts.run(__doc__, argv)


if __name__ == "__main__":
    sys.exit(main())
