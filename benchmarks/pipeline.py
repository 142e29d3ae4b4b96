"""The whole chain on a multi-task, and each of its stages against its absence at equal ms.

`tiny_imagenet_20` (class and box) at 48 px, validation carved from its training images. Test images
choose nothing; delivered files are judged on them, and search and prune read them for their own
reports. What is run is in `pipeline_chain`; every stage is a verb of nasctl. Rows go to
benchmarks/results/pipeline.rows.jsonl, runs to --folder: the same command goes on there. One seed
takes somewhat over an hour of a core; --chains runs some of them only.

--part stranger (`pipeline_stranger`): delivered files re-measured by a script that imports nothing
of ours. --part int8 (`pipeline_int8`): do tables of float milliseconds pick the wrong network?
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks import contract, pipeline_int8, pipeline_stranger
from benchmarks.pipeline_chain import CHAINS, judged
from benchmarks.pipeline_rows import ATTEMPTS, machine
from benchmarks.pipeline_stages import ENDS, Experiment, Setting, file_timings
from nas import paired
from nas.errors import NasctlError
from nas.goals import Goal
from nas.run import digest

DATA = "tiny_imagenet_20"
#: rates are the verbs' own; lengths are such that a seed takes somewhat over an hour. The width is
#: one at which INT8 is faster, also after pruning; a stem strides at both sizes, or the smaller one
#: would not be cheaper
FULL = Setting(DATA, 48, 32, 1.2, 64, search=3.0, own=4.0, tuning=2.0)
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
WHOLE = "whole"
QUICK = (WHOLE,)
PARTS = ("chain", "stranger", "int8")
EQUAL = (0.95, 1.05)  # the whole chain's milliseconds, of its rival's
HEADER = ("chain", "seed", "file", "kB", "ms", "p95", "test", "val", "ended with", "in doubt")


@dataclass(frozen=True)
class Seed:
    """What one seed's chains delivered: of each its row and, where it was timed, its timing."""

    seed: int
    rows: dict[str, dict[str, Any]]
    took: dict[str, dict[str, Any]]


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
            setting = replace(FULL, data=str(data))
            own = folder / digest([asdict(setting), machine()])[:8]
            every = [Experiment(setting, at, rows, own / str(at)) for at in range(arguments.seeds)]
            run(outcome, every, [name for name in CHAINS if name in arguments.chains])
        return outcome.finish(arguments.save and not arguments.quick)


def run(outcome: contract.Outcome, every: list[Experiment], chains: Sequence[str]) -> None:
    """Every chain of every seed, the session that times them, the tables. A chain that comes to no
    file is said and left out, and made again by the next call."""
    seeds = []
    for e in every:
        e.folder.mkdir(parents=True, exist_ok=True)
        rows = delivered(e, chains)
        if e.measured and WHOLE in rows:
            engines(e)
        seeds.append(Seed(e.seed, rows, session(e, rows)))
    print(contract.table(HEADER, [line(seed, name) for seed in seeds for name in seed.rows]))
    for rival in chains:
        if rival != WHOLE:
            compared(outcome, every[0].task.goals, seeds, rival)


def delivered(e: Experiment, chains: Sequence[str]) -> dict[str, dict[str, Any]]:
    """The rows of the chains' files, by chain; rivals follow the whole chain, and none is made
    where that came to nothing."""
    rows: dict[str, dict[str, Any]] = {}
    for name in chains:

        def work(name: str = name) -> dict[str, Any]:
            made = CHAINS[name](e)
            return {**judged(e, made.run), "codes": made.codes}

        try:
            row = e.row(work, e.there, chain=name)
        except NasctlError as error:
            print(f"{name}, seed {e.seed}: no file: {error}", flush=True)
            if name == WHOLE:
                break
            continue
        if WHOLE in rows and row["sha256"] == rows[WHOLE]["sha256"]:
            told = f"not applicable: the speed guard kept float{ended(row)}"
            print(f"{name}, seed {e.seed}: {told}", flush=True)
            continue
        rows[name] = row
        print(f"{name}, seed {e.seed}: {row['file']}, test {row['test']}", flush=True)
    return rows


