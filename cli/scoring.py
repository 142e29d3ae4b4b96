"""What `nasctl proxies` does: which networks, their scores, and what each proxy is worth."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Generator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from cli import console
from nas.correlation import NOTHING, Interval, gain, interval
from nas.errors import UsageError
from nas.proxies import BASELINES

if TYPE_CHECKING:
    from nas.scores import Job, Row
    from nas.space import Genes

NEARLY = 0.9  # rank correlation with a count, at the least, of a proxy that adds nothing to it
TRIED = 2  # networks that a --dry-run times


@dataclass(frozen=True)
class Plan:
    """What is scored, and what is known of it."""

    job: Job
    genes: Genes  # [N, G]
    truth: NDArray[np.float64] | None  # [N], higher is better
    truth_is: str  # for people
    path: Path


@dataclass(frozen=True)
class Asked:
    """The options that both kinds of plan read."""

    names: tuple[str, ...]
    networks: int
    batch: int
    seed: int


def of_space(of: Asked, given: Mapping[str, Any], truth: str | None) -> Plan:
    """Networks drawn from a space, or from those that a file of accuracies has."""
    from nas import run as runs
    from nas import space as spaces

    spec = runs.make_spec({"epochs": 1, "threads": 1, **runs.given_fields(given, None)})
    if "." not in spec.space and spec.space not in spaces.names():
        spaces.load(spec.space)  # raises, before torch is imported
    from cli.training import space_for
    from nas import tasks
    from nas.scores import Job, batch_of

    task = tasks.load(spec.data, size=spec.size)
    found = space_for(spec, task)
    job = Job(found, batch_of(task, of.batch, of.seed), of.names)
    inputs = [spec.digest("space", "data", "width", "size"), of.batch, of.seed]
    name = f"proxies-{spec.space}-{Path(spec.data).stem}-{runs.digest(inputs)[:8]}"
    path = Path("runs") / name.replace(":", "-") / "scores.jsonl"
    rng = np.random.default_rng((of.seed, 20))
    if truth is None:
        pool = found.sample(rng, 4 * of.networks)  # in a small space some come twice
        _, first = np.unique(pool, axis=0, return_index=True)
        return Plan(job, pool[np.sort(first)[: of.networks]], None, "", path)
    from cli import truth as truths

    genes, values = truths.read(truth, found)
    chosen = np.sort(rng.permutation(len(genes))[: of.networks])
    return Plan(job, genes[chosen], values[chosen], truth, path)


def of_run(of: Asked, folder: Path) -> Plan:
    """Networks that a search evaluated, in the order in which it did: the first are random ones."""
    from cli import training
    from nas import study
    from nas.scores import Job, batch_of

    opened = training.opened(folder)
    spec = opened.spec
    candidates = study.finished(opened.run.path("study.journal"), spec.storage, spec.study_name)
    candidates = candidates[: of.networks]
    job = Job(opened.space, batch_of(opened.task, of.batch, of.seed), of.names)
    truth = np.array([-c.cross_entropy for c in candidates])
    genes = np.array([c.genes for c in candidates], np.int64)
    path = opened.run.path(f"scores-{of.batch}-{of.seed}.jsonl")
    return Plan(job, genes, truth, "validation loss in the search's supernet", path)


@dataclass(frozen=True)
class Where:
    """Processes, and torch's devices that they share."""

    workers: int
    devices: tuple[str, ...]


def where(workers: int, devices: str) -> Where:
    """At least one process per device; raises UsageError for a device that is not here."""
    import torch

    names = tuple(name.strip() for name in devices.split(","))
    for name in names:
        try:
            torch.empty(1, device=name)
        except (RuntimeError, AssertionError, NotImplementedError) as error:
            first = str(error).splitlines()[0]
            raise UsageError(f"no device '{name}' ({first})", where="--devices") from error
    return Where(max(workers, len(names)), names)


def scored(plan: Plan, on: Where) -> list[Row]:
    """Under a progress bar; what is finished stays finished when it is interrupted."""
    from nas import run as runs
    from nas import scores

    work = scores.scored(
        plan.job, plan.genes, path=plan.path, workers=on.workers, devices=on.devices
    )
    with runs.Run(plan.path.parent).locked():
        return watched(work, len(plan.genes))


