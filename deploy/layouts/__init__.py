"""Layouts: a bundle's model as other systems want to find it, one file per layout.

Each gives `write(model, interface, folder) -> paths`: the files it made of an ONNX file in an
existing, empty folder; the interface is None where the model was exported without data. A layout
is a copy for somebody else; the bundle stays what is verified.
"""

from __future__ import annotations

import importlib
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol, cast

from deploy.interface import Interface
from nas.errors import NasctlError, unknown


class Layout(Protocol):
    def write(self, model: Path, interface: Interface | None, folder: Path) -> Sequence[Path]: ...


def names() -> list[str]:
    return sorted(
        path.stem for path in Path(__file__).parent.glob("*.py") if not path.stem.startswith("_")
    )


def load(name: str) -> Layout:
    """The layout of that name. Raises UsageError with the known names for any other."""
    if name not in names():
        raise unknown("layout", name, names(), where="--layout")
    return cast(Layout, importlib.import_module(f"deploy.layouts.{name}"))


def written(name: str, model: Path, interface: Interface | None, folder: Path) -> list[Path]:
    """A layout of `model` in a new `folder`, whole or not at all; returns its files."""
    if folder.exists():
        raise NasctlError("exists already", where=str(folder), next="Name a new folder.")
    layout = load(name)
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent) as made:
            whole = Path(made) / "layout"
            whole.mkdir()
            found = [path.relative_to(whole) for path in layout.write(model, interface, whole)]
            shutil.move(whole, folder)
    except OSError as error:
        raise NasctlError(f"cannot write: {error.strerror}", where=str(folder)) from error
    return [folder / path for path in found]
