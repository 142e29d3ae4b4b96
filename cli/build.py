"""`nasctl build`: a bundle's model as an engine of this machine."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from cli import console, options
from nas.errors import UsageError


def command(
    model: Annotated[Path, typer.Argument(metavar="BUNDLE", help="A bundle, or a run's folder.")],
    hw: Annotated[str | None, typer.Option(help="Device name or a .toml file. [cpu]")] = None,
    engine: Annotated[
        str | None, typer.Option(help="ort, openvino, aoti or tensorrt. [the device's runtime]")
    ] = None,
    member: Annotated[str | None, typer.Option(help="ONNX file. [the delivered one]")] = None,
    precision: Annotated[
        str | None, typer.Option(help="[the device's, of the float file; else as the file is]")
    ] = None,
    threads: Annotated[int | None, typer.Option(min=1, help="Of the processor. [1]")] = None,
    on: Annotated[
        str | None, typer.Option(help="local, or ssh://[user@]host[:port]. [local]")
    ] = None,
    compatible: Annotated[
        str | None,
        typer.Option(
            help="tensorrt: version (later ones too), hardware (GPUs from Ampere on, not Jetson)."
        ),
    ] = None,
    sizes: Annotated[
        str | None,
        typer.Option(help="tensorrt: of free dimensions, as batch=1:8:32. [of one example]"),
    ] = None,
    layout: Annotated[
        str | None, typer.Option(help="Instead, as others want it: triton, mobile or openvino.")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Of a layout: a new folder.")] = None,
    commands: Annotated[
        bool, typer.Option("--commands", help="Print the command of NVIDIA's trtexec instead.")
    ] = False,
    json: options.Json = False,
) -> None:
    """Build a model's engine, measure it and put both into the bundle.

    The engine belongs to this machine and its library versions; its side-car says to which, and
    what it was observed to compute in. Built where it will run: here, or --on a board over ssh.
    """
    from cli import building, bundling
    from deploy import sizes as free_sizes
    from hw_profiles import device

    here: dict[str, object] = {"--engine": engine, "--threads": threads, "--on": on}
    of_engine = {"--hw": hw, "--precision": precision, **here}
    of_engine |= {"--compatible": compatible, "--sizes": sizes}
    if commands:
        words = {"--layout": layout, "--out": out, **here}
        options.refuse(words, "changes nothing of trtexec's command (--commands)")
        bundling.require_folder(model, "trtexec reads no archive (--commands)")
    if (layout is None) != (out is None):
        raise UsageError("a layout and its folder go together", where="--layout, --out")
    if layout is not None:
        options.refuse(of_engine, "is about an engine, a layout is none")
    board, on = device.load(hw or "cpu"), on or "local"
    with bundling.opened(model, changes=not commands and layout is None) as bundle:
        asked = building.Asked(
            board,
            engine,
            member,
            precision,
            threads or 1,
            on,
            building.parse_compatible(compatible),
            free_sizes.parse(sizes),
        )
        if commands:
            return print(building.trtexec(bundle, asked))
        if layout is not None and out is not None:
            paths = building.laid_out(bundle, member, layout, out)
            return console.emit_json(paths) if json else console.say("\n".join(paths), "files")
        car = building.build(bundle, asked)
    if json:
        return console.emit_json(car.model_dump())
    assert car.latency is not None
    where = "here" if on == "local" else f"at {on}"
    console.say(f"{car.runtime} {car.version}, {car.bytes / 1e6:.2f} MB", "engine")
    why = f", as {board.name} states" if car.requested and precision is None else ""
    said = f"asked for: {car.requested or 'as the file is'}{why}"
    console.say(f"{car.observed} ({said})", "computes in")
    for one in car.compatible:
        console.say(building.MEANS[one], "also in")
    for name, (low, usual, high) in car.shapes.items():
        each = ["x".join(map(str, shape)) for shape in (low, usual, high)]
        if low != high:
            console.say(f"{name} {each[0]} to {each[2]}, best at {each[1]}", "shapes")
    console.say(
        f"median {console.format_ms(car.latency['median_ms'])}, measured {where}", "latency"
    )
    return None
