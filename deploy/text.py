"""Encoders of text as ONNX files: any number of texts, any number of tokens; in 8 bits too.

The input is "input", token numbers [batch, tokens] padded with the padding number, the output
"logits". INT8 is ONNX Runtime's dynamic quantization: weights in 8 bits, activations quantized anew
in every call, so no calibration data is needed.
"""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch

from deploy import onnx as files
from hw_profiles.runtimes import onnxruntime
from nas import file
from nas.errors import ParityFailed
from nas.search_spaces.bert import Bert

TOLERANCE = 1e-4  # of the largest logit


def export(net: Bert, path: Path, *, metadata: Mapping[str, str] | None = None) -> None:
    """Write `net`, in eval mode, with free numbers of texts and tokens. Whole or absent."""
    most = net.frame.positions
    example = torch.ones(2, min(8, most), dtype=torch.int64)
    free: dict[int, files.Free] = {0: "batch", 1: torch.export.Dim("tokens", min=2, max=most)}
    files.export_inputs(net, path, {"input": example}, {"input": free}, metadata=metadata)


def parity(path: Path, net: Bert, tokens: torch.Tensor) -> float:
    """The largest difference between file and network on texts [N, S], also of one text alone and
    of fewer tokens. Raises ParityFailed above TOLERANCE of the largest logit."""
    session, worst = onnxruntime.load(path), 0.0
    short = max(2, tokens.shape[1] // 2)
    net.eval()
    for part in (tokens, tokens[:1], tokens[:, :short]):
        with torch.no_grad():
            expected = net(part).numpy()
        (found,) = onnxruntime.run(session, {"input": part.numpy()})
        if expected.shape != found.shape:
            raise ParityFailed(
                f"the file's output is {found.shape}, the network's {expected.shape}",
                where=str(path),
            )
        difference = float(np.abs(expected - found).max())
        limit = TOLERANCE * max(float(np.abs(expected).max()), 1e-3)
        if not difference <= limit:  # also true of nan
            raise ParityFailed(
                f"file and network differ by {difference:.3g}",
                where=str(path),
                allowed=f"{limit:.3g}",
            )
        worst = max(worst, difference)
    return worst


def predictions(path: Path, tokens: np.ndarray, *, batch: int = 64) -> np.ndarray:
    """The file's classes [N] of texts [N, S]."""
    session = onnxruntime.load(path)
    parts = [
        onnxruntime.run(session, {"input": tokens[at : at + batch]})[0].argmax(1)
        for at in range(0, len(tokens), batch)
    ]
    return np.concatenate(parts)


def quantized(path: Path, to: Path) -> None:
    """The file at `path` with its matrices in 8 bits, written to `to`. Whole or absent."""
    import onnx
    from onnxruntime.quantization import QuantType, quantize_dynamic

    model = onnx.load(path)
    del model.graph.value_info[:]  # shapes that the quantizer would take for fixed
    with tempfile.TemporaryDirectory() as folder:
        plain, small = Path(folder) / "plain.onnx", Path(folder) / "int8.onnx"
        onnx.save(model, plain)
        disabled = logging.root.manager.disable
        logging.disable(logging.WARNING)  # advice about the preparation that was just done
        try:
            quantize_dynamic(plain, small, weight_type=QuantType.QInt8, per_channel=True)
        finally:
            logging.disable(disabled)
        file.write(to, small.read_bytes())


def of_length(path: Path, tokens: int, to: Path) -> None:
    """A copy for one text of a fixed number of tokens: what is timed."""
    import onnx
    from onnx.tools.update_model_dims import update_inputs_outputs_dims

    model = onnx.load(path)
    (output,) = model.graph.output
    classes = output.type.tensor_type.shape.dim[1].dim_value
    sizes = {"input": [1, tokens]}, {output.name: [1, classes]}
    fixed = update_inputs_outputs_dims(model, *sizes)
    file.write(to, fixed.SerializeToString(deterministic=True))
