"""`nasctl proxies`: what training-free proxies say of a space's networks, at what cost, and whether
they know more than counting multiplications and parameters does."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from cli import console, options
from nas.errors import UsageError


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
    from cli import scoring

    asked = scoring.Asked(tuple(names), networks, batch, seed)
    if run is None:
        given = {"space": space, "data": data, "width": width, "size": size}
        plan = scoring.of_space(asked, given, truth)
    else:
        plan = scoring.of_run(asked, run)
    where = scoring.where(workers, devices)
    if dry_run:
        outcome = scoring.estimate(plan, where)
    else:
        outcome = scoring.worth(plan, scoring.scored(plan, where))
    if json:
        console.emit_json(outcome)
    elif not dry_run:
        _show(outcome)


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
