"""How engines are built from a bundle: per engine the command of ours and, for TensorRT, the one
of NVIDIA's own tool, which needs nothing of ours on the board."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from deploy.sizes import Shapes
from hw_profiles.device import Device

NAME = "recipes.json"
#: a bundle's ONNX files by precision; those but the first are written by `nasctl quantize`
FILES = {
    "fp32": "model.onnx",
    "fp16": "model.fp16.onnx",
    "bf16": "model.bf16.onnx",
    "int8": "model.int8.onnx",
}
#: what `nasctl build --engine` takes -> the runtime that builds it, by kind of device
ENGINES = {
    "ort": {"cpu": "onnxruntime"},
    "openvino": {"cpu": "openvino"},
    "aoti": {"cpu": "aoti", "gpu": "aoti_cuda"},
    "tensorrt": {"gpu": "tensorrt"},
}
#: trtexec's words for what `nasctl build --compatible` takes
COMPATIBLE = {
    "version": "--versionCompatible",
    "hardware": "--hardwareCompatibilityLevel=ampere+",
}


def of(device: Device, shapes: Shapes) -> dict[str, Any]:
    """Commands by engine for a device; `BUNDLE` stands for the bundle's folder."""
    found: dict[str, Any] = {}
    for engine, kinds in ENGINES.items():
        if device.kind in kinds:
            command = f"nasctl build BUNDLE --hw {device.name} --engine {engine}"
            # of the float file; a quantized one is built as it is
            told = {"runtime": kinds[device.kind], "precision": device.precision}
            found[engine] = {"nasctl": command, **told}
    if "tensorrt" in found:
        # beside who calls it: a bundle lists all of its files, and this would be one more
        source = Path(FILES[device.precision])
        line = trtexec("BUNDLE" / source, source.with_suffix(".engine"), shapes)
        found["tensorrt"]["trtexec"] = shlex.join(line)
        if device.precision != "fp32":
            found["tensorrt"]["first"] = lowering("BUNDLE", device.name, device.precision)
    return {"device": device.name, "engines": found}


def lowering(bundle: str, device: str, precision: str) -> str:
    """The command that writes the file of a precision, which trtexec cannot lower to."""
    return f"nasctl quantize {bundle} --hw {device} --forms {precision}"


def trtexec(
    model: Path,
    engine: Path,
    shapes: Shapes,
    *,
    compatible: Sequence[str] = (),
    major: int = 10,
) -> list[str]:
    """The words of the `trtexec` command that builds what `hw_profiles.runtimes.tensorrt` does.

    Precision is that of the file: 10.x is asked for strong typing, which 11.x has no flag for, as
    it has none other. TF32 off, layers described in detail, so that their precision can be read
    back; a timing cache beside the engine, as those of one major version are refused by another.
    Shapes are stated of inputs with a free dimension only: the tool refuses them for others.
    """
    words = ["trtexec", f"--onnx={model}", f"--saveEngine={engine}"]
    if major < 11:
        words.append("--stronglyTyped")
    for at, which in enumerate(("min", "opt", "max") if shapes else ()):
        each = (f"{name}:{'x'.join(map(str, three[at]))}" for name, three in shapes.items())
        words.append(f"--{which}Shapes={','.join(each)}")
    words += [COMPATIBLE[one] for one in compatible]
    words.append(f"--timingCacheFile={engine.with_name(f'tensorrt{major}.cache')}")
    more = ["--noTF32", "--memPoolSize=workspace:1024M", "--profilingVerbosity=detailed"]
    return [*words, *more, "--skipInference"]
