"""`nasctl doctor`: what is installed, which devices are usable, what to do about the rest."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from cli import console
from nas.errors import NasctlError

REQUIRED = ("torch", "onnx", "onnxruntime", "optuna", "numpy", "safetensors", "scikit-learn")

NEVER_RUN = ("aoti_cuda", "onnxruntime_cuda", "tensorrt", "torch_cuda")  # by those who wrote them


def command(
    json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Check the installation and say what to do about what is missing."""
    rows = [*_packages(), *_machine(), *_runtimes(), *_devices()]
    if json:
        console.emit_json(rows)
    else:
        from rich.table import Table

        table = Table(box=None, pad_edge=False, show_header=False)
        for row in rows:
            mark = {True: "[green]ok[/]", False: "[red]missing[/]", None: "[yellow]note[/]"}
            table.add_row(mark[row["ok"]], row["what"], row["detail"])
        console.show(table)
    if any(row["ok"] is False for row in rows):
        raise typer.Exit(1)


def _packages() -> list[dict[str, Any]]:
    rows = []
    for name in REQUIRED:
        found = _version(name)
        detail = found or "pip install -c constraints.txt -e ."
        rows.append({"ok": found is not None, "what": name, "detail": detail})
    return rows


def _version(name: str) -> str | None:
    from importlib import metadata

    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _machine() -> list[dict[str, Any]]:
    import psutil

    cores = psutil.cpu_count(logical=False) or psutil.cpu_count()
    memory = psutil.virtual_memory()
    rows = [
        {
            "ok": True,
            "what": "this machine",
            "detail": f"{cores} cores, {memory.total / 2**30:.0f} GiB of memory",
        }
    ]
    load = psutil.getloadavg()[0]
    if load > (cores or 1) / 2:
        detail = f"load {load:.1f}: latencies measured now would be unreliable"
        rows.append({"ok": None, "what": "busy", "detail": detail})
    return rows


def _runtimes() -> list[dict[str, Any]]:
    """Each with its version, or with what is missing: none is needed but ONNX Runtime, above."""
    from hw_profiles import runtimes

    rows = []
    for name in runtimes.names():
        runtime = runtimes.load_module(name)
        missing = runtime.unavailable()
        detail = missing or runtime.version()
        rows.append({"ok": None if missing else True, "what": f"runtime {name}", "detail": detail})
    untried = ", ".join(name for name in runtimes.names() if name in NEVER_RUN)
    detail = f"{untried}: our code for them never ran on a GPU; verify what it builds"
    rows.append({"ok": None, "what": "engines", "detail": detail})
    return rows


def _devices() -> list[dict[str, Any]]:
    from cli.devices import latency_source
    from hw_profiles import device

    rows = []
    for name in device.names():
        try:
            found = device.load(name)
        except NasctlError as error:
            rows.append({"ok": False, "what": f"--hw {name}", "detail": str(error)})
            continue
        ok, detail = (True, "") if found.local else (None, "; the file is not run on the board")
        detail = f"latencies: {latency_source(found)}{detail}"
        rows.append({"ok": ok, "what": f"--hw {name}", "detail": detail})
    return rows
