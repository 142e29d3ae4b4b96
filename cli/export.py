"""`nasctl export`: a network of a finished search as an ONNX file, or anybody's as a bundle."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from cli import console, options

if TYPE_CHECKING:
    from cli.exporting import Asked


def command(
    model: Annotated[
        str, typer.Argument(metavar="MODEL", help="A run with a search, or my_pkg.my_mod:build.")
    ],
    out: Annotated[
        Path, typer.Option(help="The ONNX file; of a model of your own, the bundle's new folder.")
    ],
    latency: Annotated[
        str | None, typer.Option(help="Of a run: the best network inside this budget, as 2ms.")
    ] = None,
    slot: Annotated[
        int | None, typer.Option(help="Or this network: its number in report.json's front.")
    ] = None,
    weights: options.Weights = None,
    data: options.OwnData = None,
    size: options.Size = None,
    tasks: options.Tasks = None,
    inputs: Annotated[
        list[str] | None,
        typer.Option("--input", help="Without data, each input: image:batch,3,height=64,width=64."),
    ] = None,
    hw: Annotated[
        str | None, typer.Option(help="Device that engines will be built for. [cpu]")
    ] = None,
    licence: options.Licence = None,
    json: options.Json = False,
) -> None:
    """Export another network of a finished search without searching again, or a network of your
    own as a bundle that `quantize`, `build` and `verify` take.

    With its data a bundle can be quantized and judged; without, it can be built and verified.
    """
    from nas.data import module

    of_run = {"--latency": latency, "--slot": slot}
    own: dict[str, object] = {
        "--weights": weights,
        "--data": data,
        "--size": size,
        "--tasks": tasks,
    }
    own |= {"--input": inputs, "--hw": hw, "--licence": licence}
    if not module.is_reference(model):
        options.refuse(own, "is for a model of your own")
        return _of_run(Path(model), out, latency, slot, json)
    options.refuse(of_run, "is about a run's networks")
    stated = options.parse_licence(licence)
    from cli import exporting
    from hw_profiles import device

    wanted = [name.strip() for name in tasks.split(",")] if tasks else []
    board = device.load(hw or "cpu")
    asked = exporting.Asked(model, weights, data, size, wanted, inputs or [], stated, board)
    return _own(asked, out, json)


def _of_run(run: Path, out: Path, latency: str | None, slot: int | None, json: bool) -> None:
    from nas.errors import UsageError

    budget = console.parse_latency(latency)
    if (budget is None) == (slot is None):
        raise UsageError("name the network", where="export", allowed="one of --latency or --slot")
    if not (run / "run.json").is_file():
        raise UsageError(
            f"no run in {run}", where="RUN", allowed="a run's folder, my_pkg.my_mod:build"
        )
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


def _own(asked: Asked, out: Path, json: bool) -> None:
    from cli import exporting

    job = exporting.prepare(asked)
    bundle, error = exporting.export(job, out)
    if json:
        shapes = {port.name: port.dimensions for port in job.ports}
        content = {"bundle": str(out), "inputs": shapes, "parity": error, "licence": asked.licence}
        return console.emit_json(content)
    for port in job.ports:
        console.say(f"{port.name}: {' x '.join(map(str, port.dimensions))}, {port.type}", "input")
    console.say(f"differs from torch by {error:.1e}", "output")
    if job.interface is None:
        console.say("no data: it can be built and verified, not quantized or judged", "note")
    console.say(str(bundle.model), "file")
    return None
