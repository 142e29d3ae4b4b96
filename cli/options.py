"""Options that several verbs take, in the same words."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated

import typer

Data = Annotated[
    str | None,
    typer.Option(help="digits, an image folder, parquet, or my_pkg.my_mod:task. [digits]"),
]
Space = Annotated[str | None, typer.Option(help="See `nasctl spaces`. [resnet]")]
Width = Annotated[float | None, typer.Option(help="Scale of the space's channels.")]
Size = Annotated[int | None, typer.Option(help="Resize images to this many pixels.")]
Epochs = Annotated[float | None, typer.Option(help="Of supernet training.")]
Batch = Annotated[int | None, typer.Option(help="Images per step, over all processes. [128]")]
Rate = Annotated[float | None, typer.Option(help="Peak learning rate per network of a step. [0.2]")]
Seed = Annotated[int | None, typer.Option(help="Of everything random. [0]")]
TrainOn = Annotated[
    str | None, typer.Option(help="Where networks are trained: cpu, cuda, cuda:1. [cpu]")
]
Weights = Annotated[
    Path | None, typer.Option(help="The .safetensors of a network that build() makes.")
]
OwnData = Annotated[
    str | None, typer.Option(help="Of a model of your own: a folder or my_pkg.my_mod:task.")
]
Tasks = Annotated[str | None, typer.Option(help="Some of the data's tasks. [all]")]
Spec = Annotated[Path | None, typer.Option(help="TOML file of these options.")]
Run = Annotated[Path | None, typer.Option(help="Run directory. [runs/...]")]
Quick = Annotated[bool, typer.Option("--quick", help="A fifth of the training: a try-out.")]
Force = Annotated[bool, typer.Option("--force", help="Start over.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Print the plan and a time estimate.")]
Json = Annotated[bool, typer.Option("--json", help="Print the outcome as JSON.")]
Licence = Annotated[
    str | None,
    typer.Option(help="Of the weights, SPDX identifier or text: goes into file and bundle."),
]


def refuse(flags: Mapping[str, object], why: str) -> None:
    """Raises UsageError naming the first flag that was given."""
    from nas.errors import UsageError

    for flag, value in flags.items():
        if value is not None:
            raise UsageError(why, where=flag, next="Leave it out.")


def parse_licence(text: str | None) -> str:
    """ "" where nobody stated one."""
    if text is None:
        return ""
    from nas.errors import UsageError
    from nas.run import LONGEST_LICENCE

    if not text.strip() or not text.isprintable() or len(text) > LONGEST_LICENCE:
        raise UsageError(
            f"'{text:.40}'",
            where="--licence",
            allowed=f"one line of up to {LONGEST_LICENCE} characters, as Apache-2.0",
        )
    return text.strip()
