"""This machine's own latencies: a table's predictions against whole networks measured elsewhen.

`part` is the share of benchmarks/latency.py that measures. Truth is the median of several sessions,
each in a fresh process after the one that the table was made in, of networks that the table never
saw. Beside every table stands what one session says of the others (nothing can be closer), a fit on
MACs, and the sum of the network's blocks timed one by one.

A finished session is a row on disk; a run that was stopped goes on with the next.
"""

from __future__ import annotations

import itertools
import json
import math
import multiprocessing
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from tempfile import mkdtemp

import numpy as np
import pyarrow.parquet as parquet
from scipy.stats import kendalltau

from benchmarks import contract, networks, user_models
from hw_profiles import chains, device, measure, op, profile
from hw_profiles.latency import Array, LatencyTable
from hw_profiles.models import calibrate
from hw_profiles.op import Op
from nas import space

PREFIX = "local."
PIXELS = 32
OFA = "ofa"  # Once-for-All at 224 px: real ImageNet accuracies (DyNAS-T's logs)
BAND = 0.10  # networks of about the same MACs, relative
BUDGETS = (0.2, 0.35, 0.5, 0.65, 0.8)  # quantiles of the true latencies
Ops = list[Op]
Timed = dict[str, tuple[float, bool]]  # network -> (ms, in doubt)


@dataclass(frozen=True)
class Size:
    fitted: int  # networks of each space that its table is fitted on
    chains: int
    held_out: int  # of each space
    ofa: tuple[int, int]  # fitted, held out
    sessions: int
    limit_s: float  # per network and session
    users: int | None  # of the users' models; None: all
    spaces: tuple[str, ...]


#: of sizes, not of operators
SPACES = ("mobilenet", "resnet")
FULL = Size(240, 300, 60, (40, 30), 3, 1.8, None, SPACES)
QUICK = Size(16, 0, 6, (0, 0), 2, 0.05, 2, SPACES[1:])


@dataclass(frozen=True)
class Set:
    """Networks of one kind."""

    fitted: list[Ops]
    held_out: list[Ops]
    top1: Array | None = None  # of the held-out ones, %


def sets(size: Size) -> dict[str, Set]:
    """The same for every process: drawn from fixed seeds."""
    found = {}
    for name in size.spaces:
        known = space.load(name, channels=3, classes=10, size=PIXELS)
        rows = known.sample(np.random.default_rng(1), size.fitted + size.held_out)
        drawn = [known.ops(known.decode(row)) for row in np.unique(rows, axis=0)]
        drawn = [drawn[at] for at in np.random.default_rng(1).permutation(len(drawn))]
        found[name] = Set(drawn[size.held_out :], drawn[: size.held_out])
    found[profile.CHAINS] = Set(chains.sample(np.random.default_rng(2), size.chains), [])
    found["users"] = Set([], list(user_models.all_models().values())[: size.users])
    folder = contract.data("ofa_acc_dynast")
    if folder is not None and size.ofa[1]:
        found[OFA] = ofa(folder, *size.ofa)
    return found


def ofa(folder: Path, fitted: int, held_out: int) -> Set:
    rows = parquet.read_table(next(folder.glob("*.parquet"))).to_pylist()
    distinct = list({(row["ks"], row["e"], row["d"]): row for row in rows}.values())
    chosen = np.random.default_rng(3).permutation(len(distinct))[: fitted + held_out]
    drawn, top1 = [], []
    for at in chosen:
        row = distinct[at]
        kernels, expansions, depths = (json.loads(row[name]) for name in ("ks", "e", "d"))
        drawn.append(networks.ofa_ops(kernels, expansions, depths, row["r"], 1.0))
        top1.append(row["top1"])
    return Set(drawn[held_out:], drawn[:held_out], np.array(top1[:held_out]))


def blocks(ops: Ops) -> list[Ops]:
    """The slots of a space's network as networks of their own: what a block read from outside is
    its input."""
    found = []
    for _, group in itertools.groupby(enumerate(ops), key=lambda pair: pair[1].slot):
        place: dict[int, int] = {}
        own: Ops = []
        for at, one in group:
            reads = tuple(place.get(read, op.INPUT) for read in one.reads)
            place[at] = len(own)
            own.append(Op(**op.to_row(one), reads=reads))
        found.append(own)
    return found


# ---- measuring -----------------------------------------------------------------------------------


