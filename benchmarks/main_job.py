"""What `nasctl search` delivers against uniformly scaled networks of the same measured latency.

The control that could embarrass the tool: a ResNet (the search space's own blocks at one width
multiplier) and a MobileNet, scaled to the measured latency of the network that the search chose,
each trained alone for the search's *whole* wall-clock, with the same recipe and augmentation. All
are judged once on test. Also recorded: the same search's network as extracted, without fine-tuning.
"""

from __future__ import annotations

import itertools
import json
import math
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy import stats

from benchmarks import contract
from hw_profiles import measure
from hw_profiles.op import Op, macs
from nas import space, supernet, tasks
from nas.elastic import Network, channels_last, round_to
from nas.errors import BudgetMissed
from nas.search_spaces import mobilenet, resnet
from nas.space import SearchSpace
from nas.supernet import Recipe
from nas.tasks import Task

MULTIPLIERS = tuple(np.geomspace(0.2, 3.0, 60))
TOLERANCE = 1.02  # a baseline may be this much slower than the network it is held against


@dataclass(frozen=True)
class Setting:
    data: str
    size: int | None
    latency: str
    flags: tuple[str, ...]
    seeds: int
    hw: str = "cpu"
    most_s: float = math.inf  # of training a rival


def main(argv: list[str] | None = None) -> int:
    parser = contract.parser(__doc__)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--size", type=int, default=16, help="pixels, so that minutes suffice")
    parser.add_argument("--latency", default="150us")
    parser.add_argument("--flags", default="", help="more flags of nasctl search, in quotes")
    parser.add_argument("--threads", type=int, default=1, help="of training, for both sides")
    parser.add_argument("--report", action="store_true", help="only the rows on disk")
    parser.add_argument("--alone", action="store_true", help="also the choice trained alone")
    arguments = parser.parse_args(argv)
    outcome = contract.Outcome("main_job")
    torch.set_num_threads(1 if arguments.quick else arguments.threads)
    folder = contract.data("cifar10")
    if arguments.quick:
        # nothing is timed but the rivals: a search for this machine measures for minutes
        words = "--epochs 1 --finetune 1 --evaluations 3 --threads 1 --strategy random --alone"
        quick = tuple(words.split())
        setting = Setting("digits", None, "7ms", quick, seeds=1, hw="jetson-tx2", most_s=3.0)
    elif folder is None:
        return outcome.skip("NASCTL_DATA/cifar10 is absent")
    else:
        full = (*arguments.flags.split(), "--threads", str(arguments.threads))
        size = arguments.size
        setting = Setting(str(folder), size, arguments.latency, full, arguments.seeds)
    rows = finished_rows(
        setting, quick=arguments.quick, alone=arguments.alone, report_only=arguments.report
    )
    report(rows, outcome)
    return outcome.finish(arguments.save)


def finished_rows(
    setting: Setting, *, quick: bool, alone: bool, report_only: bool
) -> list[dict[str, Any]]:
    """One row per (seed, network); those on disk are not repeated."""
    data = Path(setting.data).name
    where = Path(tempfile.mkdtemp()) if quick else contract.RESULTS
    kept = contract.Rows(where / "main_job.rows.jsonl")
    task = tasks.load(setting.data, size=setting.size)
    same: dict[str, Any] = {"data": data, "size": setting.size, "latency": setting.latency}
    seeds = range(0 if report_only else setting.seeds)
    keys = [{**same, "flags": list(setting.flags), "seed": seed} for seed in seeds]
    names = ("uniform_resnets", "uniform_mobilenets", *(("chosen_alone",) if alone else ()))
    if quick:
        names = names[:1]  # a minute is enough for one comparison
    for name, key in itertools.product(names, keys):  # a stop leaves whole comparisons
        found = kept.get({**key, "network": "search"})
        if found is None:
            found = run_search(setting, key["seed"])
            kept.add({**key, "network": "search"}, found)
        if kept.get({**key, "network": name}) is None:
            members = family(name, task, found)
            members = members[::16] if quick else members
            seconds = min(found["seconds"], setting.most_s)
            row = run_baseline(members, task, found, key["seed"], seconds)
            kept.add({**key, "network": name}, row)
    return [
        {**json.loads(key), **row}
        for key, row in kept.done.items()
        if {**json.loads(key), **same, "flags": list(setting.flags)} == json.loads(key)
    ]


