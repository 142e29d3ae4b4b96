"""`nasctl profile`: measure a device and write its latency table, with its errors."""

from __future__ import annotations

import math
import os
import time
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cli import console
from nas.errors import NasctlError, UsageError

if TYPE_CHECKING:
    from hw_profiles.device import Device
    from hw_profiles.measure import Setting
    from hw_profiles.profile import Errors, Group, Measure, Plan, Timings

MINE, CHAINS, HELD_OUT = 200, 240, 60  # networks, if the budget lasts
LOCAL_NETWORK_S = 0.6  # what a network takes here, about: building, warming up, measuring
GROUP_S = 60.0  # at most, for the networks of a session


def command(
    hw: Annotated[str, typer.Option(help="Device name or a .toml file.")] = "cpu",
    space: Annotated[
        str | None, typer.Option(help="Space to be sharp on; none: random networks only.")
    ] = None,
    size: Annotated[int, typer.Option(min=4, help="Image size of its networks.")] = 32,
    channels: Annotated[int, typer.Option(min=1, help="Image channels.")] = 3,
    classes: Annotated[int, typer.Option(min=2, help="Number of classes.")] = 10,
    width: Annotated[float | None, typer.Option(help="Scale of the space's channels.")] = None,
    runtime: Annotated[str | None, typer.Option(help="[the device's]")] = None,
    precision: Annotated[str | None, typer.Option(help="[the device's]")] = None,
    batch: Annotated[int, typer.Option(min=1, help="Images per call.")] = 1,
    threads: Annotated[int, typer.Option(min=1, help="Of the processor.")] = 1,
    on: Annotated[str, typer.Option(help="local, or ssh://[user@]host[:port].")] = "local",
    budget: Annotated[str, typer.Option(help="Measuring time, as 15min.")] = "5min",
    seed: Annotated[int, typer.Option(min=0, help="Of the networks drawn.")] = 0,
    out: Annotated[
        Path | None, typer.Option(help="Folder of the table. [$NASCTL_PROFILES, or profiles]")
    ] = None,
    validate: Annotated[
        bool, typer.Option("--validate", help="Re-measure new networks against the table.")
    ] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the plan.")] = False,
    json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Measure a device and write the latency table that searches use, with its errors.

    The same command goes on where it was interrupted, without measuring anything twice.
    """
    from hw_profiles import device as devices
    from hw_profiles import runtimes
    from hw_profiles.measure import Setting

    board = devices.load(hw)
    changed = {"runtime": runtime or board.runtime, "precision": precision or board.precision}
    board = board.model_copy(update=changed)
    seconds = console.parse_seconds(budget, "--budget")
    setting = Setting(board.runtime, board.precision, threads, batch)
    if on == "local":
        if missing := runtimes.load_module(board.runtime).unavailable():
            raise NasctlError(missing, where=f"runtime {board.runtime}")
        if not board.local:
            raise UsageError(
                f"{board.name} is not this machine",
                where="--on",
                allowed="ssh://[user@]host[:port]",
            )
    shape = {"channels": channels, "classes": classes, "size": size, "width": width}
    plan = _plan(space, shape, seed + 1000 * validate, seconds)
    folder = out or Path(os.environ.get("NASCTL_PROFILES", "profiles"))
    header = {**asdict(setting), "device": board.name, "on": on, "seed": seed, **_here(on)}
    say = console.say
    say(f"{board.name}, {board.runtime} {board.precision}, batch {batch}, {on}", "device")
    say(
        f"{len(plan.mine)} networks of {space or 'no space'}, {len(plan.chains)} random ones, "
        f"{len(plan.held_out)} held out; {console.format_seconds(_estimate(plan, on, seconds))}",
        "plan",
    )
    if dry_run:
        if json:
            console.emit_json({**header, "estimated_seconds": _estimate(plan, on, seconds)})
        return None
    names = f"{board.name}.validation" if validate else board.name
    path = folder / f"{names}.timings.jsonl"
    if validate:
        path.unlink(missing_ok=True)  # a validation is of its own time
    timings = _measured(path, header, plan, _backend(on, setting, seed, folder), seconds)
    if validate:
        return _validate(timings, plan, board, folder, json)
    return _write(timings, plan, board, folder, header, json)


def _here(on: str) -> dict[str, str]:
    """What must not change between two parts of a profile of this machine, nor until it is used."""
    from deploy import verify

    return verify.runs_in() if on == "local" else {}


def _plan(space: str | None, shape: dict[str, Any], seed: int, seconds: float) -> Plan:
    import numpy as np

    from hw_profiles import chains
    from hw_profiles.profile import Plan
    from nas import space as spaces

    share = min(1.0, seconds / (LOCAL_NETWORK_S * (MINE + CHAINS + HELD_OUT)))
    mine, others, held_out = (max(20, round(share * n)) for n in (MINE, CHAINS, HELD_OUT))
    rng = np.random.default_rng((seed, 8))
    random = chains.sample(rng, others + (0 if space else mine + held_out))
    if space is None:
        return Plan("", [], random[held_out:], random[:held_out])
    found = spaces.load(space, **shape)
    ends = np.stack([found.smallest, found.largest])
    rows = np.unique(np.concatenate([ends, found.sample(rng, mine + held_out)]), axis=0)
    networks = [found.ops(found.decode(row)) for row in rng.permutation(rows)]
    return Plan(space, networks[held_out:], random, networks[:held_out])


def _estimate(plan: Plan, on: str, seconds: float) -> float:
    if on != "local":
        return seconds  # nobody knows how fast the board is
    return min(seconds, LOCAL_NETWORK_S * len(plan.order()))


def _measured(
    path: Path, header: dict[str, Any], plan: Plan, measure: Measure, seconds: float
) -> Timings:
    from hw_profiles.profile import Timings

    timings = Timings(path, header)
    order, began = plan.order(), time.monotonic()
    with console.bar("measuring", len(order)) as update:

        def enough() -> bool:
            return time.monotonic() - began > seconds

        while (missing := timings.missing(order)) and not enough():
            done = len(order) - len(missing)

            def tell(share: float, done: int = done) -> None:
                update(done + share * (len(order) - done), "")

            tell(0.0)
            timings.measure(missing, measure, enough=enough, progress=tell)
    return timings


def _backend(on: str, setting: Setting, seed: int, folder: Path) -> Measure:
    import numpy as np

    from hw_profiles import measure, remote, ssh
    from hw_profiles.bundle import Bundle
    from hw_profiles.graph import onnx_graph
    from hw_profiles.profile import Group, digest
    from hw_profiles.protocol import Plan

    plan = Plan(rounds=12, precision=0.03, time_limit_s=GROUP_S)
    if on == "local":
        rng, paces = np.random.default_rng((seed, 9)), [math.inf]

        def here(networks: Any) -> Group:
            session = measure.fresh_session(
                networks, setting, rng=rng, plan=plan, pace_ms=min(paces)
            )
            paces.append(session.pace_ms)
            return Group(session.timings, session.reference_ms)

        return here
    target = ssh.parse(on)

    def there(networks: Any) -> Group:
        models = {
            digest(ops): onnx_graph(ops, batch=setting.batch).SerializeToString()
            for ops in networks
        }
        bundle = Bundle(
            models,
            measure.reference_model(),
            plan=plan,
            threads=setting.threads,
            runtime=setting.runtime,
            # the graphs are fp32 as they are; anything else must be demanded
            precision=None if setting.precision == "fp32" else setting.precision,
            seed=seed,
        )
        found = remote.measure_models(target, bundle, workdir=folder / "remote")
        return Group([found.timings[digest(ops)] for ops in networks], found.reference_ms)

    return there


def _write(
    timings: Timings, plan: Plan, board: Device, folder: Path, header: dict[str, Any], json: bool
) -> None:
    from hw_profiles import device as devices
    from hw_profiles import profile

    provenance = {
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "protocol": "medians of quiet rounds, shuffled round-robin, between calls of a reference",
        **{name: value for name, value in header.items() if value is not None},
    }
    table, errors = profile.table(timings, plan, board, provenance)
    path = folder / f"{board.name}.table.json"
    table.save(path)
    console.say(f"{path}; noise floor {timings.noise:.1%}", "table")
    if folder not in devices.folders():
        console.say(f"searches use it with NASCTL_PROFILES={folder}")
    _tell(errors, plan, json, str(path))


def _validate(timings: Timings, plan: Plan, board: Device, folder: Path, json: bool) -> None:
    from hw_profiles import profile
    from hw_profiles.latency import LatencyTable

    path = folder / f"{board.name}.table.json"
    table = LatencyTable.load(path)
    samples = timings.samples(plan.order())
    if len(samples) < profile.MIN_HELD_OUT:
        raise NasctlError(
            f"only {len(samples)} networks could be measured beyond doubt",
            where=board.name,
            allowed=f"at least {profile.MIN_HELD_OUT}",
            next="Stop what else runs there, or raise --budget.",
        )
    for name, networks in (("the space", [*plan.mine, *plan.held_out]), ("random", plan.chains)):
        found = timings.samples(networks)
        if len(found) >= profile.MIN_HELD_OUT:
            ops, measured = zip(*found, strict=True)
            own = plan.space if name == "the space" else ""
            console.say(f"{len(found)} networks of {name} that the table never saw", "validated")
            _tell(profile.validate(table, ops, measured, own), plan, json, str(path))


def _tell(errors: Errors | None, plan: Plan, json: bool, path: str) -> None:
    if json:
        console.emit_json({"table": path, "errors": asdict(errors) if errors else None})
    if errors is None:
        return console.say("too few held-out networks were measured: the error is not known")
    console.say(
        f"{errors.n} networks it never saw: {errors.mape:.1f} % mean error, "
        f"{errors.within_5:.0f} % within 5 %, {errors.within_10:.0f} % within 10 %, worst "
        f"{errors.worst:.0f} %, Kendall tau {errors.tau:.2f}, {errors.inside:.0f} % inside the "
        "printed interval",
        "error",
    )
    return None
