"""NNCF's accuracy control as `benchmarks.deploy` calls it: in an environment of its own."""

from __future__ import annotations

import json
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from hw_profiles.runtimes import short
from nas.errors import NasctlError

SCRIPT = Path(__file__).with_name("nncf_control.py")
RESULT = {"onnxruntime": "nncf.onnx", "openvino": "nncf.xml"}
LIMIT_S = 1200.0


@dataclass(frozen=True)
class Asked:
    """What it gets: the runtime that judges, calibration inputs [N, ...], the half that guards, and
    the bound, absolute."""

    runtime: str
    calibration: np.ndarray
    guard: np.ndarray
    labels: np.ndarray
    bound: float


@dataclass(frozen=True)
class Controlled:
    path: Path  # of the quantized model
    reverted: int  # operations that it took back to float
    seconds: float  # of the processor, without imports
    more: dict[str, Any]


def controlled(python: str, model: onnx.ModelProto, asked: Asked, folder: Path) -> Controlled:
    """Run it by the interpreter `python` in `folder`. Raises NasctlError with its last words."""
    onnx.save(model, folder / "model.onnx")
    arrays = {"calibration": asked.calibration, "guard": asked.guard, "labels": asked.labels}
    for name, values in arrays.items():
        np.save(folder / f"{name}.npy", values)
    command = [python, str(SCRIPT), str(folder), asked.runtime, str(asked.bound)]
    try:
        subprocess.run(command, check=True, capture_output=True, text=True, timeout=LIMIT_S)
    except OSError as error:
        raise NasctlError(f"cannot run it ({error.strerror})", where="--nncf") from error
    except subprocess.CalledProcessError as error:
        said = [line for line in error.stderr.splitlines() if line.strip()]
        last = ValueError(said[-1] if said else f"exit code {error.returncode}")
        raise NasctlError(f"NNCF failed ({short(last)})", where="--nncf") from error
    except subprocess.TimeoutExpired as error:
        raise NasctlError(f"NNCF took more than {LIMIT_S:.0f} s", where="--nncf") from error
    told = json.loads((folder / "nncf.json").read_text())
    more = {"version": told["version"], "wall_seconds": told["wall_seconds"]}
    return Controlled(folder / RESULT[asked.runtime], told["reverted"], told["seconds"], more)
