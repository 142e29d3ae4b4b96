"""`nasctl quantize`: INT8, or half precision, where it is faster and costs no more accuracy than
allowed."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from cli import console, options


def command(
    model: Annotated[Path, typer.Argument(help="A bundle (folder or run), with its float file.")],
    max_drop: Annotated[
        str, typer.Option(help="Bound per task, relative: 1%, or seg=1%,edge=2%.")
    ] = "1%",
    data: Annotated[str | None, typer.Option(help="The model's data. [where they were]")] = None,
    forms: Annotated[
        str, typer.Option(help="What is tried: int8, fp16, bf16, or several of them.")
    ] = "int8",
    hw: Annotated[str, typer.Option(help="Device name or a .toml file.")] = "cpu",
    on: Annotated[str, typer.Option(help="local, or ssh://[user@]host[:port].")] = "local",
    calibration: Annotated[str, typer.Option(help="minmax, entropy or percentile.")] = "minmax",
    images: Annotated[int, typer.Option(min=1, help="Training images to calibrate with.")] = 256,
    seed: Annotated[int, typer.Option(min=0, help="Of the images and the halves.")] = 0,
    json: options.Json = False,
) -> None:
    """Quantize a bundle's model for a device, and deliver the fastest file inside the bound.

    Where INT8 costs too much, the most sensitive operators stay in float; where it is slower, all
    of the model does. Calibrated on training images, guarded on one half of the validation images
    and told for the other; test images are not read.
    """
    from cli import bundling, quantizing
    from hw_profiles import device

    board = device.load(hw)
    named = tuple(dict.fromkeys(name.strip() for name in forms.split(",")))
    asked = quantizing.Asked(board, on, max_drop, calibration, images, seed, named)
    with bundling.opened(model, changes=True) as bundle:
        content = quantizing.quantize(quantizing.prepare(bundle, asked, data))
        if json:
            return console.emit_json(content)
        return quantizing.say_outcome(content, bundle.folder)
