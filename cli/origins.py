"""What came before a bundle's ONNX file, where the run that made it is at hand: supernet, extracted
network, and the file against it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from cli import bundling, several
from cli.bundling import Feeds
from deploy import chain
from deploy import verify as deployed
from deploy.bundle import Bundle
from deploy.chain import Link, Outputs
from nas import checkpoint
from nas.errors import NasctlError
from nas.outputs import named as outputs_of
from nas.run import Run as RunFolder

WEIGHTS = "model.safetensors"
COMPARED = "network = ONNX: it was compared when the file was written"


def links(
    bundle: Bundle, named: Path, data: str | None, inputs: Feeds, expected: Outputs
) -> tuple[list[Link], list[str]]:
    """The links before the ONNX file, where the run with its weights and its data are at hand."""
    weights = named / WEIGHTS
    if not named.is_dir() or not weights.is_file():
        theirs = bundling.ARCH in bundle.manifest.members and "model" in _arch(bundle)
        return [], [COMPARED if theirs else "supernet = extracted = ONNX: the run is not here"]
    _, meta = checkpoint.read(weights)
    if several.described(meta, weights):
        try:
            net = several.read(weights, data).net
        except NasctlError as error:
            if data is not None:
                raise
            return [], [f"network = ONNX: {error}"]
        return [_exported(net, inputs, expected)], []
    if not meta or "network" not in checkpoint.description(meta, weights):
        return [], [COMPARED]
    from cli import child, training

    try:
        opened, genes, net = child.read(weights, data)
    except NasctlError as error:
        if data is not None:
            raise
        return [], [f"supernet = extracted = ONNX: {error}"]
    links = [_exported(net, inputs, expected)]
    run = RunFolder(named)
    spec = run.manifest().get("spec", {})
    if spec.get("alone") or spec.get("supernet") or not run.unchanged("train"):
        return links, ["supernet = extracted: there is no supernet in this run, or another by now"]
    _, apart = child.extracted(opened, training.finished_supernet(opened), genes)
    return [Link("supernet = extracted", "fp32", apart), *links], []


def _arch(bundle: Bundle) -> dict[str, Any]:
    found: dict[str, Any] = deployed.read(bundle.path(bundling.ARCH))
    return found


def _exported(net: nn.Module, inputs: Feeds, expected: Outputs) -> Link:
    with torch.no_grad():
        outputs = outputs_of(net(*map(torch.from_numpy, inputs.values())))
    found = {name: tensor.numpy() for name, tensor in outputs.items()}
    return chain.link("network = float file", "fp32", found, expected)
