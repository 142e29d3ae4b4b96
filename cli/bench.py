"""`nasctl bench`: the latency of any ONNX file, by the protocol that tables are made with."""

from __future__ import annotations

import os
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cli import console
from cli.measuring import here_or_there
from nas.errors import NasctlError

if TYPE_CHECKING:
    from hw_profiles.measure import Setting
    from hw_profiles.protocol import Plan, Timing


def command(
    model: Annotated[Path, typer.Argument(help="An .onnx file.")],
    hw: Annotated[str, typer.Option(help="Device name or a .toml file.")] = "cpu",
    runtime: Annotated[str | None, typer.Option(help="[the device's]")] = None,
    precision: Annotated[str | None, typer.Option(help="[as the file is]")] = None,
    threads: Annotated[int, typer.Option(min=1, help="Of the processor.")] = 1,
    on: Annotated[str, typer.Option(help="local, or ssh://[user@]host[:port].")] = "local",
    duration: Annotated[str, typer.Option(help="At most, as 20s.")] = "20s",
    seed: Annotated[int, typer.Option(min=0, help="Of the input.")] = 0,
    json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Measure an ONNX file on this machine or on a board over ssh."""
    import statistics

    from hw_profiles import device as devices
    from hw_profiles.measure import Setting
    from hw_profiles.protocol import Plan

    if not model.is_file():
        raise NasctlError("no such file", where=str(model))
    board = devices.load(hw)
    here_or_there(board, on)
    setting = Setting(runtime or board.runtime, precision, threads)
    limit = console.parse_seconds(duration, "--duration")
    # what a loop over the file will show: the median of calls in a row, not the fastest
    plan = Plan(rounds=20, inner=10, per_round=statistics.median, time_limit_s=limit)
    if on == "local":
        timing, told = _here(model, setting, plan, seed, board.kind)
    else:
        timing, told = _there(model, setting, plan, seed, on)
    row = {"model": str(model), "device": board.name, "on": on, **told, **asdict(timing)}
    if json:
        return console.emit_json(row)
    say = console.say
    say(
        f"{board.name} ({on}), {told['runtime']}, {told['precision']}, {threads} thread(s)",
        "device",
    )
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
    elif on == "local":
        say("? (this machine has no power sensor that can be read)", "energy")
    return None


def _here(
    model: Path, setting: Setting, plan: Plan, seed: int, kind: str
) -> tuple[Timing, dict[str, Any]]:
    import random

    import numpy as np

    from hw_profiles import power, protocol, runtimes
    from hw_profiles.measure import ops_call, reference_ops

    runtime = runtimes.load_module(setting.runtime)
    if missing := runtime.unavailable():
        raise NasctlError(missing, where=f"runtime {setting.runtime}")
    rng, clock = np.random.default_rng(seed), runtimes.Clock()
    session = runtime.load(model, threads=setting.threads, precision=setting.precision)
    feeds = runtimes.random_feeds(session, rng)
    found = protocol.session(
        [clock.of(runtime.timed(session, feeds))],
        rng=random.Random(seed),
        plan=plan,
        reference=ops_call(reference_ops(), rng),
        instruments=protocol.Instruments(clock=clock),
    )
    sensor = power.sensor(kind)
    used = power.per_call(lambda: runtime.run(session, feeds), sensor) if sensor else None
    return found.timings[0], {
        "energy": asdict(used) if used else None,
        "runtime": f"{setting.runtime} {runtime.version()}",
        "precision": runtime.observed_precision(session),
        "timed": runtime.TIMED,
        "noise": found.noise,
    }


def _there(
    model: Path, setting: Setting, plan: Plan, seed: int, on: str
) -> tuple[Timing, dict[str, Any]]:
    from hw_profiles import measure, runtimes
    from hw_profiles.remote import over_ssh, ssh
    from hw_profiles.remote.parcel import Parcel

    parcel = Parcel(
        {model.stem: model.read_bytes()},
        measure.reference_model(),
        plan=plan,
        threads=setting.threads,
        runtime=setting.runtime,
        precision=setting.precision,
        seed=seed,
    )
    # one folder for all: after a lost connection the same command collects what the board measured
    cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "nasctl"
    found = over_ssh.measure_models(ssh.parse(on), parcel, workdir=cache)
    return found.timings[model.stem], {
        "runtime": str(found.fingerprint["runtime"]),
        "precision": setting.precision or "as the file is",
        "timed": runtimes.load_module(setting.runtime).TIMED,
        "noise": found.noise,
    }
