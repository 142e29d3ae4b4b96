"""From the files of a finished run to its bundle, and from what people name to a bundle."""

from __future__ import annotations

import contextlib
import json
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import torch

from deploy import bundle, external, interface, onnx, recipes, sizes
from deploy.bundle import Bundle, Role
from deploy.interface import Interface
from hw_profiles.device import Device
from nas import file
from nas.elastic import resize
from nas.errors import NasctlError, UsageError

FOLDER, FLOAT, ARCH, REPORT = "bundle", "model.onnx", "arch.json", "report.json"
INPUTS = "inputs.safetensors"  # made up, where a bundle has no data: to compare its files with
SAMPLES = 64  # images in the bundle, of training data

Feeds = Mapping[str, np.ndarray]  # input name -> [N, ...]


@dataclass(frozen=True)
class Contents:
    """What a run knows of the model that it delivers."""

    interface: Interface | None  # None: nobody said what data it is for
    arch: Any  # what builds the network, as JSON has it
    report: dict[str, Any]
    sample: Feeds  # of training data, as the file is fed; made up where there is no interface
    device: Device
    latency_table: str = ""  # sha256
    licence: str = ""
    also: dict[str, Role] | None = None  # further files that are in the folder already


def seal(folder: Path, contents: Contents) -> Bundle:
    """The bundle of a folder that holds the float file."""
    sample = interface.sample(contents.sample)
    shapes = free_shapes(folder / FLOAT, contents.sample)
    parts: dict[str, tuple[Role, bytes]] = {
        ARCH: ("arch", _json(contents.arch)),
        recipes.NAME: ("recipes", _json(recipes.of(contents.device, shapes))),
        REPORT: ("report", _json(contents.report)),
    }
    if contents.interface is None:
        parts[INPUTS] = ("inputs", sample)
    else:
        parts[interface.NAME] = ("task", contents.interface.to_json())
        parts[interface.SAMPLE] = ("calibration", sample)
    for name, (_, content) in parts.items():
        file.write(folder / name, content)
    roles: dict[str, Role] = {FLOAT: "model", **(contents.also or {})}
    roles |= {name: role for name, (role, _) in parts.items()}
    for name in [name for name, role in roles.items() if role == "model"]:
        roles |= {path.name: "weights" for path in external.beside(folder / name)}
    return bundle.seal(
        folder,
        roles,
        nasctl=metadata.version("nasctl"),
        model=FLOAT,
        latency_table=contents.latency_table,
        licence=contents.licence,
    )


def free_shapes(model: Path, sample: Feeds, asked: sizes.Sizes | None = None) -> sizes.Shapes:
    """What an engine of the file is to serve, of its inputs with a free dimension: what was asked
    for, else one example as it is in the sample."""
    examples = {name: values.shape[1:] for name, values in sample.items()}
    return sizes.shapes(onnx.inputs(model), examples, asked or {})


def sample(of: Interface, images: torch.Tensor) -> Feeds:
    """Some training images, uint8 [N, C, H, W], as the file is fed."""
    return {of.input: fed(of, images[:SAMPLES]).numpy()}


def fed(of: Interface, images: torch.Tensor) -> torch.Tensor:
    """Images of 0 to 255 [N, C, H, W] as the file takes them, on any size of theirs."""
    from nas.data.moments import normalised

    found = normalised(images, (of.mean, of.std))
    return found if found.shape[2:] == of.shape[1:] else resize(found, of.shape[2])


@contextlib.contextmanager
def opened(path: Path, *, changes: bool = False) -> Iterator[Bundle]:
    """The verified bundle that a run's folder, a bundle's or an archive names; an archive is
    unfolded for as long as it is used, so it is no place for `changes`. Raises NasctlError for
    anything else."""
    if path.name in ("", ".."):  # "." has no name, and its parent is itself
        path = path.resolve()
    if changes:
        require_folder(path, "an archive cannot be added to")
    if path.suffix == ".zip":
        with tempfile.TemporaryDirectory() as folder:
            yield bundle.unpack(path, Path(folder) / FOLDER)
        return
    if (path / FOLDER / bundle.MANIFEST).is_file():
        path /= FOLDER
    yield bundle.read(path)


def require_folder(path: Path, why: str) -> None:
    """Raises UsageError for an archive."""
    if path.suffix == ".zip":
        raise UsageError(
            why,
            where=str(path),
            next=f"Unpack it first: python -m zipfile -e {path.name} FOLDER",
        )


def interface_of(found: Bundle) -> Interface:
    """Raises NasctlError for a bundle without one."""
    if not (names := found.of("task")):
        raise NasctlError(
            "was exported without data, so there is nothing to calibrate or to judge it with",
            where=str(found.folder),
            next="Export it again with --data: my_pkg.my_mod:task, or a folder.",
        )
    return interface.read(found.path(names[0]))


def sample_of(found: Bundle) -> dict[str, np.ndarray]:
    """The inputs that a bundle carries, by name [N, ...], of its data or made up. Raises
    NasctlError for a bundle without any, and for what is none of its model's."""
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    names = [*found.of("calibration"), *found.of("inputs")]
    if not names:
        raise NasctlError("has no inputs to run it on", where=str(found.folder))
    path, wanted = found.path(names[0]), onnx.inputs(found.onnx(FLOAT))
    try:
        values = load_file(path)
    except (SafetensorError, KeyError) as error:  # a KeyError: of a type that numpy lacks
        raise NasctlError(f"no inputs to run it on ({error})", where=str(path)) from error
    if values.keys() != wanted.keys() or not all(
        array.size and array.ndim == len(wanted[name]) for name, array in values.items()
    ):
        given = ", ".join(f"{name} {list(array.shape)}" for name, array in values.items())
        raise NasctlError(
            f"holds {given or 'nothing'}, its model takes {', '.join(wanted)}", where=str(path)
        )
    return values


def _json(value: Any) -> bytes:
    return (json.dumps(value, indent=1) + "\n").encode()