def run_search(setting: Setting, seed: int) -> dict[str, Any]:
    """The command as a user types it, timed from outside."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "cli.main", "search", "--data", setting.data]
        command += ["--hw", setting.hw, "--latency", setting.latency, *setting.flags]
        command += ["--size", str(setting.size)] if setting.size else []
        command += ["--seed", str(seed), "--run", folder, "--json"]
        began = time.monotonic()
        done = subprocess.run(command, capture_output=True, text=True)
        seconds = time.monotonic() - began
        report_file = Path(folder) / "report.json"
        if done.returncode not in (0, BudgetMissed.exit_code) or not report_file.exists():
            raise RuntimeError(done.stderr)
        content = json.loads(report_file.read_text())  # a miss is a result: it is not retried
    chosen = content["chosen"]
    latency = chosen["latency"]
    shown = latency["measured"] or {"median_ms": latency["predicted"]["value_ms"]}
    return {
        "test_accuracy": chosen["test_accuracy"],
        "extracted_val_accuracy": chosen["extracted_val_accuracy"],
        "val_accuracy": chosen["val_accuracy"],
        "latency_ms": shown["median_ms"],
        "macs": chosen["macs"],
        "seconds": seconds,
        "budget_met": done.returncode == 0,
        "arch": chosen["arch"],
        "stages": {stage["name"]: stage["seconds"] for stage in content["stages"]},
    }


def family(name: str, task: Task, searched: dict[str, Any]) -> list[tuple[SearchSpace, Any]]:
    """Networks to match. `chosen_alone` separates the choice from the way of training."""
    if name == "uniform_resnets":
        return uniform_resnets(task)
    if name == "uniform_mobilenets":
        return uniform_mobilenets(task)
    own = space.load("resnet", channels=task.channels, classes=task.n_classes, size=task.size)
    return [(own, space.arch_from_dict(own.arch_type, searched["arch"]))]


def uniform_resnets(task: Task) -> list[tuple[SearchSpace, Any]]:
    """The resnet space's own blocks at one depth and every width multiplier."""
    found = resnet.Space(channels=task.channels, classes=task.n_classes, size=task.size)
    largest = found.decode(found.largest)
    archs: dict[Any, None] = {}
    for m, depth in itertools.product(MULTIPLIERS, resnet.DEPTHS):
        widths = tuple(round_to(w * m) for w in largest.widths)
        mids = tuple((w,) * depth for w in widths)
        archs[resnet.Arch(found.resolution, round_to(largest.stem * m), widths, mids)] = None
    return [(found, arch) for arch in archs]


def uniform_mobilenets(task: Task) -> list[tuple[SearchSpace, Any]]:
    """The mobilenet space's shallowest full-resolution network at every width multiplier."""
    made = {}
    for m in MULTIPLIERS:
        found = mobilenet.Space(
            channels=task.channels, classes=task.n_classes, size=task.size, width=0.25 * float(m)
        )
        genes = found.smallest
        genes[found.index["resolution"]] = found.largest[found.index["resolution"]]
        arch = found.decode(genes)
        made[arch] = (found, arch)
    return list(made.values())


def run_baseline(
    members: list[tuple[SearchSpace, Any]],
    task: Task,
    searched: dict[str, Any],
    seed: int,
    seconds: float,
) -> dict[str, Any]:
    """The largest member that is no slower, trained alone for so long."""
    match = matched(members, task, searched)
    if match is None:
        return {"missing": "no member is as fast"}
    found, arch, latency_ms = match
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        net = channels_last(found.build(arch))
    began = time.monotonic()
    steps = train_for(net, task, seconds, seed)
    seconds = time.monotonic() - began
    calibration = supernet.calibration_images(task)
    supernet.calibrate(net, calibration, arch.resolution)
    test = supernet.evaluate(net, task, task.test, arch.resolution)
    val = supernet.evaluate(net, task, task.val, arch.resolution)
    return {
        "test_accuracy": test.accuracy,
        "val_accuracy": val.accuracy,
        "latency_ms": latency_ms,
        "macs": macs(found.ops(arch)),
        "seconds": seconds,
        "steps": steps,
        "arch": asdict(arch),
    }


