"""What do INT8, half precision and their guards give on this processor, in every runtime?

Random networks of every space (with `--largest` the largest one) with a fitted last layer
(`deploy_nets.py`), exported as `nasctl` does: fp32, fp16, bf16 and INT8 files, each built as the
runtime's engine for one input, held against torch, judged and timed in turn with the others
(`deploy_rows.py`). INT8 is calibrated on training images, guarded at half a point on one half of
the held-out ones and told for the other. Beside our guards: the same scheme without them, ONNX
Runtime's own defaults, and with `--nncf PYTHON` (the interpreter of an environment that has it)
NNCF's accuracy control with the same data and bound.

Speeds are ratios to fp32 in the same processes, with the 5 and 95 % points of the processes'
ratios; a claim counts where the lower one makes it. Rows in doubt are kept and marked, and the
speed guard takes nothing of them. *In float* is the share of the multiplications that are seen to
compute so, whoever left them there. How long guards take is not compared: ours judges many images
at once, NNCF's one at a time. All rows are in results/deploy.rows.jsonl under the processor's name,
and a stopped run goes on; processors are never mixed in a table.

Not here: trained networks (`nasctl quantize` on a run), TensorRT.
"""

from __future__ import annotations

import itertools
import json
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks import contract, deploy_nets
from benchmarks.deploy_rows import BOUND, FLOAT, NNCF, Effort, chosen, in_float, measured
from nas import space, tasks
from nas.tasks import Task

PROCESSOR = contract.machine()["processor"]
RUNTIMES = ("onnxruntime", "openvino", "aoti")
DEFAULTS = "library's defaults"
INT8 = ("u8", "u8 but depthwise", "s8")
FASTER = 1.5
QUICK = Effort(processes=1, seconds=1.0)
HEADER = (
    *("space", "net", "runtime", "file", "computes in", "ms", "speed", "from", "to", "clock", "kB"),
    *("engine kB", "build s", "error", "points", "in float", "chosen"),
)
BESIDE = ("space", "net", "runtime", "", "in float", "points", "speed", "from", "to")
Found = tuple[dict[str, Any], dict[str, Any]]  # a row's key and the row


def main(argv: list[str] | None = None) -> int:
    flags = contract.parser(__doc__)
    flags.add_argument("--networks", type=int, default=1, help="of each space, at random")
    flags.add_argument("--largest", action="store_true", help="of each space, instead")
    flags.add_argument("--spaces", nargs="*", choices=space.names(), default=space.names())
    flags.add_argument("--runtimes", nargs="*", choices=RUNTIMES, default=list(RUNTIMES))
    flags.add_argument("--processes", type=int, default=5, help="that a row is timed in")
    flags.add_argument("--nncf", default="", metavar="PYTHON", help="that can import nncf")
    flags.add_argument("--again", action="store_true", help="measure rows in doubt once more")
    flags.add_argument("--told", action="store_true", help="of all rows there are, no more")
    flags.add_argument("--processor", default=PROCESSOR, help="whose rows are told")
    asked = flags.parse_args(argv)
    outcome = contract.Outcome("deploy")
    folder = None if asked.quick else contract.data("cifar10")
    if folder is None and not (asked.quick or asked.told):
        return outcome.skip("NASCTL_DATA/cifar10 is absent")
    effort = QUICK if asked.quick else Effort(asked.processes, 2.0, asked.nncf)
    rows_path = contract.RESULTS / "deploy.rows.jsonl"
    rows = contract.Rows(Path(tempfile.mkdtemp()) / "rows" if asked.quick else rows_path)
    work = Work(str(folder or "digits"), rows, effort, asked.quick, asked.again)
    drawn: list[int | str] = list(range(1 if asked.quick else asked.networks))
    places = itertools.product(
        ["resnet"] if asked.quick else asked.spaces,
        [deploy_nets.LARGEST] if asked.largest else drawn,
        RUNTIMES[:1] if asked.quick else asked.runtimes,
    )
    if asked.told:
        every = [(json.loads(name), row) for name, row in rows.done.items()]
        found = [(name, row) for name, row in every if name["processor"] == asked.processor]
    else:
        found = [(key(*place), work.row(*place)) for place in places]
    print(contract.table(HEADER, [line for each in found for line in table_lines(*each)]))
    print(contract.table(BESIDE, [line for each in found for line in beside(*each)]))
    for name, row in found:
        for label, why in row["refused"].items():
            print(f"{name['space']} {name['network']}, {name['runtime']}, {label}: {why}")
    figures(outcome, found)
    return outcome.finish(asked.save)


