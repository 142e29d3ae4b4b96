"""`nasctl ingest`: latencies that somebody else measured, as a table of a device."""

from __future__ import annotations

import os
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cli import console
from nas.errors import UsageError

if TYPE_CHECKING:
    from hw_profiles.device import Device
    from hw_profiles.ingest import Kernels
    from hw_profiles.latency import LatencyTable


class Format(StrEnum):
    """Of the file. `trtexec`: --exportLayerInfo, with --exportProfile beside it."""

    TABLE = "table"
    NN_METER = "nn-meter"
    TRTEXEC = "trtexec"


def command(
    file: Annotated[Path, typer.Argument(help="A latency table, or kernels that were timed.")],
    hw: Annotated[str, typer.Option(help="Device name or a .toml file.")],
    format: Annotated[Format, typer.Option(help="Whose file it is.")] = Format.TABLE,
    unit: Annotated[str | None, typer.Option(help="nn-meter: ms or us; no file says.")] = None,
    configs: Annotated[
        Path | None, typer.Option(help="nn-meter: the sampled configurations, if apart.")
    ] = None,
    profile: Annotated[
        Path | None, typer.Option(help="trtexec: the file of --exportProfile.")
    ] = None,
    sha256: Annotated[str, typer.Option(help="table: the fingerprint that its author gave.")] = "",
    out: Annotated[
        Path | None, typer.Option(help="Folder of the table. [$NASCTL_PROFILES, or profiles]")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace a table.")] = False,
    json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Take over a latency table, or kernels of nn-Meter or trtexec, as a device's table.

    What it says is somebody's word until `nasctl profile --validate` has held it against networks.
    """
    from hw_profiles import device as devices
    from hw_profiles import ingest

    board = devices.load(hw)
    folder = out or Path(os.environ.get("NASCTL_PROFILES", "profiles"))
    path = folder / f"{board.name}.table.json"
    if path.exists() and not force:
        raise UsageError(
            "there is a table already", where=str(path), next="Move it away, or use --force."
        )
    kernels = None
    if format is Format.TABLE:
        table = ingest.own(file, board, sha256=sha256)
    else:
        kernels = _kernels(file, format, board, unit, configs, profile)
        table = _table(kernels, board)
    folder.mkdir(parents=True, exist_ok=True)
    provenance = {**table.provenance, "ingested": f"{format.value} file {file.name}"}
    table = table.model_copy(update={"provenance": provenance})
    table.save(path)
    console.say(str(path), "table")
    console.say(ingest.fingerprint(table), "sha256")
    if kernels is not None:
        _tell(kernels)
    if json:
        console.emit_json({"table": str(path), "sha256": ingest.fingerprint(table)})


def _kernels(
    file: Path,
    format: Format,
    board: Device,
    unit: str | None,
    configs: Path | None,
    profile: Path | None,
) -> Kernels:
    from hw_profiles import ingest, trtexec

    if format is Format.NN_METER:
        if unit is None:
            raise UsageError("no nn-Meter file says its unit", where="--unit", allowed="ms, us")
        return ingest.nn_meter(file, unit=unit, configs=configs)
    if profile is None:
        raise UsageError(
            "the layers' times are in another file", where="--profile", allowed="--exportProfile"
        )
    return trtexec.kernels(file, profile, precision=board.precision)


def _table(kernels: Kernels, board: Device) -> LatencyTable:
    import numpy as np

    from hw_profiles import ingest

    return ingest.kernel_table(kernels, board, np.random.default_rng(0))


def _tell(kernels: Kernels) -> None:
    console.say(
        f"{len(kernels.found)} understood, {kernels.share:.0%} of the file's time", "kernels"
    )
    reasons: dict[str, list[Any]] = {}
    for layer in kernels.skipped:
        reasons.setdefault(layer.why, []).append(layer)
    for why, layers in reasons.items():
        console.say(f"{len(layers)} left out: {why}")
