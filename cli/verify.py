"""`nasctl verify`: does the delivered file keep what was promised?"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from cli import console, options


def command(
    model: Annotated[Path, typer.Argument(help="A run, a bundle's folder or its .zip.")],
    engine: Annotated[
        str | None, typer.Option(help="Also this engine of the bundle: native code, loaded.")
    ] = None,
    hw: Annotated[str, typer.Option(help="Device name or a .toml file.")] = "cpu",
    latency: Annotated[str | None, typer.Option(help="Budget, as 5ms. [the run's]")] = None,
    memory: Annotated[str | None, typer.Option(help="Budget of the process, as 80MB.")] = None,
    data: Annotated[str | None, typer.Option(help="The model's data. [where they were]")] = None,
    split: Annotated[str, typer.Option(help="val, or test: once, at the end.")] = "val",
    out: Annotated[Path | None, typer.Option(help="The report. [verify.json beside it]")] = None,
    json: options.Json = False,
) -> None:
    """Verify a bundle: its files, that every form of the network computes the same, its metric on
    the delivered file, and its measured latency and memory against the budget.

    Exit codes: 1 a budget that was typed could not be checked, 4 a budget or the accuracy bound of
    `nasctl quantize` is missed, 5 the forms differ or a metric is a number of the float file only.
    """
    from cli import bundling, verdict, verifying
    from hw_profiles import device

    board = device.load(hw)
    with bundling.opened(model) as bundle:
        asked = verifying.Asked(
            board, engine, console.parse_latency(latency), _bytes(memory), data, split
        )
        content = verifying.verify(bundle, model, asked)
    place = out or verdict.beside(model)
    verdict.write(content, place)
    if json:
        console.emit_json(verdict.strict(content))
    else:
        verdict.say_outcome(content, place)
    verdict.require(content, asked, str(place))


def _bytes(text: str | None) -> float | None:
    from cli import budgets

    return budgets.parse(text, budgets.MEMORY, "--memory")
