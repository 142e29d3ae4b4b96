"""AOTInductor: a torch network compiled ahead of time into a package (.pt2) of native code.

Shared by `aoti` (the processor) and `aoti_cuda`. A package is a shared library that runs when it is
loaded: load only those you built. It is compiled for the sizes of its inputs, free dimensions being
1, and for a number of threads; both are written into it.
"""

from __future__ import annotations

import json
import os
import tempfile
import warnings
import zipfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from hw_profiles.runtimes import Session, _torch_graph, fitting, obeyed, short, summary, where
from nas.errors import NasctlError

if TYPE_CHECKING:
    from hw_profiles.runtimes import Feeds

SUFFIX = ".pt2"
NOTE = "nasctl"  # our entry in the package's metadata


@dataclass(frozen=True)
class Package:
    """A loaded package and what it was built for."""

    loader: Any  # torch's; its Python wrapper parses JSON in every call, so it is not used
    threads: int
    precision: str

    def __call__(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        return tuple(self.loader.boxed_run(list(inputs)))


def build(
    model: bytes | Path, path: Path, *, device: str, threads: int, precision: str | None
) -> Path:
    """Write the package of an ONNX model to `path`, whole or not at all; tens of seconds."""
    if path.suffix != SUFFIX:
        raise NasctlError("a package's name must end in .pt2", where=str(path))
    net = _torch_graph.read(model, precision).to(device)
    sizes = {name: [n if isinstance(n, int) else 1 for n in s] for name, s in net.inputs.items()}
    inputs = tuple(
        torch.zeros(size, dtype=net.integers.get(name, net.dtype), device=device)
        for name, size in sizes.items()
    )
    note = {
        "device": device,
        "threads": threads,
        "precision": summary(net.precisions()),
        "inputs": sizes,
        "integers": {name: str(kind).split(".")[1] for name, kind in net.integers.items()},
        "outputs": net.outputs,
    }
    settings = {"aot_inductor.metadata": {NOTE: json.dumps(note)}, "cpp.threads": threads}
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent) as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # all of them torch's, about its own internals
        whole = Path(folder) / path.name
        try:
            program = torch.export.export(net, inputs)
            torch._inductor.aoti_compile_and_package(
                program, package_path=str(whole), inductor_configs=settings
            )
        except RuntimeError as error:  # of the compiler, too
            raise NasctlError(
                f"torch cannot compile it ({short(error)})", where=where(model)
            ) from error
        os.replace(whole, path)
    return path


def load(model: bytes | Path, *, device: str, threads: int, precision: str | None) -> Session:
    """A session over a package, or over an ONNX model, which is then compiled first."""
    if isinstance(model, Path) and model.suffix == SUFFIX:
        return _opened(model, device, threads, precision)
    with tempfile.TemporaryDirectory() as folder:
        made = Path(folder) / f"model{SUFFIX}"
        build(model, made, device=device, threads=threads, precision=precision)
        return replace(_opened(made, device, threads, precision), where=where(model))


def _opened(path: Path, device: str, threads: int, precision: str | None) -> Session:
    note = _note(path)
    if (note["device"], note["threads"]) != (device, threads):
        raise NasctlError(
            f"was built for {note['threads']} thread(s) on {note['device']}, "
            f"not for {threads} on {device}",
            where=str(path),
        )
    obeyed(precision, note["precision"], str(path))
    try:
        # one runner: several would add locks, which a CUDA graph cannot capture
        loader = torch._inductor.aoti_load_package(str(path), run_single_threaded=True).loader
    except RuntimeError as error:
        raise NasctlError(f"torch cannot load it ({short(error)})", where=str(path)) from error
    return Session(
        Package(loader, threads, note["precision"]),
        str(path),
        {name: tuple(size) for name, size in note["inputs"].items()},
        tuple(note["outputs"]),
        note.get("integers", {}),  # packages of earlier versions have none
    )


def _note(path: Path) -> dict[str, Any]:
    """What `build` wrote into a package, read before any of its code is loaded."""
    where(path)
    try:
        with zipfile.ZipFile(path) as archive:
            names = [name for name in archive.namelist() if name.endswith("_metadata.json")]
            found = [json.loads(archive.read(name)) for name in names]
        return json.loads(next(entry[NOTE] for entry in found if NOTE in entry))
    except (zipfile.BadZipFile, ValueError, StopIteration) as error:
        raise NasctlError(
            "is no package that nasctl built, or a damaged one", where=str(path)
        ) from error


def inputs_of(session: Session, feeds: Feeds, device: str) -> tuple[Tensor, ...]:
    """The feeds as the package's positional inputs. Raises NasctlError when they do not fit."""
    fitting(session.inputs, feeds, session.where)
    floats = _torch_graph.DTYPES[session.inner.precision]
    kinds = [getattr(torch, session.dtypes.get(name, ""), floats) for name in session.inputs]
    given = (torch.from_numpy(feeds[name]) for name in session.inputs)
    return tuple(x.to(device, kind) for x, kind in zip(given, kinds))