def matched(
    members: list[tuple[SearchSpace, Any]], task: Task, searched: dict[str, Any]
) -> tuple[SearchSpace, Any, float] | None:
    """Family and chosen network timed in one session, so that the machine's mood cancels."""
    own = space.load("resnet", channels=task.channels, classes=task.n_classes, size=task.size)
    chosen = own.ops(space.arch_from_dict(own.arch_type, searched["arch"]))
    networks: list[list[Op]] = [chosen, *(found.ops(arch) for found, arch in members)]
    # one process: between two, the same network differs by some per cent, and the most favoured
    # of a family would be picked for its luck
    plan = measure.Plan(time_limit_s=0.5 * len(networks))
    timings = measure.fresh_session(networks, rng=np.random.default_rng(0), plan=plan).timings
    limit = timings[0].median_ms * TOLERANCE
    fits = [at for at in range(len(members)) if timings[at + 1].median_ms <= limit]
    if not fits:
        return None
    # the most work in that time, not the slowest: deep narrow members are slow and no better
    at = max(fits, key=lambda at: macs(networks[at + 1]))
    # on the chosen file's own scale, so that the rows can be read side by side
    scale = searched["latency_ms"] / timings[0].median_ms
    return *members[at], timings[at + 1].median_ms * scale


def train_for(net: Network, task: Task, seconds: float, seed: int) -> int:
    """Train alone for about `seconds`: the number of steps is set from the pace of the first 20."""
    probe = supernet.train(net, supernet.alone(net), task, Recipe(steps=10**6, seed=seed))
    state = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    for _ in range(5):
        next(probe)
    began = time.monotonic()
    for _ in range(15):
        next(probe)
    pace = (time.monotonic() - began) / 15
    net.load_state_dict(state)
    steps = max(20, round(seconds / pace))
    for _ in supernet.train(net, supernet.alone(net), task, Recipe(steps=steps, seed=seed)):
        pass
    return steps


def report(rows: list[dict[str, Any]], outcome: contract.Outcome) -> None:
    header = ["seed", "network", "test", "latency ms", "MMACs", "seconds"]
    columns = ("test_accuracy", "latency_ms", "macs", "seconds")
    shown = [
        [row["seed"], row["network"], *(row.get(column, "none") for column in columns)]
        for row in rows
    ]
    print(contract.table(header, shown))
    by = {(row["seed"], row["network"]): row["test_accuracy"] for row in rows if "macs" in row}
    for name in sorted({name for _, name in by}):
        mine = np.array([value for (_, other), value in by.items() if other == name])
        outcome.figures |= {f"{name}_test_accuracy": mine.mean(), f"{name}_worst": mine.min()}
    gaps = {}
    for scaled in ("uniform_resnets", "uniform_mobilenets", "chosen_alone"):
        seeds = [seed for seed, name in by if name == scaled]
        gaps[scaled] = np.array([by[seed, "search"] - by[seed, scaled] for seed in seeds])
        describe(scaled, gaps[scaled], outcome)
    for scaled in ("uniform_resnets", "uniform_mobilenets"):
        low = outcome.figures.get(f"gap_{scaled}_low")
        if low is not None:
            outcome.aim(f"gap_{scaled}", "lower end of the 95 % interval > 0", low, low > 0)


def describe(name: str, gaps: np.ndarray, outcome: contract.Outcome) -> None:
    """Mean of search minus baseline and, from two seeds on, its 95 % t interval."""
    if len(gaps) == 0:
        return
    outcome.figures[f"gap_{name}"] = float(gaps.mean())
    if len(gaps) == 1:
        print(f"search minus {name}: {gaps.mean():+.4f}, one seed: no interval")
        return
    half = stats.t.ppf(0.975, len(gaps) - 1) * gaps.std(ddof=1) / np.sqrt(len(gaps))
    outcome.figures[f"gap_{name}_low"] = float(gaps.mean() - half)
    outcome.figures[f"gap_{name}_high"] = float(gaps.mean() + half)
    print(f"search minus {name}: {gaps.mean():+.4f} +- {half:.4f} (95 %, t, {len(gaps)} seeds)")


if __name__ == "__main__":
    sys.exit(main())
