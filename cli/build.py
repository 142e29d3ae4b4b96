"""`nasctl build`: a bundle's model as an engine of this machine."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from cli import console, options


def command(
    model: Annotated[Path, typer.Argument(metavar="BUNDLE", help="A bundle, or a run's folder.")],
    hw: Annotated[str, typer.Option(help="Device name or a .toml file; this machine.")] = "cpu",
    engine: Annotated[
        str | None, typer.Option(help="ort, openvino, aoti or tensorrt. [the device's runtime]")
    ] = None,
    member: Annotated[str | None, typer.Option(help="ONNX file. [the delivered one]")] = None,
    precision: Annotated[str | None, typer.Option(help="[as the file is]")] = None,
    threads: Annotated[int, typer.Option(min=1, help="Of the processor.")] = 1,
    commands: Annotated[
        bool, typer.Option("--commands", help="Print the command of NVIDIA's trtexec instead.")
    ] = False,
    json: options.Json = False,
) -> None:
    """Build a model's engine, measure it and put both into the bundle.

    The engine belongs to this machine and its library versions; its side-car says to which, and
    what it was observed to compute in. To be run on the machine that the engine is for.
    """
    from cli import building, bundling
    from hw_profiles import device

    board = device.load(hw)
    with bundling.opened(model, changes=not commands) as bundle:
        if commands:
            return print(building.trtexec(bundle, member))
        car = building.build(bundle, board, engine, member, precision, threads)
    if json:
        return console.emit_json(car.model_dump())
    assert car.latency is not None
    console.say(f"{car.runtime} {car.version}, {car.bytes / 1e6:.2f} MB", "engine")
    console.say(f"{car.observed} (asked for: {car.requested or 'as the file is'})", "computes in")
    console.say(f"median {console.format_ms(car.latency['median_ms'])}, measured here", "latency")
    return None
