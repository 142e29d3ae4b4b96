"""A model repository of NVIDIA's Triton Inference Server: NAME/config.pbtxt and NAME/1/model.onnx.

The ONNX file is served by Triton's ONNX Runtime backend. Its free batch becomes `max_batch_size`
with dynamic batching (requests that arrive together are run together); the dimensions that Triton
is told leave the batch out. A file without a free batch is served one request at a time.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import onnx
from onnx import TensorProto

from deploy import external
from deploy import onnx as files
from deploy.interface import Interface
from nas.errors import NasctlError

MAX_BATCH = 64
LABELS = "labels.txt"
TYPES: dict[int, str] = {
    TensorProto.FLOAT: "TYPE_FP32",
    TensorProto.FLOAT16: "TYPE_FP16",
    TensorProto.BFLOAT16: "TYPE_BF16",
    TensorProto.INT64: "TYPE_INT64",
    TensorProto.INT32: "TYPE_INT32",
    TensorProto.UINT8: "TYPE_UINT8",
    TensorProto.INT8: "TYPE_INT8",
}


def write(model: Path, interface: Interface | None, folder: Path) -> Sequence[Path]:
    """The repository of a model of one version, under the name of its file."""
    place = folder / model.name.removesuffix(".onnx").replace(".", "_")
    (place / "1").mkdir(parents=True)
    proto, copy = files.read(model), place / "1" / "model.onnx"
    files.write(proto, copy)
    made = [place / "config.pbtxt", copy, *external.beside(copy)]
    classes = interface.classes if interface else ()
    if classes:
        (place / LABELS).write_text("".join(f"{name}\n" for name in classes))
        made.append(place / LABELS)
    made[0].write_text(config(proto, place.name, labelled=bool(classes)))
    return made


def config(model: onnx.ModelProto, name: str, *, labelled: bool) -> str:
    """The text of `config.pbtxt`; the one output of a classification points to its labels."""
    graph = model.graph
    weights = {tensor.name for tensor in graph.initializer}
    inputs = [value for value in graph.input if value.name not in weights]
    batched = all(_free(value) for value in (*inputs, *graph.output))
    lines = [f'name: "{name}"', 'backend: "onnxruntime"']
    lines.append(f"max_batch_size: {MAX_BATCH if batched else 0}")
    lines += _tensors("input", inputs, batched, "")
    lines += _tensors("output", graph.output, batched, LABELS if labelled else "")
    if batched:
        lines.append("dynamic_batching { }")
    return "\n".join(lines) + "\n"


def _free(value: onnx.ValueInfoProto) -> bool:
    dims = value.type.tensor_type.shape.dim
    return len(dims) > 0 and not dims[0].HasField("dim_value")


def _tensors(
    kind: str, values: Sequence[onnx.ValueInfoProto], batched: bool, labels: str
) -> list[str]:
    found = []
    for value in values:
        tensor = value.type.tensor_type
        if tensor.elem_type not in TYPES:
            number = TensorProto.DataType.Name(tensor.elem_type)
            raise NasctlError(f"{kind} '{value.name}' is {number}", where="--layout triton")
        dims = list(tensor.shape.dim)[1 if batched else 0 :]
        sizes = ", ".join(str(d.dim_value) if d.HasField("dim_value") else "-1" for d in dims)
        words = [f'name: "{value.name}"', f"data_type: {TYPES[tensor.elem_type]}"]
        words.append(f"dims: [ {sizes} ]")
        if labels:
            words.append(f'label_filename: "{labels}"')
        found.append(f"{kind} [ {{ {' '.join(words)} }} ]")
    return found
