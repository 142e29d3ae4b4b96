"""OpenVINO's intermediate representation: model.xml and model.bin, for any Intel or Arm processor,
GPU or NPU that OpenVINO knows. An engine (`nasctl build --engine openvino`) is this, compiled for
one processor."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from deploy.interface import NAME, Interface
from hw_profiles.runtimes import openvino


def write(model: Path, interface: Interface | None, folder: Path) -> Sequence[Path]:
    """Both files, in the model's own precision, and `task.json`, where there is an interface."""
    made = openvino.representation(model, folder / "model.xml")
    found = [made, made.with_suffix(".bin")]
    if interface is None:
        return found
    (folder / NAME).write_bytes(interface.to_json())
    return [*found, folder / NAME]
