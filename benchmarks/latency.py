"""How wrong are latencies: this machine's tables, public measurements, single kernels.

(a) `latency_local`: networks measured here, beside the noise of the measurement itself;
(b) `latency_public`: measurements nobody here made, and devices that were hardly measured;
(c) `latency_kernels`: convolutions at sizes that were never measured.
"""

from __future__ import annotations

import sys

from benchmarks import contract, latency_kernels, latency_local, latency_public

PARTS = {
    "local": latency_local.part,
    "public": latency_public.part,
    "kernels": latency_kernels.part,
}


def main(argv: list[str] | None = None) -> int:
    parser = contract.parser(__doc__)
    parser.add_argument("--part", choices=PARTS, help="only this one")
    arguments = parser.parse_args(argv)
    outcome = contract.Outcome("latency" + (f"_{arguments.part}" if arguments.part else ""))
    for name, part in PARTS.items():
        if arguments.part in (None, name):
            part(outcome, arguments.quick)
    return outcome.finish(arguments.save)


if __name__ == "__main__":
    sys.exit(main())