def networks_of(found: dict[str, Set], number: int, size: Size) -> dict[str, Ops]:
    """What a session measures, by digest: 0 makes the tables, the others are the truth."""
    if number == 0:
        wanted = [ops for known in found.values() for ops in known.fitted]
        wanted += [
            part for name in size.spaces for ops in found[name].held_out for part in blocks(ops)
        ]
    else:
        wanted = [ops for known in found.values() for ops in known.held_out]
    return {profile.digest(ops): ops for ops in wanted}


def session(
    size: Size, number: int, names: Sequence[str], pace_ms: float
) -> tuple[list[tuple[str, float, bool]], float]:
    """(name of the network, ms, in doubt) of those named, and the machine's pace, of which
    `pace_ms` is what earlier sessions saw. Runs in a process of its own."""
    known = networks_of(sets(size), number, size)
    wanted = [known[name] for name in names]
    plan = measure.Plan(rounds=12, time_limit_s=size.limit_s * len(wanted))
    pace = measure.Pace(pace_ms)
    timings = measure.measure_ops(wanted, rng=np.random.default_rng(number), plan=plan, pace=pace)
    told = [
        (profile.digest(ops), timing.median_ms, bool(timing.noisy))
        for ops, timing in zip(wanted, timings, strict=True)
    ]
    return told, pace.ms


def sessions(size: Size, rows: contract.Rows) -> list[Timed]:
    """Every session by network; what is on disk is not repeated."""
    done: list[Timed] = []
    found = sets(size)
    # what any session saw holds for all: none may pass off a slow machine as a quiet one
    pace_ms = min((row.get("pace_ms", math.inf) for row in rows.done.values()), default=math.inf)
    for number in range(1 + size.sessions):
        timed: Timed = {}
        part = 0
        while (row := rows.get({"session": number, "part": part})) is not None:
            timed |= {name: (ms, doubt) for name, ms, doubt in row["timings"]}
            pace_ms = min(pace_ms, row.get("pace_ms", math.inf))
            part += 1
        if missing := [name for name in networks_of(found, number, size) if name not in timed]:
            spawn = multiprocessing.get_context("spawn")
            with ProcessPoolExecutor(1, mp_context=spawn) as pool:
                result, pace_ms = pool.submit(session, size, number, missing, pace_ms).result()
            key = {"session": number, "part": part}
            value = {"timings": result, "pace_ms": pace_ms, "machine": contract.machine()}
            rows.add(key, value)
            timed |= {name: (ms, doubt) for name, ms, doubt in result}
        done.append(timed)
    return done


# ---- judging -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Evidence:
    """What was measured, and the tables fitted on it."""

    made: Timed
    truths: Sequence[Timed]
    samples: dict[str, list[tuple[Ops, float]]]
    tables: dict[str, LatencyTable]


def part(outcome: contract.Outcome, quick: bool) -> None:
    """Prints the tables and fills `local.*` of the outcome."""
    size = QUICK if quick else FULL
    folder = Path(mkdtemp()) if quick else contract.RESULTS
    made, *truths = sessions(size, contract.Rows(folder / "latency_local.rows.jsonl"))
    wanted = networks_of(sets(size), 0, size)
    doubt = [made[name][1] for name in wanted]
    outcome.figures[PREFIX + "in_doubt"] = float(np.mean(doubt))
    print(f"\nthis machine: {np.mean(doubt):.0%} of {len(doubt)} timings of the table in doubt")
    found = sets(size)
    samples = {name: clean(known.fitted, made) for name, known in found.items()}
    evidence = Evidence(made, truths, samples, fitted(samples))
    rows: list[list[object]] = []
    for name, known in found.items():
        if known.held_out:
            rows += judged(name, known, evidence, outcome)
    print(contract.table(HEADER, rows))
    for name in size.spaces:
        if name in evidence.tables:
            million(name, evidence.tables[name], outcome)
    if not quick:
        aims(outcome)