def key(name: str, at: int | str, runtime: str) -> dict[str, Any]:
    place = {"space": name, "network": at, "runtime": runtime}
    return {**place, "processor": PROCESSOR, "version": 2}


@dataclass
class Work:
    """Where rows come from."""

    data: str
    rows: contract.Rows
    effort: Effort
    quick: bool
    again: bool
    subjects: dict[tuple[str, int | str], deploy_nets.Subject] = field(default_factory=dict)

    @cached_property
    def task(self) -> Task:
        return tasks.load(self.data)

    def row(self, name: str, at: int | str, runtime: str) -> dict[str, Any]:
        """What is known, or measured now: again where NNCF is asked for and was not, or where the
        row is in doubt and that is asked for."""
        found = self.rows.get(key(name, at, runtime))
        if found is not None and not self.wanting(found, runtime):
            return found
        if (name, at) not in self.subjects:  # one at a time: all runtimes of a network in turn
            self.subjects = {(name, at): deploy_nets.subject(name, at, self.task, quick=self.quick)}
        found = measured(self.subjects[name, at], runtime, self.effort)
        self.rows.add(key(name, at, runtime), found)
        return found

    def wanting(self, row: dict[str, Any], runtime: str) -> bool:
        lacks = bool(self.effort.nncf) and runtime != "aoti" and not row["nncf"]
        return lacks or (self.again and any(one["noisy"] for one in row["files"].values()))


def table_lines(key: dict[str, Any], row: dict[str, Any]) -> list[list[object]]:
    names = (key["space"], key["network"], key["runtime"])
    choice = chosen(row)
    taken = choice.name if choice else None
    blank = ["-"] * (len(HEADER) - len(names) - 2)
    refused = [[*names, label, "refused", *blank] for label in row["refused"]]
    return [
        [
            *(*names, label, one["observed"], one["ms"], one["ratio"], one["low"], one["high"]),
            " ".join([row["clock"], *(["noisy"] if one["noisy"] else [])]),
            *(one["model_bytes"] / 1e3, one["engine_bytes"] / 1e3, one["build_seconds"]),
            f"{one['error']:.1e}{'' if one['holds'] else ' !'}",
            *(f"{-100 * one['drop_told']:+.2f}", f"{in_float(one):.0%}"),
            "*" if label == taken else "",
        ]
        for label, one in row["files"].items()
    ] + refused


def beside(key: dict[str, Any], row: dict[str, Any]) -> list[list[object]]:
    """Our fastest INT8 file inside the bound, NNCF's and the library's defaults."""
    ours = fastest_int8(row)
    return [
        [
            *(key["space"], key["network"], key["runtime"], label if label in others else "ours"),
            *(f"{in_float(one):.0%}", f"{-100 * one['drop_told']:+.2f}"),
            *(one["ratio"], one["low"], one["high"]),
        ]
        for others in [(NNCF, DEFAULTS)]
        for label, one in row["files"].items()
        if label in (ours, *others)
    ]


def fastest_int8(row: dict[str, Any]) -> str | None:
    """Of the files that a guard holds to the bound on its half; None where there is none."""
    inside = [name for name in INT8 if name in row["files"] and row["files"][name]["spent"] <= 1]
    return max(inside, key=lambda name: row["files"][name]["ratio"], default=None)


