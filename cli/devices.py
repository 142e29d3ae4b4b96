"""`nasctl devices`: what can be searched for, and where its numbers come from."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from cli import console
from nas.errors import NasctlError

if TYPE_CHECKING:
    from hw_profiles.device import Device


def latency_source(found: Device) -> str:
    """Where a device's latencies come from, in a few words."""
    from hw_profiles import latency

    if found.local:
        return "measured on first use"
    try:
        return latency.table(found).source
    except NasctlError:
        return "none: measure it first"


def command(
    json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """List the devices and the source of each one's latency."""
    from hw_profiles import device

    rows = []
    for name in device.names():
        try:
            found = device.load(name)
        except NasctlError as error:  # a user's own file: the others are still worth listing
            console.say(str(error))
            continue
        rows.append({"source": latency_source(found), **found.model_dump()})
    if json:
        return console.emit_json(rows)
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    for title in ("device", "runtime", "precision", "latency source", "summary"):
        table.add_column(title)
    for row in rows:
        name = ", ".join([row["name"], *row["aliases"]])
        table.add_row(name, row["runtime"], row["precision"], row["source"], row["summary"])
    console.show(table)
    return None