def million(name: str, table: LatencyTable, outcome: contract.Outcome) -> None:
    """Seconds that the search's inner loop takes for the latencies of 10^6 candidates."""
    known = space.load(name, channels=3, classes=10, size=PIXELS)
    began = time.perf_counter()
    columns = known.fold(table.columns)
    compiled = time.perf_counter() - began
    rows = known.sample(np.random.default_rng(4), 10**6)
    began = time.perf_counter()
    for part_ in np.array_split(rows, 20):
        table.combine(columns(part_), name)
    seconds = time.perf_counter() - began
    print(f"{name}: 10^6 latencies in {seconds:.2f} s, after {compiled:.2f} s once")
    outcome.figures[f"{PREFIX}{name}.million_s"] = seconds
    outcome.figures[f"{PREFIX}{name}.compile_s"] = compiled
    outcome.aim(f"{PREFIX}{name}.million", "< 2 s on one core", seconds, seconds < 2)


def fitted(samples: dict[str, list[tuple[Ops, float]]]) -> dict[str, LatencyTable]:
    """A table per set of networks; the random ones are in every table."""
    tables, board = {}, device.load("cpu")
    for name, own in samples.items():
        if len(own) >= calibrate.MIN_NETWORKS:
            others = [] if name == profile.CHAINS else samples[profile.CHAINS]
            tables[name] = calibrate.fit(own, board, space=name, source_text="", chains=others)
    return tables


HEADER = [
    *("networks", "predicted by", "n", "MAPE %"),
    *("in 5 %", "in 10 %", "worst %", "tau", "tau in band"),
]


def clean(wanted: Sequence[Ops], made: Timed) -> list[tuple[Ops, float]]:
    timed = [(ops, *made[profile.digest(ops)]) for ops in wanted]
    return [(ops, ms) for ops, ms, doubt in timed if not doubt]


def judged(
    name: str, known: Set, evidence: Evidence, outcome: contract.Outcome
) -> list[list[object]]:
    """A row per way of predicting the networks that were held out."""
    timed = np.array(
        [[truth[profile.digest(ops)] for truth in evidence.truths] for ops in known.held_out]
    )
    sure = (timed[:, :, 1] == 0).sum(1) >= max(1, len(evidence.truths) - 1)
    kept = [ops for ops, sure_ in zip(known.held_out, sure, strict=True) if sure_]
    # what the protocol itself doubts is no truth
    each = np.where(timed[sure, :, 1] > 0, np.nan, timed[sure, :, 0])
    true = np.nanmedian(each, axis=1)
    macs = np.array([op.macs(ops) for ops in kept], float)
    outcome.figures[f"{PREFIX}{name}.held_out"] = len(kept)
    if len(kept) < 5:
        return []
    scores = {"another session": repeated(each, macs)}
    for way, ms in ways(name, kept, macs, evidence).items():
        scores[way] = score(ms, true, macs)
    for way, values in scores.items():
        for figure, value in zip(FIGURES, values, strict=True):
            outcome.figures[f"{PREFIX}{name}.{way}.{figure}"] = float(value)
    if known.top1 is not None and name in evidence.tables:
        picks(name, known.top1[sure], kept, true, evidence, outcome)
    return [[name, way, len(kept), *values.tolist()] for way, values in scores.items()]


def ways(name: str, kept: Sequence[Ops], macs: Array, evidence: Evidence) -> dict[str, Array]:
    """Milliseconds of the networks kept, by everything that can predict them."""
    found = {}
    for of, table in evidence.tables.items():
        estimates = [table.estimate(ops, name).value_ms for ops in kept]
        found["own table" if of == name else f"table of {of}"] = np.array(estimates)
    own = evidence.samples.get(name, [])
    if len(own) >= calibrate.MIN_NETWORKS:
        found["MACs"] = by_macs(own, macs)
    if name in SPACES:
        found["sum of blocks"] = np.array([by_blocks(ops, evidence.made) for ops in kept])
    return found


def repeated(each: Array, macs: Array) -> Array:
    """What one session says of the median of the others: `each` [networks, sessions], NaN where
    a timing was in doubt."""
    scores = []
    for at in range(each.shape[1]):
        others = np.delete(each, at, 1)
        both = ~np.isnan(each[:, at]) & ~np.isnan(others).all(axis=1)
        if both.sum() >= 5:
            middle = np.nanmedian(others[both], axis=1)
            scores.append(score(each[both, at], middle, macs[both]))
    return np.mean(scores, axis=0) if scores else np.full(len(FIGURES), np.nan)


FIGURES = ("mape", "within_5", "within_10", "worst", "tau", "tau_band")


