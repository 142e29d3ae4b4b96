"""`nasctl export`: any network that a run evaluated, as a verified ONNX file."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from cli import console


def command(
    run: Annotated[Path, typer.Argument(help="Run directory with a finished search.")],
    out: Annotated[Path, typer.Option(help="The ONNX file to write.")],
    latency: Annotated[
        str | None, typer.Option(help="The best network inside this budget, as 2ms.")
    ] = None,
    slot: Annotated[
        int | None, typer.Option(help="Or this network: its number in report.json's front.")
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Export another network of a finished search, without searching again."""
    from nas.errors import UsageError

    budget = console.parse_latency(latency)
    if (budget is None) == (slot is None):
        raise UsageError("name the network", where="export", allowed="one of --latency or --slot")
    if not (run / "run.json").is_file():
        raise UsageError(f"no run in {run}", where="RUN", next="See the runs/ folder.")
    from cli import deliver
    from cli.search import resume

    with resume(run, budget) as (job, judge, candidates):
        content = deliver.export_one(job, judge, candidates, out, slot)
    if json:
        return console.emit_json(content)
    measured = content["measured"]
    latency_ms = measured["timing"]["median_ms"] if measured else content["latency_ms"]
    console.say(
        f"{out}: {content['accuracy']:.2%} on validation, {console.format_ms(latency_ms)} on "
        f"{job.device.name} ({'measured' if measured else 'estimate'}), "
        f"differs from torch by {content['parity_error']:.1e}"
    )
    return None
