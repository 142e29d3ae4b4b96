"""What an ONNX file says of itself, whichever verb writes it: enough to feed it, to trace it back
and to know what it was worth."""

from __future__ import annotations

import json
from collections.abc import Mapping
from importlib import metadata
from typing import Any

from deploy import onnx
from deploy.interface import Interface
from nas import file


def of(
    origin: Mapping[str, str],
    *,
    arch: Any,
    fed: Interface | None,
    validation: Mapping[str, float],
    licence: str,
) -> dict[str, str]:
    """The properties of a file. `origin` is what the verb knows it by (space, genes, model, run);
    `arch`, as JSON has it, builds the network again; `fed` says what goes in, None where nobody
    did; `validation` are metrics by task on validation images, none where nothing was judged."""
    found = {
        "nasctl": metadata.version("nasctl"),
        "commit": file.commit(),
        **origin,
        "arch": json.dumps(arch),
        **onnx.licensed(licence),
    }
    if validation:
        found["validation"] = json.dumps(dict(validation))
    if fed is None:
        return found
    channels, height, width = fed.shape
    if fed.classes:
        found["classes"] = json.dumps(fed.classes)
    return found | {
        "input": f"float32 N x {channels} x {height} x {width}, (pixel / 255 - mean) / std",
        "mean": json.dumps(fed.mean),
        "std": json.dumps(fed.std),
        "data_sha256": fed.data_sha256,
    }
