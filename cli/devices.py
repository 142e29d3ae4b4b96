"""`nasctl devices`: what can be searched for, and where its numbers come from."""

from __future__ import annotations

from typing import Annotated

import typer

from cli import console


def command(
    json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """List the devices and the source of each one's latency."""
    from hw_profiles import device, latency

    rows = []
    for name in device.names():
        found = device.load(name)
        source = "measured on first use" if found.local else latency.table(found).source
        rows.append({"source": source, **found.model_dump()})
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
