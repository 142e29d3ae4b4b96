"""ONNX Runtime's own format for phones and browsers (its mobile and web packages): model.ort.

The style is what the library calls Runtime: what holds on every processor is optimised now, what
depends on the processor is written down and applied where the file is loaded. An engine (`nasctl
build --engine ort`) is of the style Fixed instead: optimised for this processor and no other.
Layout transformations of this processor are left out of both passes.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from deploy.interface import NAME, Interface
from hw_profiles.runtimes import onnxruntime


def write(model: Path, interface: Interface | None, folder: Path) -> Sequence[Path]:
    """`model.ort` and, as whoever feeds it needs it, `task.json`, where there is an interface."""
    made = onnxruntime.portable(model, folder / "model.ort")
    if interface is None:
        return [made]
    (folder / NAME).write_bytes(interface.to_json())
    return [made, folder / NAME]
