"""`nasctl profile`: measure a device and write its latency table, with its errors."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cli import console, measuring
from nas.errors import NasctlError, UsageError

if TYPE_CHECKING:
    from hw_profiles.device import Device
    from hw_profiles.latency import LatencyTable
    from hw_profiles.measure import Setting
    from hw_profiles.models.transfer import Sources
    from hw_profiles.profile import Errors, Measure, Ops, Plan, Timings

MINE, CHAINS, HELD_OUT = 200, 240, 60  # networks, if the budget lasts
POOL = 600  # networks of the space that --from may choose among, and carries over to
LOCAL_NETWORK_S = 0.6  # what a network takes here, about: building, warming up, measuring


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
    on: Annotated[
        str, typer.Option(help="local, ssh://[user@]host[:port], or files:FOLDER to carry there.")
    ] = "local",
    lenders: Annotated[
        str | None,
        typer.Option("--from", help="Devices whose tables help: then few networks are enough."),
    ] = None,
    networks: Annotated[
        int, typer.Option(min=10, max=100, help="How many to measure with --from.")
    ] = 30,
    budget: Annotated[str, typer.Option(help="Measuring time, as 15min.")] = "5min",
    seed: Annotated[int, typer.Option(min=0, help="Of the networks drawn.")] = 0,
    out: Annotated[
        Path | None, typer.Option(help="Folder of the table. [$NASCTL_PROFILES, or profiles]")
    ] = None,
    validate: Annotated[
        bool, typer.Option("--validate", help="Re-measure new networks against the table.")
    ] = False,
    alignment: Annotated[
        bool, typer.Option("--alignment", help="Only find which channel counts run well.")
    ] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the plan.")] = False,
    json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Measure a device and write the latency table that searches use, with its errors.

    The same command goes on where it was interrupted, without measuring anything twice.
    """
    from hw_profiles import device as devices
    from hw_profiles.measure import Pace, Setting
    from hw_profiles.profile import Timings

    board = devices.load(hw)
    changed = {"runtime": runtime or board.runtime, "precision": precision or board.precision}
    board = board.model_copy(update=changed)
    seconds = console.parse_seconds(budget, "--budget")
    setting = Setting(board.runtime, board.precision, threads, batch)
    _check(board, on)
    shape = {"channels": channels, "classes": classes, "size": size, "width": width}
    folder = out or Path(os.environ.get("NASCTL_PROFILES", "profiles"))
    if alignment:
        from cli.alignment import swept

        found = swept(board, setting, on, seed, folder)
        return console.emit_json(found) if json else None
    header = {**asdict(setting), "device": board.name, "on": on, "seed": seed, **_here(on)}
    header |= {"space": space or "", **{k: v for k, v in shape.items() if v is not None}}
    table = _table(folder, board, header) if validate else None
    lent = None
    if validate:
        plan = _unseen(_plan(space, shape, seed + 1000, seconds), folder / _file(board))
    else:
        lent = _lent(lenders, board.name, space, shape, seed, networks)
        plan = lent.plan if lent else _plan(space, shape, seed, seconds)
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
    if (carried := measuring.files(on)) is not None:
        there = _carried(carried, plan, board.name, setting, seed)
        if there is None:
            return None
        plan = there
    path = folder / _file(board, validate)
    if validate or carried is not None:  # of its own time; or the files say it all, and may change
        path.unlink(missing_ok=True)
    timings = Timings(path, header)
    known = table.provenance.get("pace_ms", math.inf) if table else timings.pace_ms
    measure = measuring.backend(on, setting, seed, folder, Pace(float(known)))
    _measure(timings, plan, measure, seconds, again=carried is None)
    if table is not None:
        return _validate(table, timings, plan, json)
    return _write(timings, plan, board, folder, header, lent, json)


def _check(board: Device, on: str) -> None:
    """That the runtime is here and offers the precision, and that `on` is where the device is."""
    from hw_profiles import runtimes

    runtime = runtimes.load_module(board.runtime)
    runtimes.offered(board.precision, runtime.PRECISIONS, board.runtime)
    if on == "local" and (missing := runtime.unavailable()):
        raise NasctlError(missing, where=f"runtime {board.runtime}")
    measuring.here_or_there(board, on)


def _file(board: Device, validate: bool = False) -> str:
    return f"{board.name}{'.validation' if validate else ''}.timings.jsonl"


def _table(folder: Path, board: Device, header: dict[str, Any]) -> LatencyTable:
    """The table to be validated. Raises NasctlError where it is of something else."""
    from hw_profiles.latency import LatencyTable

    path = folder / f"{board.name}.table.json"
    table = LatencyTable.load(path)
    names = ["runtime", "precision", "threads", "batch", *_here(str(header["on"]))]
    names += [] if "ingested" in table.provenance else ["on"]  # theirs was measured elsewhere
    if differs := [
        name for name in names if table.provenance.get(name, header[name]) != header[name]
    ]:
        raise NasctlError(f"was made with another {', '.join(differs)}", where=str(path))
    return table