def score(predicted: Array, true: Array, macs: Array) -> Array:
    off = 100 * np.abs(predicted / true - 1)
    return np.array(
        [
            off.mean(),
            100 * (off <= 5).mean(),
            100 * (off <= 10).mean(),
            off.max(),
            kendalltau(true, predicted).statistic,
            band_tau(predicted, true, macs),
        ]
    )


def band_tau(predicted: Array, true: Array, macs: Array) -> float:
    """Concordant minus discordant pairs over all pairs whose MACs are within BAND of each other."""
    a, b = np.triu_indices(len(true), 1)
    near = np.abs(np.log(macs[a] / macs[b])) <= np.log1p(BAND)
    a, b = a[near], b[near]
    if len(a) == 0:
        return float("nan")
    return float(np.mean(np.sign(true[a] - true[b]) * np.sign(predicted[a] - predicted[b])))


def by_macs(samples: Sequence[tuple[Ops, float]], macs: Array) -> Array:
    """A line through the fitted networks' MACs and milliseconds, least relative error."""
    x = np.array([[1.0, op.macs(ops)] for ops, _ in samples])
    y = np.array([ms for _, ms in samples])
    weights = np.linalg.lstsq(x / y[:, None], np.ones(len(y)), rcond=None)[0]
    return weights[0] + weights[1] * macs


def by_blocks(ops: Ops, made: Timed) -> float:
    return sum(made[profile.digest(block)][0] for block in blocks(ops))


def picks(
    name: str,
    top1: Array,
    kept: Sequence[Ops],
    true: Array,
    evidence: Evidence,
    outcome: contract.Outcome,
) -> None:
    """Accuracy lost, and budgets missed, by choosing with a prediction instead of the truth."""
    estimates = [evidence.tables[name].estimate(ops, name) for ops in kept]
    macs = np.array([op.macs(ops) for ops in kept], float)
    predicted = {
        "table, upper end": np.array([estimate.high_ms for estimate in estimates]),
        "table": np.array([estimate.value_ms for estimate in estimates]),
        "MACs": by_macs(evidence.samples[name], macs),
        "truth": true,
    }
    rows = []
    for way, ms in predicted.items():
        lost, missed = [], []
        for budget in np.quantile(true, BUDGETS):
            best = top1[true <= budget].max()
            fits = np.flatnonzero(ms <= budget)
            chosen = fits[top1[fits].argmax()] if len(fits) else int(true.argmin())
            lost.append(best - top1[chosen] if true[chosen] <= budget else np.nan)
            missed.append(true[chosen] > budget)
        kept_lost = float(np.nanmean(lost)) if not all(missed) else float("nan")
        rows.append([way, kept_lost, 100 * (1 - np.mean(missed))])
        outcome.figures[f"{PREFIX}{name}.pick.{way}.lost"] = kept_lost
        outcome.figures[f"{PREFIX}{name}.pick.{way}.hit"] = rows[-1][2]
    print(f"\n{name}: picks under {len(BUDGETS)} budgets, real ImageNet accuracies")
    print(contract.table(("picked with", "top-1 lost where met", "budget met %"), rows))


def aims(outcome: contract.Outcome) -> None:
    figures = outcome.figures
    for name in SPACES:
        own, noise = f"{PREFIX}{name}.own table", f"{PREFIX}{name}.another session"
        if f"{own}.mape" not in figures:
            continue
        for figure, share in (("within_10", 99), ("within_5", 95)):
            got = figures[f"{own}.{figure}"]
            outcome.aim(f"{PREFIX}{name}.{figure}", f">= {share} %", got, got >= share)
        got, limit = figures[f"{own}.mape"], figures[f"{noise}.mape"] + 3
        outcome.aim(f"{PREFIX}{name}.mape", "<= noise + 3 points", got, got <= limit)
        for figure in ("tau", "tau_band"):
            got, least = figures[f"{own}.{figure}"], 0.95 * figures[f"{noise}.{figure}"]
            outcome.aim(f"{PREFIX}{name}.{figure}", ">= 0.95 x repeat", got, got >= least)
    others = {
        "users.within_10": (f"users.table of {profile.CHAINS}.within_10", 85),
        "first_pick_hit": (f"{OFA}.pick.table, upper end.hit", 90),
    }
    for aim, (figure, least) in others.items():
        if PREFIX + figure in figures:
            got = figures[PREFIX + figure]
            outcome.aim(PREFIX + aim, f">= {least} %", got, got >= least)
