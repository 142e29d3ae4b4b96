"""NNCF's accuracy control of one ONNX file, run by an interpreter that has NNCF: a script.

    python nncf_control.py FOLDER BACKEND BOUND

FOLDER holds model.onnx (free batch, one input called "input"), calibration.npy [N, ...], guard.npy
[M, ...] and labels.npy [M]. BACKEND is the runtime that judges, onnxruntime or openvino. Everything
else is as NNCF has it by default. Written are nncf.onnx, or nncf.xml with nncf.bin, and nncf.json.
It imports nothing of ours, because NNCF is no dependency of ours.
"""

from __future__ import annotations

import json
import logging
import re
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np

Item = tuple[np.ndarray, int]
Run = Callable[[np.ndarray], np.ndarray]


def control(folder: Path, backend: str, bound: float) -> dict[str, Any]:
    import nncf

    heard = Heard()
    logging.getLogger("nncf").addHandler(heard)
    calibration = np.load(folder / "calibration.npy")
    guard, labels = np.load(folder / "guard.npy"), np.load(folder / "labels.npy")
    shape = calibration.shape[1:]
    model, opened = (of_onnx if backend == "onnxruntime" else of_openvino)(folder, shape)

    def judged(model: Any, items: Iterable[Item]) -> tuple[float, list[float]]:
        """Accuracy, and whether each item was right."""
        run = opened(model)
        right = [float(run(x).argmax() == label) for x, label in items]
        return sum(right) / len(right), right

    one = [(guard[at : at + 1], int(label)) for at, label in enumerate(labels)]
    inputs = [({"input": calibration[at : at + 1]}) for at in range(len(calibration))]
    began = time.process_time(), time.perf_counter()
    made = nncf.quantize_with_accuracy_control(
        model,
        calibration_dataset=nncf.Dataset(inputs),
        validation_dataset=nncf.Dataset(one, lambda item: {"input": item[0]}),
        validation_fn=judged,
        max_drop=bound,
        drop_type=nncf.DropType.ABSOLUTE,
        subset_size=len(inputs),
    )
    took = time.process_time() - began[0], time.perf_counter() - began[1]
    write(made, folder, backend)
    return {
        "version": nncf.__version__,
        "reverted": heard.reverted,
        "seconds": took[0],
        "wall_seconds": took[1],
    }


class Heard(logging.Handler):
    """How many operations NNCF says that it took back to float."""

    def __init__(self) -> None:
        super().__init__(logging.INFO)
        self.reverted = 0

    def emit(self, record: logging.LogRecord) -> None:
        if told := re.search(r"(\d+) out of \d+ were reverted back", record.getMessage()):
            self.reverted = int(told[1])


def of_onnx(folder: Path, shape: tuple[int, ...]) -> tuple[Any, Callable[[Any], Run]]:
    """The model, and how one is made to run."""
    import onnx
    import onnxruntime

    def opened(model: Any) -> Run:
        settings = onnxruntime.SessionOptions()
        settings.intra_op_num_threads = 1
        session = onnxruntime.InferenceSession(
            model.SerializeToString(), settings, providers=["CPUExecutionProvider"]
        )
        return lambda x: session.run(None, {"input": x})[0]

    return onnx.load(folder / "model.onnx"), opened


def of_openvino(folder: Path, shape: tuple[int, ...]) -> tuple[Any, Callable[[Any], Run]]:
    """The same; NNCF hands over models that are compiled already."""
    import openvino

    model = openvino.Core().read_model(folder / "model.onnx")
    model.reshape({"input": [1, *shape]})

    def opened(compiled: Any) -> Run:
        request = compiled.create_infer_request()
        return lambda x: request.infer({"input": x})[0]

    return model, opened


def write(model: Any, folder: Path, backend: str) -> None:
    if backend == "onnxruntime":
        import onnx

        onnx.save(model, folder / "nncf.onnx")
    else:
        import openvino

        openvino.save_model(model, folder / "nncf.xml", compress_to_fp16=False)


if __name__ == "__main__":
    where = Path(sys.argv[1])
    result = control(where, sys.argv[2], float(sys.argv[3]))
    (where / "nncf.json").write_text(json.dumps(result) + "\n", encoding="utf-8")