def engines(e: Experiment) -> None:
    """The whole chain's last stage: engines of what it delivers, verified, each timed in turn with
    the ONNX file in the same runtime."""
    run = CHAINS[WHOLE](e).run
    for name in ENDS:

        def work(name: str = name) -> dict[str, Any]:
            return e.engine(run, name)

        try:
            row = e.row(work, e.there, engine=name)
        except NasctlError as error:
            print(f"engine {name}: none: {error}", flush=True)
            continue
        doubt = f", in doubt: {row['noisy']}" if row["noisy"] else ""
        print(
            f"engine {name}: {row['ms']:.4g} ms, {row['ratio']:.3f} of the ONNX file's there, "
            f"{row['bytes'] / 1e3:.4g} kB, {row['observed']}{ended(row)}{doubt}"
        )


def session(e: Experiment, rows: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Timings of the chains' files, in turn with each other; repeated, by the next call too, while
    any is in doubt. Nothing where they are not for this machine."""
    if not e.measured or not rows:
        return {}

    def work() -> dict[str, Any]:
        for _ in range(ATTEMPTS):
            timings = file_timings([e.folder / row["file"] for row in rows.values()], e.seed)
            if not any(each.noisy for each in timings):
                break
        return {"took": {name: asdict(each) for name, each in zip(rows, timings, strict=True)}}

    def sure(row: dict[str, Any]) -> bool:
        return not any(each["noisy"] for each in row["took"].values())

    files = {name: row["sha256"] for name, row in rows.items()}
    took: dict[str, dict[str, Any]] = e.row(work, sure, session=files)["took"]
    return took


def line(seed: Seed, name: str) -> list[object]:
    row, timing = seed.rows[name], seed.took.get(name)
    scores = [
        " ".join(f"{goal} {100 * value:.1f}" for goal, value in row[split].items())
        for split in ("test", "val")
    ]
    speed = [f"{timing['median_ms']:.4f}", f"{timing['p95_ms']:.4f}"] if timing else ["-", "-"]
    doubt = timing["noisy"] if timing else ""
    told = [Path(row["file"]).name, row["bytes"] / 1e3]
    return [name, seed.seed, *told, *speed, *scores, ended(row).strip(", "), doubt]


def ended(row: dict[str, Any]) -> str:
    """Verbs whose budget or bound was missed, or that a busy machine kept from deciding."""
    return "".join(f", {verb} {code}" for verb, code in row["codes"].items() if code)


def compared(
    outcome: contract.Outcome, goals: Sequence[Goal], seeds: Sequence[Seed], rival: str
) -> None:
    """What the whole chain's metrics are relative to a rival's, over all seeds that have both and,
    in pairs, over resampled test images."""
    both = [seed for seed in seeds if {WHOLE, rival} <= seed.took.keys()]
    if not both:
        return
    ratios = [seed.took[WHOLE]["median_ms"] / seed.took[rival]["median_ms"] for seed in both]
    doubt = any(seed.took[name]["noisy"] for seed in both for name in (WHOLE, rival))
    least, most = EQUAL
    told = "equal"
    if max(ratios) > most:
        told = "the rival had less time"
    elif min(ratios) < least:
        told = "the rival had more time"
    for goal in goals:
        before, after = (
            [torch.tensor(seed.rows[name]["evidence"][goal.name]) for seed in both]
            for name in (rival, WHOLE)
        )
        got = paired.change(goal, before, after, rng=np.random.default_rng(0))
        print(
            f"whole against {rival}, {goal.name}: {100 * got.value:+.1f} % ({100 * got.low:+.1f} "
            f"to {100 * got.high:+.1f}, over test images), at {min(ratios):.3f} to "
            f"{max(ratios):.3f} of its time: {told}{', in doubt' if doubt else ''}"
        )
        outcome.figures[f"{goal.name}: whole against {rival}"] = got.value
        outcome.figures[f"{goal.name}: whole against {rival}, low"] = got.low
        if doubt:
            continue
        of = f"{len(both)} training{'s' if len(both) > 1 else ''}"
        aim = f"interval over test images of {of} above 0, no more ms"
        met = max(ratios) <= most and got.low > 0
        outcome.aim(f"{goal.name}_against_{rival.replace(' ', '_')}", aim, got.low, met)


if __name__ == "__main__":
    sys.exit(main())
