"""Export a network as one ONNX file.

Opset 18: the set that torch's exporter writes without converting (higher ones are reached by a
conversion pass afterwards), new enough for every operator of our spaces, old enough for the
runtimes that boards ship with. Nothing of ours needs what came later (a single Attention node,
opset 23).
"""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from nas import file
from nas.errors import NasctlError
from nas.outputs import named

if TYPE_CHECKING:
    import onnx

OPSET = 18


def export(
    net: nn.Module,
    path: Path,
    *,
    input_shape: Sequence[int],
    opset: int = OPSET,
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Write `net`, in eval mode, to `path` with its weights inside and a free batch dimension.

    `input_shape` is one example's (channels, height, width). The input is called "input", outputs
    as `nas.outputs.named` calls them: "logits" if there is one. Batch norms are folded into the
    convolutions before them. `metadata` becomes the file's properties. The file is whole or absent.
    """
    import onnx
    from onnx import helper

    first = next(net.parameters(), torch.empty(0))
    # batch 2: 1 would be taken as a constant
    example = torch.zeros(2, *input_shape, device=first.device, dtype=first.dtype)
    model = traced(net, example, {0: torch.export.Dim("batch")}, opset)
    helper.set_model_props(model, dict(metadata or {}))
    try:
        onnx.checker.check_model(model, full_check=True)
        data = model.SerializeToString(deterministic=True)
    except (onnx.checker.ValidationError, ValueError) as error:  # ValueError: more than 2 GB
        raise NasctlError(
            f"the exported network is not a valid file: {error}", where=str(path)
        ) from error
    file.write(path, data)


def draft(net: nn.Module, path: Path, example: torch.Tensor) -> None:
    """Write `net`, in eval mode, as a file to be timed on inputs like `example`, not to be shipped.

    By torch's older exporter: it takes a tenth of the other's seconds, and the runtime ends up with
    the same operators (the same milliseconds on three files of two networks), but it follows one
    path through the network's code and fixes the batch.
    """
    part = path.with_suffix(".part")
    with _eval_mode(net), _quiet():
        torch.onnx.export(net, (example,), part, dynamo=False, opset_version=OPSET)
    part.replace(path)


def traced(
    net: nn.Module, example: torch.Tensor, free: Mapping[int, Any], opset: int
) -> onnx.ModelProto:
    """`net`, in eval mode, as a model without the exporter's notes; the example's dimensions that
    are in `free` may be of any size. Raises NasctlError for what torch cannot export."""
    with _eval_mode(net), _quiet(), torch.no_grad():
        try:
            program = torch.onnx.export(
                net,
                (example,),
                dynamo=True,
                opset_version=opset,
                input_names=["input"],
                output_names=list(named(net(example))),
                # names for the dimensions: otherwise they are called s77 or so
                dynamic_shapes=(dict(free),),
                verbose=False,
            )
        except RuntimeError as error:  # the exporter's own is one; so is a forward that fails
            cause = error.__cause__ or error
            raise NasctlError(
                f"torch cannot export {type(net).__name__} ({str(cause).splitlines()[0]})",
                next="Its forward must not depend on values in tensors, nor on a fixed batch size.",
            ) from error
    assert program is not None  # dynamo=True always returns one
    model = program.model_proto
    _strip(model)
    model.producer_name = "nasctl"
    return model


@contextlib.contextmanager
def _eval_mode(net: nn.Module) -> Iterator[None]:
    """Eval for every module, then each one's own mode again: frozen parts stay frozen.

    A network exported in training mode keeps its dropout, and says nothing.
    """
    modes = {module: module.training for module in net.modules()}
    net.eval()
    try:
        yield
    finally:
        for module, training in modes.items():
            module.training = training


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep the exporter from printing and logging about its own internals and absent torchvision.

    None of it is about the user's network: failures are exceptions, and the result is checked, then
    run against the original (`deploy.verify.parity`).
    """
    disabled = logging.root.manager.disable
    logging.disable(logging.ERROR)
    try:
        sink = io.StringIO()
        with (
            warnings.catch_warnings(),
            contextlib.redirect_stdout(sink),
            contextlib.redirect_stderr(sink),
        ):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(disabled)


def _strip(model: onnx.ModelProto) -> None:
    """Remove the exporter's notes: they hold stack traces with the paths of this machine, and
    make files of equal networks differ."""
    graph = model.graph
    for parts in (graph.node, graph.input, graph.output, graph.value_info, graph.initializer):
        for part in parts:
            part.ClearField("metadata_props")
            part.ClearField("doc_string")
    graph.ClearField("metadata_props")
    graph.ClearField("doc_string")
    model.ClearField("doc_string")