def figures(outcome: contract.Outcome, found: Sequence[Found]) -> None:
    """The choice beside fp32 and beside what others make at the same bound."""
    choices = [(row, choice.name) for _, row in found if (choice := chosen(row))]
    taken = [row["files"][name] for row, name in choices]
    if not taken:
        return
    drops = [100 * one["drop_told"] for one in taken]
    quick = [one for one in best(found).values() if one["low"] >= FASTER]
    # an accuracy near chance can stay where the answers did not: such a file shows nothing
    held = [one for one in quick if one["drop_told"] <= BOUND and one["holds"]]
    lose = [name for row, name in choices if (own := fastest_int8(row)) and loses(row, own)]
    outcome.figures |= {
        "rows": len(found),
        "rows_in_doubt": sum(any(f["noisy"] for f in r["files"].values()) for _, r in found),
        "cells_refused": sum(len(row["refused"]) for _, row in found),
        "cells_built": sum(len(row["files"]) for _, row in found),
        "cells_beyond_tolerance": sum(
            not one["holds"] for _, row in found for one in row["files"].values()
        ),
        "fp32_error_largest": max(row["files"][FLOAT]["error_largest"] for row, _ in choices),
        "speed_geomean": geomean([one["ratio"] for one in taken]),
        "speed_lowest": min(one["ratio"] for one in taken),
        "drop_points_mean": float(np.mean(drops)),
        "drop_points_worst": max(drops),
        "kept_in_float": sum(name == FLOAT for _, name in choices),
        "networks_int8_faster_1_5": len(quick),
        "networks_int8_faster_1_5_inside_the_bound_told": len(held),
        "rows_where_int8_loses": len(lose),
        "rows_where_int8_loses_kept_in_float": lose.count(FLOAT),
    }
    for name in (NNCF, DEFAULTS):
        outcome.figures |= compared(found, name)
    aim = f"networks whose INT8 is at least {FASTER} times as fast within half a point"
    outcome.aim(aim, ">= 5", len(held), len(held) >= 5)


def best(found: Sequence[Found]) -> dict[tuple[str, int | str], dict[str, Any]]:
    """Of each network the INT8 file, in any runtime, whose lower end is fastest of those that a
    guard offers. The half that is told judges it afterwards and has no part in the choice."""
    made: dict[tuple[str, int | str], dict[str, Any]] = {}
    for name, row in found:
        for label in INT8:
            one = row["files"].get(label)
            if one is None or one["spent"] > 1:
                continue
            place = name["space"], name["network"]
            if place not in made or one["low"] > made[place]["low"]:
                made[place] = one
    return made


def loses(row: dict[str, Any], label: str) -> bool:
    """Is even our fastest INT8 file slower than fp32 in all processes?"""
    return bool(row["files"][label]["high"] < 1)


def compared(found: Sequence[Found], other: str) -> dict[str, float]:
    """Ours over theirs, of the rows that have both and where ours is inside the bound."""
    pairs = [
        (row["files"][own], row["files"][other])
        for _, row in found
        if other in row["files"] and (own := fastest_int8(row))
    ]
    if not pairs:
        return {}
    return {
        f"{other}: rows": len(pairs),
        f"{other}: speed of ours over theirs, geomean": geomean(
            [ours["ratio"] / theirs["ratio"] for ours, theirs in pairs]
        ),
        f"{other}: ours faster beyond the spread": sum(a["low"] > b["high"] for a, b in pairs),
        f"{other}: theirs faster beyond the spread": sum(b["low"] > a["high"] for a, b in pairs),
        f"{other}: share in float, ours": float(np.mean([in_float(a) for a, _ in pairs])),
        f"{other}: share in float, theirs": float(np.mean([in_float(b) for _, b in pairs])),
        f"{other}: worst points, ours": 100 * max(ours["drop_told"] for ours, _ in pairs),
        f"{other}: worst points, theirs": 100 * max(theirs["drop_told"] for _, theirs in pairs),
    }


def geomean(values: Sequence[float]) -> float:
    return float(np.exp(np.log(values).mean()))


if __name__ == "__main__":
    torch.set_num_threads(1)
    sys.exit(main())
