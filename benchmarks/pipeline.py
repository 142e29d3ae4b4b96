"""The whole chain on a multi-task, and each of its stages against its absence at equal ms.

`tiny_imagenet_20` (class and box) at 32 px, validation carved from its training images, test read
once per delivered file. What is run is in `pipeline_chain`; every stage is a verb of nasctl. Rows
go to benchmarks/results/pipeline.rows.jsonl, runs to --folder: the same command goes on there. One
seed takes about an hour of a core; --chains runs some of them only.

--part stranger (`pipeline_stranger`): delivered files re-measured by a script that imports nothing
of ours. --part int8 (`pipeline_int8`): do tables of float milliseconds pick the wrong network?
"""

from __future__ import annotations

import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks import contract, pipeline_int8, pipeline_stranger
from benchmarks.pipeline_chain import (
    CHAINS,
    ENDS,
    Experiment,
    Setting,
    evidence_path,
    file_timings,
    judged,
)
from nas import checkpoint, paired

DATA = "tiny_imagenet_20"
#: rates are the verbs' own; lengths are such that a seed takes an hour
FULL = Setting(DATA, 32, 16, 0.5, 64, search=7.0, own=9.0, tuning=5.0)
DIGITS = Setting(
    "benchmarks.fbnetv5_real:digits",
    *(8, 8, 0.25, 16),
    search=0.5,
    own=0.25,
    tuning=0.0,
    pruned=5,
    share=0.02,
    hw="jetson-tx2",
)
QUICK = ("whole",)
PARTS = ("chain", "stranger", "int8")
EQUAL = 1.05  # of milliseconds: what is further apart is not compared
HEADER = ("chain", "seed", "file", "kB", "ms", "p95", "test", "val")


def main(argv: list[str] | None = None) -> int:
    parser = contract.parser(__doc__)
    parser.add_argument("--part", choices=PARTS, default=PARTS[0])
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--chains", nargs="*", choices=list(CHAINS), default=list(CHAINS))
    parser.add_argument("--folder", type=Path, help="of the runs; kept between calls")
    arguments = parser.parse_args(argv)
    torch.set_num_threads(1)
    part = "" if arguments.part == PARTS[0] else f"_{arguments.part}"
    outcome = contract.Outcome(f"pipeline{part}")
    with tempfile.TemporaryDirectory() as passing:
        kept = arguments.folder or Path(tempfile.gettempdir(), "nasctl-benchmark-pipeline")
        folder = Path(passing) if arguments.quick else kept
        folder.mkdir(parents=True, exist_ok=True)
        place = folder if arguments.quick else contract.RESULTS
        rows = contract.Rows(place / f"{outcome.benchmark}.rows.jsonl")
        if arguments.part == "int8":
            pipeline_int8.run(outcome, rows, quick=arguments.quick)
        elif arguments.part == "stranger":
            pipeline_stranger.run(outcome, rows, folder, quick=arguments.quick)
        elif arguments.quick:
            run(outcome, [Experiment(DIGITS, 0, rows, folder)], QUICK)
        elif (data := contract.data(DATA)) is None:
            return outcome.skip(f"NASCTL_DATA/{DATA} is absent")
        else:
            setting, seeds = replace(FULL, data=str(data)), range(arguments.seeds)
            every = [Experiment(setting, seed, rows, folder / str(seed)) for seed in seeds]
            run(outcome, every, [name for name in CHAINS if name in arguments.chains])
        return outcome.finish(arguments.save and not arguments.quick)


def run(outcome: contract.Outcome, every: list[Experiment], chains: Sequence[str]) -> None:
    """Every chain of every seed, the session that times them, the tables."""
    for e in every:
        e.folder.mkdir(parents=True, exist_ok=True)
        for name in chains:
            row = delivered(e, name)
            print(f"{name}, seed {e.seed}: {row['file']}, test {row['test']}", flush=True)
        if e.measured:
            engines(e)
    sessions = [session(e, chains) for e in every]
    print(
        contract.table(
            HEADER,
            [
                line(e, name, took)
                for e, took in zip(every, sessions, strict=True)
                for name in chains
            ],
        )
    )
    for rival in chains:
        if "whole" in chains and rival != "whole":
            compared(outcome, every, sessions, rival)


def delivered(e: Experiment, name: str) -> dict[str, Any]:
    """The row of a chain's file."""

    def work() -> dict[str, Any]:
        began = time.process_time()
        found = judged(e, name, CHAINS[name](e))
        return {**found, "cpu_seconds": round(time.process_time() - began, 1)}

    return e.row(work, chain=name)


def engines(e: Experiment) -> None:
    """The whole chain's last stage: engines of what it delivers, verified, each timed alone."""
    for name in ENDS:

        def work(name: str = name) -> dict[str, Any]:
            return e.engine(CHAINS["whole"](e), name)

        row = e.row(work, engine=name)
        print(f"engine {name}: {row['ms']:.4g} ms, {row['bytes'] / 1e3:.4g} kB, {row['observed']}")


def session(e: Experiment, chains: Sequence[str]) -> dict[str, Any]:
    """Milliseconds of all chains' files, in turn with each other; nothing where they are not for
    this machine."""
    if not e.measured:
        return {}
    files = [delivered(e, name)["file"] for name in chains]

    def work() -> dict[str, Any]:
        timings = file_timings([e.folder / each for each in files], e.seed)
        return {name: asdict(each) for name, each in zip(chains, timings, strict=True)}

    return e.row(work, session=list(files))


def line(e: Experiment, name: str, took: dict[str, Any]) -> list[object]:
    row, timing = delivered(e, name), took.get(name)
    scores = [
        " ".join(f"{goal} {100 * value:.1f}" for goal, value in row[split].items())
        for split in ("test", "val")
    ]
    speed = [f"{timing['median_ms']:.4f}", f"{timing['p95_ms']:.4f}"] if timing else ["-", "-"]
    return [name, e.seed, Path(row["file"]).name, row["bytes"] / 1e3, *speed, *scores]


def compared(
    outcome: contract.Outcome,
    every: Sequence[Experiment],
    sessions: Sequence[dict[str, Any]],
    rival: str,
) -> None:
    """What the whole chain's metrics are relative to a rival's, over all seeds and, in pairs, over
    resampled test images."""
    ratios = [took["whole"]["median_ms"] / took[rival]["median_ms"] for took in sessions if took]
    doubt = [took[name]["noisy"] for took in sessions if took for name in ("whole", rival)]
    seen = [
        [checkpoint.read(evidence_path(e, name))[0] for e in every] for name in (rival, "whole")
    ]
    label = rival.replace(" ", "_")
    for goal in every[0].task.goals:
        before, after = ([one[goal.name] for one in side] for side in seen)
        got = paired.change(goal, before, after, rng=np.random.default_rng(0))
        print(
            f"whole against {rival}, {goal.name}: {100 * got.value:+.1f} % ({100 * got.low:+.1f} "
            f"to {100 * got.high:+.1f}, test images), at {max(ratios, default=1):.3f} of its time"
            f"{', in doubt' if any(doubt) else ''}"
        )
        outcome.figures[f"{goal.name}: whole against {rival}"] = got.value
        outcome.figures[f"{goal.name}: whole against {rival}, low"] = got.low
        fair = bool(ratios) and max(ratios) <= EQUAL and not any(doubt)
        met = fair and got.low > 0
        outcome.aim(f"{goal.name}_against_{label}", "interval above 0, equal ms", got.low, met)


if __name__ == "__main__":
    sys.exit(main())
