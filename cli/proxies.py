"""`nasctl proxies`: what training-free proxies say of a space's networks, at what cost, and whether
they know more than counting multiplications and parameters does."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import numpy as np
import typer

from cli import console, options
from nas.errors import UsageError

if TYPE_CHECKING:
    from nas.correlation import Interval
    from nas.scores import Job, Row
    from nas.space import Genes

NEARLY = 0.9  # rank correlation with a count, at the least, of a proxy that adds nothing to it
TRIED = 2  # networks that a --dry-run times


@dataclass(frozen=True)
class Plan:
    """What is scored, and what is known of it."""

    job: Job
    genes: Genes  # [N, G]
    truth: np.ndarray[Any, np.dtype[np.float64]] | None  # [N], higher is better
    truth_is: str  # for people
    path: Path


def command(
    space: options.Space = None,
    data: options.Data = None,
    width: options.Width = None,
    size: options.Size = None,
    networks: Annotated[
        int, typer.Option(min=1, help="How many, drawn from the space or from --truth.")
    ] = 50,
    proxies: Annotated[
        str | None, typer.Option(help="Comma-separated names, or my_pkg.my_mod. [all]")
    ] = None,
    truth: Annotated[
        str | None,
        typer.Option(help="CSV or parquet of accuracies, FILE or FILE:COLUMN: judge by them."),
    ] = None,
    run: Annotated[
        Path | None, typer.Option(help="A search: judge by the networks that it evaluated.")
    ] = None,
    batch: Annotated[int, typer.Option(min=1, help="Training images that proxies see.")] = 32,
    seed: Annotated[int, typer.Option(min=0, help="Of everything random.")] = 0,
    workers: Annotated[int, typer.Option(min=1, help="Processes of one thread each.")] = 1,
    devices: Annotated[str, typer.Option(help="torch's names, shared by the workers.")] = "cpu",
    dry_run: options.DryRun = False,
    json: options.Json = False,
) -> None:
    """Score networks by training-free proxies; say what each costs and what it is worth.

    A proxy that ranks no better than MACs and parameters is shown as such and dropped. Without
    --truth or --run there is nothing to be right about: then those are dropped that are a count
    in disguise. The same command goes on where it was interrupted.
    """
    from nas import proxies as shipped

    names = [name.strip() for name in proxies.split(",")] if proxies else list(shipped.names())
    shipped.check(names)
    names = list(dict.fromkeys([*shipped.BASELINES, *names]))
    if run is not None and any(each is not None for each in (space, data, width, size, truth)):
        what = "a run knows its space, its data and its truth"
        raise UsageError(what, where="--run", next="Leave the others out.")
    of = _Asked(tuple(names), networks, batch, seed)
    plan = _of_run(of, run) if run else _of_space(of, (space, data, width, size), truth)
    chosen = _devices(devices)
    if dry_run:
        outcome = _estimate(plan, workers, chosen)
    else:
        outcome = _outcome(plan, _scored(plan, workers, chosen))
    if json:
        console.emit_json(outcome)
    elif not dry_run:
        _show(outcome)


@dataclass(frozen=True)
class _Asked:
    names: tuple[str, ...]
    networks: int
    batch: int
    seed: int


def _of_space(of: _Asked, given: tuple[Any, ...], truth: str | None) -> Plan:
    from nas import run as runs
    from nas import space as spaces

    fields = dict(zip(("space", "data", "width", "size"), given, strict=True))
    spec = runs.make_spec({"epochs": 1, "threads": 1, **runs.given_fields(fields, None)})
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


def _of_run(of: _Asked, folder: Path) -> Plan:
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


def _devices(text: str) -> list[str]:
    import torch

    found = [name.strip() for name in text.split(",")]
    for name in found:
        try:
            torch.empty(1, device=name)
        except (RuntimeError, AssertionError, NotImplementedError) as error:
            first = str(error).splitlines()[0]
            raise UsageError(f"no device '{name}' ({first})", where="--devices") from error
    return found


def _scored(plan: Plan, workers: int, devices: Sequence[str]) -> list[Row]:
    from nas import scores

    rows: list[Row] = []
    work = scores.scored(plan.job, plan.genes, path=plan.path, workers=workers, devices=devices)
    with (
        console.bar("scoring networks", len(plan.genes)) as update,
        console.deferred_interrupt() as interrupted,
    ):
        for row in work:
            rows.append(row)
            missing = sum(bool(score.reason) for row in rows for score in row.scores.values())
            update(len(rows), f"{missing} values missing" if missing else "")
            if interrupted() and len(rows) < len(plan.genes):
                work.close()
                raise KeyboardInterrupt
    return rows


def _estimate(plan: Plan, workers: int, devices: Sequence[str]) -> dict[str, Any]:
    from nas import scores

    began = time.monotonic()
    tried = plan.genes[:TRIED]
    for _ in scores.scored(plan.job, tried, devices=devices):
        pass
    each = (time.monotonic() - began) / max(1, len(tried))
    seconds = each * len(plan.genes) / workers
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


def _outcome(plan: Plan, rows: Sequence[Row]) -> dict[str, Any]:
    from nas import scores
    from nas.proxies import BASELINES

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
    from nas.correlation import NOTHING, gain, interval
    from nas.proxies import BASELINES

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


def _show(outcome: dict[str, Any]) -> None:
    from rich.table import Table

    judged = outcome["truth"] is not None
    table = Table(box=None, pad_edge=False)
    for title in ("proxy", "s/network", "MACs", "params", *(("truth", "gain") if judged else ())):
        table.add_column(title, no_wrap=True)
    for row in outcome["proxies"]:
        counts = [_interval(row[f"with_{name}"], ends=not judged) for name in ("macs", "params")]
        truths = [_interval(row[key], ends=True) for key in ("with_truth", "gain") if judged]
        table.add_row(row["proxy"], f"{row['seconds']:.3f}", *counts, *truths)
    console.show(table)
    said = "rank correlation with MACs, parameters"
    said += ", the truth; its gain over the better of the two" if judged else ""
    console.say(f"{said} (95 % intervals)", "columns")
    for row in outcome["proxies"]:
        for reason, times in row["missing"].items():
            console.say(f"{row['proxy']}, {times} networks: {reason}", "missing")
    truth = outcome["truth"] or "none given (--truth, --run)"
    console.say(f"{outcome['networks']}, {outcome['batch']} images; truth: {truth}", "networks")
    for verdict in dict.fromkeys(row["verdict"] for row in outcome["proxies"]):
        of = [row for row in outcome["proxies"] if row["verdict"] == verdict]
        label = "kept" if of[0]["kept"] else "dropped"
        console.say(f"{verdict}: {', '.join(row['proxy'] for row in of)}", label)
    console.say(outcome["file"], "file")


def _interval(found: dict[str, float] | None, *, ends: bool) -> str:
    if found is None:
        return ""
    value, low, high = (f"{found[key]:.2f}" for key in ("value", "low", "high"))
    return f"{value} ({low} {high})" if ends else value