def watched(work: Generator[Row, None, None], total: int) -> list[Row]:
    """All rows, under a bar; Ctrl-C closes the work between two of them."""
    rows: list[Row] = []
    missing = 0
    with (
        console.bar("scoring networks", total) as update,
        console.deferred_interrupt() as interrupted,
    ):
        for row in work:
            rows.append(row)
            missing += sum(bool(score.reason) for score in row.scores.values())
            update(len(rows), f"{missing} values missing" if missing else "")
            if interrupted() and len(rows) < total:
                work.close()
                raise KeyboardInterrupt
    return rows


def estimate(plan: Plan, on: Where) -> dict[str, Any]:
    """What `scored` would do and for how long, from the first networks; keeps nothing."""
    from nas import scores

    began = time.monotonic()
    tried = plan.genes[:TRIED]
    for _ in scores.scored(plan.job, tried, devices=on.devices):
        pass
    each = (time.monotonic() - began) / len(tried)
    seconds = each * len(plan.genes) / on.workers
    console.say(f"{len(plan.genes)}, {len(plan.job.proxies)} proxies each", "networks")
    console.say(str(plan.path), "file")
    console.say(f"{each:.2f} s per network, {console.format_seconds(seconds)}", "in all")
    return {
        "networks": len(plan.genes),
        "proxies": list(plan.job.proxies),
        "file": str(plan.path),
        "seconds_per_network": round(each, 3),
        "estimated_total_seconds": round(seconds, 1),
    }


# ---- what it is worth ----------------------------------------------------------------------------


def worth(plan: Plan, rows: Sequence[Row]) -> dict[str, Any]:
    """Per proxy its values, its cost, what it correlates with and whether it is kept."""
    from nas import scores

    names = plan.job.proxies
    columns = dict(zip(names, scores.matrix(rows, plan.genes, names).T, strict=True))
    counts = np.array([columns[name] for name in BASELINES])
    found = []
    for name in names:
        values = columns[name]
        each = [row.scores[name] for row in rows]
        known = values[np.isfinite(values)]
        found.append(
            {
                "proxy": name,
                "median": float(np.median(known)) if len(known) else None,
                "range": [float(known.min()), float(known.max())] if len(known) else None,
                "missing": dict(Counter(score.reason for score in each if score.reason)),
                "seconds": round(float(np.median([score.seconds for score in each])), 4),
                **_judged(name, values, counts, plan),
            }
        )
    return {
        "networks": len(rows),
        "batch": len(plan.job.batch.inputs),
        "truth": plan.truth_is or None,
        "file": str(plan.path),
        "kept": [row["proxy"] for row in found if row["kept"]],
        "proxies": found,
    }


def _judged(name: str, values: Any, counts: Any, plan: Plan) -> dict[str, Any]:
    seed = plan.job.batch.seed
    with_counts = [interval(values, count, seed) for count in counts]
    of_truth = more = NOTHING
    if plan.truth is not None:
        of_truth, more = (
            interval(values, plan.truth, seed),
            gain(values, counts, plan.truth, seed),
        )
    if name in BASELINES:
        verdict, kept = "a count", True
    elif plan.truth is not None:
        verdict, kept = _by_truth(more)
    else:
        verdict, kept = _by_counts(with_counts)
    return {
        **{f"with_{n}": _plain(i) for n, i in zip(BASELINES, with_counts, strict=True)},
        "with_truth": _plain(of_truth),
        "gain": _plain(more),
        "verdict": verdict,
        "kept": kept,
    }


def _by_truth(more: Interval) -> tuple[str, bool]:
    if np.isnan(more.value):
        return "too few networks to tell", False
    if more.low > 0:
        return "better than counting", True
    return "worse than counting" if more.high < 0 else "no better than counting", False


def _by_counts(with_counts: Sequence[Interval]) -> tuple[str, bool]:
    if all(np.isnan(each.value) for each in with_counts):
        return "too few networks to tell", False
    if any(max(each.low, -each.high) > NEARLY for each in with_counts):
        return "a count in disguise", False
    return "not judged: no truth", True


def _plain(found: Interval) -> dict[str, float] | None:
    """For JSON, which has no NaN."""
    if np.isnan(found.value):
        return None
    return {name: round(value, 4) for name, value in asdict(found).items()}
