"""`nasctl bench`: the latency of any ONNX file, by the protocol that tables are made with.

Also a gate for CI, against a budget or an older file.
"""

from __future__ import annotations

import statistics
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cli import console, gate
from cli.measuring import cache, here_or_there, on_board
from nas.errors import BudgetMissed, NasctlError

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from hw_profiles.measure import Setting
    from hw_profiles.protocol import Plan, Timing


@dataclass(frozen=True)
class Times:
    """What one process measured; lists are in the order of the files."""

    timings: list[Timing]
    rounds_ms: list[list[float]]
    reference_ms: list[float]


def command(
    model: Annotated[Path, typer.Argument(help="An .onnx file.")],
    hw: Annotated[str, typer.Option(help="Device name or a .toml file.")] = "cpu",
    runtime: Annotated[str | None, typer.Option(help="[the device's]")] = None,
    precision: Annotated[str | None, typer.Option(help="[as the file is]")] = None,
    threads: Annotated[int, typer.Option(min=1, help="Of the processor.")] = 1,
    on: Annotated[str, typer.Option(help="local, or ssh://[user@]host[:port].")] = "local",
    duration: Annotated[str, typer.Option(help="At most, as 20s.")] = "20s",
    seed: Annotated[int, typer.Option(min=0, help="Of the input.")] = 0,
    against: Annotated[
        Path | None, typer.Option(help="An older file, in turn with it: exit 4 if it is faster.")
    ] = None,
    budget: Annotated[str | None, typer.Option(help="Exit 4 above this median, as 5ms.")] = None,
    json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Measure an ONNX file on this machine or on a board over ssh.

    As a gate, in several processes: exit code 4 above --budget, or where the file is slower than
    the one --against; exit code 1 where a busy machine leaves that in doubt.
    """
    from hw_profiles import device as devices
    from hw_profiles.measure import Setting
    from hw_profiles.protocol import Plan

    models = [model] if against is None else [model, against]
    for path in models:
        if not path.is_file():
            raise NasctlError("no such file", where=str(path))
    wanted_ms = console.parse_latency(budget, "--budget")
    board = devices.load(hw)
    here_or_there(board, on)
    setting = Setting(runtime or board.runtime, precision, threads)
    gated = against is not None or wanted_ms is not None
    times, rounds = (gate.PROCESSES, 10) if gated else (1, 20)
    limit = console.parse_seconds(duration, "--duration") / times
    # what a loop over the file will show: the median of calls in a row, not the fastest
    plan = Plan(rounds=rounds, inner=10, per_round=statistics.median, time_limit_s=limit)
    if on == "local":
        found, told = _here(models, setting, plan, seed, board.kind, times)
    else:
        found, told = _there(models, setting, plan, seed, on, times)
    timing, precisions = _middle(each.timings[0] for each in found), told.pop("precisions")
    row = {"model": str(model), "device": board.name, "on": on, **told}
    row |= {**asdict(timing), "precision": precisions[0]}
    row |= {"processes": times, **_gated(found, wanted_ms, against, precisions)}
    if json:
        console.emit_json(row)
    else:
        _say(row, timing, plan, threads)
    _require(row)


def _middle(timings: Iterable[Timing]) -> Timing:
    ordered = sorted(timings, key=lambda timing: timing.median_ms)
    return ordered[len(ordered) // 2]


def _gated(
    found: Sequence[Times], budget_ms: float | None, older: Path | None, precisions: Sequence[str]
) -> dict[str, Any]:
    """What is asked of the file, what it is over all processes, and the answer."""
    row: dict[str, Any] = {}
    own = [each.timings[0] for each in found]
    own_ms = [timing.median_ms for timing in own]
    if budget_ms is not None:
        fastest = min(min(each.rounds_ms[0]) for each in found)
        span = gate.duration(own_ms, fastest, [timing.noisy for timing in own])
        answer = gate.budget(span, budget_ms)
        row["budget"] = {"budget_ms": budget_ms, **asdict(span), "answer": answer}
    if older is not None:
        theirs = [each.timings[1] for each in found]
        doubts = [a.noisy or b.noisy for a, b in zip(own, theirs, strict=True)]
        span = gate.slowdown(own_ms, [timing.median_ms for timing in theirs], doubts)
        row["against"] = {
            **{"model": str(older), **asdict(_middle(theirs)), "precision": precisions[1]},
            **{"change": span.middle - 1, "ratio": asdict(span), "answer": gate.against(span)},
        }
    return row


def _require(row: dict[str, Any]) -> None:
    """Raises BudgetMissed for what is missed, else NasctlError for what is in doubt."""
    where, said = row["model"], []
    if (asked := row.get("budget")) is not None:
        ms = [console.format_ms(asked[name]) for name in ("middle", "low", "high", "budget_ms")]
        took = f"took {ms[0]} ({ms[1]} to {ms[2]}), the budget is {ms[3]}"
        said.append((asked["answer"], took, asked["noisy"]))
    if (other := row.get("against")) is not None:
        ratio = other["ratio"]
        ends = f"{ratio['low'] - 1:+.1%} to {ratio['high'] - 1:+.1%}"
        ms = [console.format_ms(each["median_ms"]) for each in (row, other)]
        took = f"took {ms[0]}, the older file {ms[1]}: {other['change']:+.1%} ({ends})"
        said.append((other["answer"], took, ratio["noisy"]))
    for answer, took, _ in said:
        if answer == "missed":
            raise BudgetMissed(took, where=where)
    for answer, took, noisy in said:
        if answer == "in doubt":
            raise NasctlError(
                f"not decided, {took}; {noisy or 'the processes differ'}",
                where=where,
                next="Measure again on a quiet machine, or longer (--duration).",
            )


def _say(row: dict[str, Any], timing: Timing, plan: Plan, threads: int) -> None:
    say, told = console.say, row
    where = f"{row['device']} ({row['on']})"
    say(f"{where}, {told['runtime']}, {told['precision']}, {threads} thread(s)", "device")
    say(f"{1e3 / timing.median_ms:.1f} qps", "rate")
    say(
        f"median = {timing.median_ms:.4g} ms, percentile(90%) = {timing.p90_ms:.4g} ms, "
        f"percentile(95%) = {timing.p95_ms:.4g} ms, percentile(99%) = {timing.p99_ms:.4g} ms",
        "latency",
    )
    say(
        f"{told['timed']}; {timing.n} rounds of {plan.inner} calls"
        + (f", the middle one of {told['processes']} processes" if told["processes"] > 1 else "")
    )
    if timing.noisy:
        say(f"in doubt: {timing.noisy}")
    if (other := told.get("against")) is not None:
        say(f"median = {other['median_ms']:.4g} ms, this file {other['change']:+.1%}", "against")
        if other["noisy"]:
            say(f"in doubt: {other['noisy']}")
        if other["precision"] != told["precision"]:
            say(f"computes in {told['precision']}, the older file in {other['precision']}")
    if (used := told.get("energy")) is not None:
        say(
            f"{used['mj']:.4g} mJ per call, {used['idle_mj']:.4g} mJ of it also without work "
            f"({used['sensor']})",
            "energy",
        )
    elif row["on"] == "local":
        say("? (this machine has no power sensor that can be read)", "energy")


def _here(
    models: Sequence[Path], setting: Setting, plan: Plan, seed: int, kind: str, times: int
) -> tuple[list[Times], dict[str, Any]]:
    import numpy as np

    from hw_profiles import power, protocol, runtimes
    from hw_profiles.measure import Pace, fresh_session

    runtime = runtimes.load_module(setting.runtime)
    if missing := runtime.unavailable():
        raise NasctlError(missing, where=f"runtime {setting.runtime}")
    rng, pace = np.random.default_rng(seed), Pace()
    loaded = [
        runtime.load(model, threads=setting.threads, precision=setting.precision)
        for model in models
    ]
    found = []
    for step in _steps(times):
        one = fresh_session(models[::step], setting, rng=rng, plan=plan, pace=pace)
        found.append(Times(one.timings[::step], one.rounds_ms[::step], one.reference_ms))
    sensor, feeds = power.sensor(kind), runtimes.random_feeds(loaded[0], rng)
    used = power.per_call(lambda: runtime.run(loaded[0], feeds), sensor) if sensor else None
    precisions = [runtime.observed_precision(session) for session in loaded]
    return found, {
        "energy": asdict(used) if used else None,
        "runtime": f"{setting.runtime} {runtime.version()}",
        "precisions": precisions,
        "timed": runtime.TIMED,
        "noise": protocol.noise([ms for one in found for ms in one.reference_ms]),
    }


def _steps(times: int) -> list[int]:
    """1 and -1 in turn: in every other process the files come in the opposite order."""
    return [1 - 2 * (at % 2) for at in range(times)]


def _there(
    models: Sequence[Path], setting: Setting, plan: Plan, seed: int, on: str, times: int
) -> tuple[list[Times], dict[str, Any]]:
    from hw_profiles import protocol, runtimes

    # one folder for all: after a lost connection the same command collects what the board measured
    content = {str(at): path.read_bytes() for at, path in enumerate(models)}
    # every parcel is a process of its own there, and one of another seed another parcel
    parts = [
        on_board(dict(list(content.items())[::step]), on, setting, plan, seed + at, cache())
        for at, step in enumerate(_steps(times))
    ]
    found = [
        Times(
            [part.timings[name] for name in content],
            [part.rounds_ms[name] for name in content],
            part.reference_ms,
        )
        for part in parts
    ]
    return found, {
        "runtime": str(parts[0].fingerprint["runtime"]),
        "precisions": [setting.precision or "as the file is"] * len(models),
        "timed": runtimes.load_module(setting.runtime).TIMED,
        "noise": protocol.noise([ms for part in parts for ms in part.reference_ms]),
    }