def _unseen(plan: Plan, path: Path) -> Plan:
    """The plan without the networks that the profile in this file measured."""
    import json

    from hw_profiles import lines
    from hw_profiles.profile import Plan, digest

    rows = [json.loads(line) for line in lines.whole(path)][1:] if path.is_file() else []
    seen = {name for row in rows for name in row["timings"]}
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

    found = None if space is None else spaces.load(space, **shape)  # a wrong name costs nothing
    share = min(1.0, seconds / (LOCAL_NETWORK_S * (MINE + CHAINS + HELD_OUT)))
    mine, others, held_out = (max(20, round(share * n)) for n in (MINE, CHAINS, HELD_OUT))
    # prefixes of draws of one size, so that another budget measures nothing anew
    random = chains.sample(np.random.default_rng((seed, 8)), MINE + CHAINS + HELD_OUT)
    if space is None or found is None:
        return Plan("", [], random[HELD_OUT:][: mine + others], random[:HELD_OUT][:held_out])
    ends = np.stack([found.smallest, found.largest])
    drawn = found.sample(np.random.default_rng((seed, 10)), MINE + HELD_OUT)
    rows = list(dict.fromkeys(map(tuple, np.concatenate([ends, drawn]).tolist())))
    networks = [found.ops(found.decode(np.array(row))) for row in rows]
    own = networks[:2] + networks[2 + HELD_OUT :]
    return Plan(space, own[:mine], random[:others], networks[2 : 2 + HELD_OUT][:held_out])


@dataclass(frozen=True)
class Lent:
    """A profile with the help of other devices' tables."""

    plan: Plan
    sources: Sources
    pool: Sequence[Ops]  # networks of the space, most of them measured nowhere


def _lent(
    lenders: str | None,
    device: str,
    space: str | None,
    shape: dict[str, Any],
    seed: int,
    n: int,
) -> Lent | None:
    if lenders is None:
        return None
    if space is None:
        raise UsageError("--from takes the space to be searched", where="--space")
    import numpy as np

    from hw_profiles import device as devices
    from hw_profiles import latency
    from hw_profiles.models import fewshot, transfer
    from hw_profiles.models.structure import describe
    from hw_profiles.profile import MIN_HELD_OUT, Plan
    from nas import space as spaces

    tables = []
    for name in lenders.split(","):
        table = latency.table(devices.load(name.strip()))
        if table.source == "analytic" or table.device == device:
            raise UsageError(
                f"{table.device} has no measurements to lend",
                where="--from",
                allowed="other devices whose tables are measured or calibrated (nasctl devices)",
            )
        tables.append(table)
    found = spaces.load(space, **shape)
    rows = np.unique(found.sample(np.random.default_rng((seed, 11)), POOL), axis=0)
    rows = np.random.default_rng((seed, 12)).permutation(rows)
    networks = [found.ops(found.decode(row)) for row in rows]
    held_out, pool = networks[:MIN_HELD_OUT], networks[MIN_HELD_OUT:]
    sources = fewshot.sources(tables, pool, space, np.random.default_rng((seed, 13)))
    chosen = transfer.choose(sources, describe(pool), n)
    return Lent(Plan(space, [pool[at] for at in chosen], [], held_out), sources, pool)


def _carried(folder: Path, plan: Plan, device: str, setting: Setting, seed: int) -> Plan | None:
    """The plan's networks that came back with a time; None where the folder must travel first."""
    import numpy as np

    from hw_profiles.profile import Plan
    from hw_profiles.remote import offline

    order = plan.order()
    board = offline.Board(device, setting.runtime, setting.precision or "fp32", setting.batch)
    # also where some came back: what a longer budget adds, and the order of what is left
    offline.write(folder, order, board, np.random.default_rng((seed, 14)))
    came = offline.there(folder, order)
    if came:
        console.say(f"{len(came)} of {len(order)} networks came back with a time", "files")
        parts = (plan.mine, plan.chains, plan.held_out)
        return Plan(plan.space, *([ops for ops in part if ops in came] for part in parts))
    console.say(
        f"copy {folder} to the board, run ./{offline.SCRIPT} in it, copy it back, and give the "
        "same command again",
        "files",
    )
    return None


def _estimate(plan: Plan, on: str, seconds: float) -> float:
    if on != "local":
        return seconds  # nobody knows how fast the board is
    return min(seconds, LOCAL_NETWORK_S * len(plan.order()))


def _measure(
    timings: Timings, plan: Plan, measure: Measure, seconds: float, *, again: bool
) -> None:
    """Time the plan's networks; `again`: those in doubt are worth another try."""
    order, began = plan.order(), time.monotonic()
    with console.bar("measuring", len(order)) as update:

        def enough() -> bool:
            return time.monotonic() - began > seconds

        while (missing := timings.missing(order)) and not enough():
            done = len(order) - len(missing)

            def tell(share: float, done: int = done) -> None:
                update(done + share * (len(order) - done), "")

            tell(0.0)
            # all of them: what is missing is then cut into the same groups as before a stop
            timings.measure(order, measure, enough=enough, progress=tell)
            if not again:
                break


def _write(
    timings: Timings,
    plan: Plan,
    board: Device,
    folder: Path,
    header: dict[str, Any],
    lent: Lent | None,
    json: bool,
) -> None:
    from hw_profiles import device as devices
    from hw_profiles import profile
    from hw_profiles.models import fewshot

    provenance = {
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "protocol": "medians of quiet rounds, shuffled round-robin, between calls of a reference",
        **{name: value for name, value in header.items() if value is not None},
    }
    fit = fewshot.fitter(lent.sources, lent.pool) if lent else profile.calibrated
    table, errors = profile.table(timings, plan, board, provenance, fit)
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
    from hw_profiles import ingest, profile

    found = {}
    for name, networks in (("space", [*plan.mine, *plan.held_out]), ("random", plan.chains)):
        samples = timings.samples(networks)
        if len(samples) >= profile.MIN_HELD_OUT:
            ops, measured = zip(*samples, strict=True)
            own = plan.space if name == "space" else profile.CHAINS
            found[name] = profile.validate(table, ops, measured, own)
            if "ingested" in table.provenance:  # somebody's word, until now
                ingest.revalidate(table, samples, own)
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
