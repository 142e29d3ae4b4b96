"""`nasctl spaces`: the search spaces and their sizes."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from cli import console


def command(
    size: Annotated[int, typer.Option(min=4, help="Image size in pixels.")] = 32,
    channels: Annotated[int, typer.Option(min=1, help="Image channels.")] = 3,
    classes: Annotated[int, typer.Option(min=2, help="Number of classes.")] = 10,
    json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """List the search spaces with their size and range for the given images."""
    rows = [describe(name, size, channels, classes) for name in _names()]
    if json:
        return console.emit_json(rows)
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    for title in ("space", "networks", "MMACs", "k params", "summary"):
        table.add_column(title)
    for row in rows:
        table.add_row(
            row["name"],
            f"{row['networks']:.3g}",
            f"{row['macs'][0] / 1e6:.3g} .. {row['macs'][1] / 1e6:.3g}",
            f"{row['params'][0] / 1e3:.3g} .. {row['params'][1] / 1e3:.3g}",
            row["summary"],
        )
    console.show(table)
    return None


def _names() -> list[str]:
    from nas import space

    return space.names()


def describe(name: str, size: int, channels: int, classes: int) -> dict[str, Any]:
    """One row: the space's size and the cost of its smallest and largest network."""
    import sys

    from hw_profiles import op
    from nas import space

    found = space.load(name, channels=channels, classes=classes, size=size)
    ends = [found.ops(found.decode(genes)) for genes in (found.smallest, found.largest)]
    doc = sys.modules[type(found).__module__].__doc__ or ""
    return {
        "name": name,
        "networks": found.count(),
        "macs": [op.macs(ops) for ops in ends],
        "params": [op.params(ops) for ops in ends],
        "genes": {gene.name: list(gene.options) for gene in found.genes},
        "summary": doc.strip().splitlines()[0],
    }
