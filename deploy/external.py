"""Weights that an ONNX file keeps in other files: where, and nowhere but in its own folder.

Neither torch nor a runtime is imported, and no weights are read.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nas.errors import NasctlError

if TYPE_CHECKING:
    import onnx


def opened(path: Path) -> onnx.ModelProto:
    """The model in `path`, without the weights that are in other files. Raises NasctlError for
    what is no ONNX file."""
    import onnx
    from google.protobuf.message import DecodeError

    try:
        return onnx.load(path, load_external_data=False)
    except OSError as error:
        raise NasctlError(f"cannot read: {error.strerror}", where=str(path)) from error
    except DecodeError as error:
        raise NasctlError("is no ONNX file, or a damaged one", where=str(path)) from error


def externals(model: onnx.ModelProto, path: Path) -> list[Path]:
    """The files beside `path` that hold a model's weights. Raises NasctlError for any elsewhere."""
    from onnx.external_data_helper import uses_external_data

    found: set[str] = set()
    for tensor in _tensors(model):
        if uses_external_data(tensor):
            # readers differ in which one they take where there are several
            said = {entry.value for entry in tensor.external_data if entry.key == "location"}
            found |= said or {""}
    for name in found:
        if name in ("", "..") or Path(name).name != name or "\\" in name:
            raise NasctlError(
                f"wants weights from '{name}'",
                where=str(path),
                allowed="files in its own folder",
                next="A file that reaches outside its folder may be an attack: do not load it.",
            )
    return [path.parent / name for name in sorted(found)]


def beside(path: Path) -> list[Path]:
    """The files that hold weights of the model in `path`, which may be none; reads no weights.

    Raises NasctlError for what is no ONNX file and for weights that are elsewhere.
    """
    return externals(opened(path), path)


def require(path: Path, listed: Collection[Path]) -> None:
    """Raises NasctlError where the model in `path` has weights in a file that is not listed, and
    so could be another one unseen."""
    for held in beside(path):
        if held not in listed:
            raise NasctlError(
                f"its weights are in {held.name}, which the bundle does not list",
                where=str(path),
                next="Get or export the bundle again.",
            )


def _tensors(message: Any) -> Iterator[onnx.TensorProto]:
    """Every tensor inside a message: weights, values of nodes, those of subgraphs and functions."""
    from google.protobuf.message import Message
    from onnx import TensorProto

    for field, value in message.ListFields():
        if field.message_type is None:
            continue
        for each in [value] if isinstance(value, Message) else value:
            if isinstance(each, TensorProto):
                yield each
            else:
                yield from _tensors(each)
