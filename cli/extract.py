"""`nasctl extract`: one network of a trained supernet as weights of its own."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from cli import console


def command(
    run: Annotated[Path, typer.Argument(help="Run directory with a trained supernet.")],
    arch: Annotated[
        str,
        typer.Option(help="largest, smallest, or JSON with genes: text, or a file as arch.json."),
    ],
    out: Annotated[Path, typer.Option(help="The safetensors file to write.")] = Path(
        "model.safetensors"
    ),
    json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Cut a network out of a supernet: its slice of the weights, batch norms re-calibrated.

    Its architecture is written beside it as OUT.json. For an ONNX file, see `nasctl export`.
    """
    from json import dumps

    from cli import child, training
    from nas import checkpoint, file
    from nas.errors import UsageError

    if out.suffix != ".safetensors":
        raise UsageError(f"'{out}'", where="--out", allowed="a name ending in .safetensors")
    opened = training.opened(run)
    genes = child.genes_of(opened.space, arch)
    net, error = child.cut(opened, training.finished_supernet(opened), genes)
    description = child.describe(opened, genes)
    checkpoint.write_described(out, net, description)
    content = {
        **description["network"],
        **child.cost(opened.space, genes),
        "weights": file.record(out),
        "supernet": description["supernet"],
        "differs_from_supernet": error,
    }
    beside = out.with_suffix(".json")
    file.write(beside, (dumps(content, indent=1) + "\n").encode())
    if json:
        return console.emit_json(content)
    console.say(f"{out}, {content['weights']['bytes'] / 1e6:.2f} MB; {beside}", "file")
    console.say(
        f"{content['macs'] / 1e6:.2f} MMACs, {content['params'] / 1e3:.0f} k parameters; its "
        f"outputs differ from the supernet's own by {error:.1e} of the largest"
    )
    console.say(f"nasctl evaluate {out}", "next")
    return None
