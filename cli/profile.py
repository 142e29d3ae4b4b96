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
    from hw_profiles.latency import LatencyTable
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
    from hw_profiles.measure import Setting

    board = devices.load(hw)
    changed = {"runtime": runtime or board.runtime, "precision": precision or board.precision}
    board = board.model_copy(update=changed)
    seconds = console.parse_seconds(budget, "--budget")
    setting = Setting(board.runtime, board.precision, threads, batch)
    _check(board, on)
    shape = {"channels": channels, "classes": classes, "size": size, "width": width}
    folder = out or Path(os.environ.get("NASCTL_PROFILES", "profiles"))
    header = {**asdict(setting), "device": board.name, "on": on, "seed": seed, **_here(on)}
    header |= {"space": space or "", **{k: v for k, v in shape.items() if v is not None}}
    plan = _plan(space, shape, seed, seconds)
    table = _table(folder, board, header) if validate else None
    if validate:
        plan = _unseen(_plan(space, shape, seed + 1000, seconds), folder / _file(board))
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
    path = folder / _file(board, validate)
    if validate:
        path.unlink(missing_ok=True)  # a validation is of its own time
    timings = _measured(path, header, plan, _backend(on, setting, seed, folder), seconds)
    if table is not None:
        return _validate(table, timings, plan, json)
    return _write(timings, plan, board, folder, header, json)


def _check(board: Device, on: str) -> None:
    """That the runtime is here and offers the precision, and that `on` is where the device is."""
    from hw_profiles import runtimes

    runtime = runtimes.load_module(board.runtime)
    runtimes.offered(board.precision, runtime.PRECISIONS, board.runtime)
    if on == "local" and (missing := runtime.unavailable()):
        raise NasctlError(missing, where=f"runtime {board.runtime}")
    here_or_there(board, on)


def here_or_there(board: Device, on: str) -> None:
    """Refuse to file this machine's latencies under a board's name, or a board's under ours."""
    from hw_profiles import ssh

    if on != "local":
        ssh.parse(on)  # raises for what is no address
    if board.local != (on == "local"):
        raise UsageError(
            f"{board.name} is {'' if board.local else 'not '}this machine",
            where="--on" if not board.local else "--hw",
            allowed="ssh://[user@]host[:port]" if not board.local else "the board's device file",
        )


def _file(board: Device, validate: bool = False) -> str:
    return f"{board.name}{'.validation' if validate else ''}.timings.jsonl"


def _table(folder: Path, board: Device, header: dict[str, Any]) -> LatencyTable:
    """The table to be validated. Raises NasctlError where it is of something else."""
    from hw_profiles.latency import LatencyTable

    path = folder / f"{board.name}.table.json"
    table = LatencyTable.load(path)
    names = ("runtime", "precision", "threads", "batch", "on")
    if differs := [name for name in names if table.provenance.get(name) != header[name]]:
        raise NasctlError(f"was made with another {', '.join(differs)}", where=str(path))
    return table


def _unseen(plan: Plan, path: Path) -> Plan:
    """The plan without the networks that the profile in this file measured."""
    import json

    from hw_profiles.profile import Plan, digest

    lines = path.read_text().splitlines()[1:] if path.is_file() else []
    seen = {name for line in lines for name in json.loads(line)["timings"]}
    parts = (plan.mine, plan.chains, plan.held_out)
    return Plan(plan.space, *([ops for ops in part if digest(ops) not in seen] for part in parts))


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
    # prefixes of draws of one size, so that another budget measures nothing anew
    random = chains.sample(np.random.default_rng((seed, 8)), MINE + CHAINS + HELD_OUT)
    if space is None:
        return Plan("", [], random[HELD_OUT:][: mine + others], random[:HELD_OUT][:held_out])
    found = spaces.load(space, **shape)
    ends = np.stack([found.smallest, found.largest])
    drawn = found.sample(np.random.default_rng((seed, 10)), MINE + HELD_OUT)
    rows = list(dict.fromkeys(map(tuple, np.concatenate([ends, drawn]).tolist())))
    networks = [found.ops(found.decode(np.array(row))) for row in rows]
    own = networks[:2] + networks[2 + HELD_OUT :]
    return Plan(space, own[:mine], random[:others], networks[2 : 2 + HELD_OUT][:held_out])


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
    if errors is None:
        console.say("too few held-out networks were measured: the error is not known")
    else:
        _tell(errors, "error")
    if json:
        console.emit_json({"table": str(path), "errors": asdict(errors) if errors else None})


def _validate(table: LatencyTable, timings: Timings, plan: Plan, json: bool) -> None:
    from hw_profiles import profile

    found = {}
    for name, networks in (("space", [*plan.mine, *plan.held_out]), ("random", plan.chains)):
        samples = timings.samples(networks)
        if len(samples) >= profile.MIN_HELD_OUT:
            ops, measured = zip(*samples, strict=True)
            own = plan.space if name == "space" else profile.CHAINS
            found[name] = profile.validate(table, ops, measured, own)
    if not found:
        raise NasctlError(
            f"only {len(timings.samples(plan.order()))} networks could be measured beyond doubt",
            where=table.device,
            allowed=f"at least {profile.MIN_HELD_OUT} of the space or random ones",
            next="Stop what else runs there, or raise --budget.",
        )
    for name, errors in found.items():
        _tell(errors, name)
    if json:
        console.emit_json({name: asdict(errors) for name, errors in found.items()})


def _tell(errors: Errors, label: str) -> None:
    console.say(
        f"{errors.n} networks it never saw: {errors.mape:.1f} % mean error, "
        f"{errors.within_5:.0f} % within 5 %, {errors.within_10:.0f} % within 10 %, worst "
        f"{errors.worst:.0f} %, Kendall tau {errors.tau:.2f}, {errors.inside:.0f} % inside the "
        "printed interval",
        label,
    )
