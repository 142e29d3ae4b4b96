"""`nasctl bench`: the latency of any ONNX file, by the protocol that tables are made with.

Also a gate for CI, against a budget or an older file.
"""

from __future__ import annotations

import os
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cli import console
from cli.measuring import here_or_there, on_board
from nas.errors import BudgetMissed, NasctlError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from hw_profiles.measure import Setting
    from hw_profiles.protocol import Plan, Timing

SAME = 0.02  # a relative difference that is none: what the same file repeats to


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

    As a gate: exit code 4 above --budget, or where the file --against is faster beyond doubt.
    """
    import statistics

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
    limit = console.parse_seconds(duration, "--duration")
    # what a loop over the file will show: the median of calls in a row, not the fastest
    plan = Plan(rounds=20, inner=10, per_round=statistics.median, time_limit_s=limit)
    if on == "local":
        timings, told = _here(models, setting, plan, seed, board.kind)
    else:
        timings, told = _there(models, setting, plan, seed, on)
    timing, older = timings[0], timings[1] if against else None
    row = {"model": str(model), "device": board.name, "on": on, **told, **asdict(timing)}
    if older is not None:
        change = timing.median_ms / older.median_ms - 1
        row |= {"against": {"model": str(against), **asdict(older), "change": change}}
    if json:
        console.emit_json(row)
    else:
        _say(row, timing, plan, threads)
        if older is not None:
            console.say(f"{against}: median = {older.median_ms:.4g} ms, this file {change:+.1%}")
    _require(timing, older, wanted_ms, str(model))


def _require(timing: Timing, older: Timing | None, budget_ms: float | None, where: str) -> None:
    """Raises BudgetMissed above the budget, or where the older file is faster beyond doubt."""
    took = f"took {console.format_ms(timing.median_ms)}"
    if budget_ms is not None and timing.median_ms > budget_ms:
        raise BudgetMissed(f"{took}, the budget is {console.format_ms(budget_ms)}", where=where)
    if older is None:
        return
    doubt = max((timing.spread_ms + older.spread_ms) / 2, SAME * older.median_ms)
    if timing.median_ms - older.median_ms > doubt:
        raise BudgetMissed(
            f"{took}, the older file {console.format_ms(older.median_ms)}", where=where
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
    say(f"{told['timed']}; {timing.n} rounds of {plan.inner} calls")
    if timing.noisy:
        say(f"in doubt: {timing.noisy}")
    if (used := told.get("energy")) is not None:
        say(
            f"{used['mj']:.4g} mJ per call, {used['idle_mj']:.4g} mJ of it also without work "
            f"({used['sensor']})",
            "energy",
        )
    elif row["on"] == "local":
        say("? (this machine has no power sensor that can be read)", "energy")


def _here(
    models: Sequence[Path], setting: Setting, plan: Plan, seed: int, kind: str
) -> tuple[list[Timing], dict[str, Any]]:
    import random

    import numpy as np

    from hw_profiles import power, protocol, runtimes
    from hw_profiles.measure import ops_call, reference_ops

    runtime = runtimes.load_module(setting.runtime)
    if missing := runtime.unavailable():
        raise NasctlError(missing, where=f"runtime {setting.runtime}")
    rng, clock = np.random.default_rng(seed), runtimes.Clock()
    sessions = [
        runtime.load(model, threads=setting.threads, precision=setting.precision)
        for model in models
    ]
    feeds = [runtimes.random_feeds(session, rng) for session in sessions]
    found = protocol.session(
        [clock.of(runtime.timed(*each)) for each in zip(sessions, feeds, strict=True)],
        rng=random.Random(seed),
        plan=plan,
        reference=ops_call(reference_ops(), rng),
        instruments=protocol.Instruments(clock=clock),
    )
    sensor = power.sensor(kind)
    used = power.per_call(lambda: runtime.run(sessions[0], feeds[0]), sensor) if sensor else None
    return found.timings, {
        "energy": asdict(used) if used else None,
        "runtime": f"{setting.runtime} {runtime.version()}",
        "precision": runtime.observed_precision(sessions[0]),
        "timed": runtime.TIMED,
        "noise": found.noise,
    }


def _there(
    models: Sequence[Path], setting: Setting, plan: Plan, seed: int, on: str
) -> tuple[list[Timing], dict[str, Any]]:
    from hw_profiles import runtimes

    # one folder for all: after a lost connection the same command collects what the board measured
    cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "nasctl"
    content = {str(at): path.read_bytes() for at, path in enumerate(models)}
    found = on_board(content, on, setting, plan, seed, cache)
    return [found.timings[name] for name in content], {
        "runtime": str(found.fingerprint["runtime"]),
        "precision": setting.precision or "as the file is",
        "timed": runtimes.load_module(setting.runtime).TIMED,
        "noise": found.noise,
    }
