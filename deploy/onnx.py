"""Export a network as one ONNX file, and read such files back without trusting them.

Opset 18: the set that torch's exporter writes without converting (higher ones are reached by a
conversion pass afterwards), new enough for every operator of our spaces, old enough for the
runtimes that boards ship with. Nothing of ours needs what came later (a single Attention node,
opset 23).

No simplifier runs afterwards: the exporter folds constants and batch norms itself, and what
onnxslim found no node left to remove in four spaces (docs/methods/quantization.md).
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import logging
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, nn

from deploy.external import externals, opened
from nas import file
from nas.errors import NasctlError
from nas.outputs import named

if TYPE_CHECKING:
    import onnx

Free = str | torch.export.Dim  # a dimension of any size, or of any within limits

OPSET = 18
_ENDS = ("padded.lowest", "padded.largest")  # names of constants
#: bytes of weights that still fit into one file: protobuf's limit is 2 GiB for all of it
INLINE = (2 << 30) - (64 << 20)
EXTERNAL = 1024  # bytes from which a tensor of a larger network moves out of the file
#: how the exporter names what it has no translation for
_UNTRANSLATED = re.compile(
    r"translating node .*?target=torch\.ops\.([\w.]+)|Exporting the operator '(\w+::\w+)'",
    re.DOTALL,
)


def export(
    net: nn.Module,
    path: Path,
    *,
    input_shape: Sequence[int],
    free: Sequence[str] = ("batch",),
    opset: int = OPSET,
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Write an image network, in eval mode, to `path`: `export_inputs` for its one input, "input".

    `input_shape` is one example's (channels, height, width); `free` names the dimensions that may
    take any size, of batch, channels, height and width.
    """
    example = torch.zeros(2, *input_shape)  # batch 2: 1 would be taken as a constant
    axes = ("batch", "channels", "height", "width")
    names = {axis: name for axis, name in enumerate(axes) if name in free}
    export_inputs(net, path, {"input": example}, {"input": names}, opset=opset, metadata=metadata)


def export_inputs(
    net: nn.Module,
    path: Path,
    examples: Mapping[str, Tensor],
    free: Mapping[str, Mapping[int, Free]],
    *,
    opset: int = OPSET,
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Write `net`, in eval mode, to `path`; `examples` are its positional inputs by name.

    `free` maps an input's axes to dimensions that may take any size, or any within limits: a name
    or a `torch.export.Dim`. Outputs are
    called as `nas.outputs.named` calls them: "logits" if there is one. Batch norms are folded into
    the convolutions before them. `metadata` becomes the file's properties. Weights are inside, or,
    above 2 GB, in a file beside it that is named after its content. The file is whole or absent.

    Raises NasctlError for weights that are not finite, for operators without a translation (with
    the module that uses them) and for code that torch cannot follow.
    """
    from onnx import helper

    _require_finite(net)
    model = _trace(net, examples, free, opset)
    _strip(model)
    _part_pads(model)
    model.producer_name = "nasctl"
    helper.set_model_props(model, dict(metadata or {}))
    write(model, path)


def _part_pads(model: onnx.ModelProto) -> None:
    """Keep ONNX Runtime from joining a Pad with the MaxPool that reads it.

    Its optimizer (PadFusion, 1.31) lets the pool do the padding, with what counts for nothing: the
    Pad's zeros are then missing wherever all of a window is negative. A Clip to all finite numbers
    between them changes nothing and is in its way.
    """
    import onnx
    from onnx import helper, numpy_helper

    graph = model.graph
    pads = {node.output[0] for node in graph.node if node.op_type == "Pad"}
    nodes = []
    for node in graph.node:
        if node.op_type == "MaxPool" and node.input[0] in pads:
            free = f"{node.input[0]}.padded"
            nodes.append(helper.make_node("Clip", [node.input[0], *_ENDS], [free], name=free))
            node.input[0] = free
        nodes.append(onnx.NodeProto.FromString(node.SerializeToString()))
    if len(nodes) == len(graph.node):
        return
    ends = np.finfo(np.float32)
    for name, value in zip(_ENDS, (ends.min, ends.max), strict=True):
        graph.initializer.append(numpy_helper.from_array(np.array(value), name))
    del graph.node[:]
    graph.node.extend(nodes)


def licensed(licence: str) -> dict[str, str]:
    """The property of a file whose weights have a licence; none where nobody stated one."""
    return {"licence": licence} if licence else {}


def write(model: onnx.ModelProto, path: Path) -> None:
    """Check a model and put it at `path` in one step; weights above 2 GB go beside it first, out
    of `model` too.

    Raises NasctlError for a model that onnx's checker or its shape inference refuses.
    """
    import onnx

    part = path.with_name(f".{path.name}.part")  # beside its weights, as the checker wants it
    try:
        if sum(len(tensor.raw_data) for tensor in model.graph.initializer) > INLINE:
            _move_weights(model, path)
        file.write(part, model.SerializeToString(deterministic=True))
        onnx.checker.check_model(part, full_check=True)
        part.replace(path)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        raise NasctlError(
            f"the exported network is not a valid file: {error}", where=str(path)
        ) from error
    finally:
        part.unlink(missing_ok=True)


def read(path: Path) -> onnx.ModelProto:
    """The model in a file of anybody's, with its weights.

    Raises NasctlError for what is no ONNX file and for weights that it wants from anywhere but
    ordinary files in its own folder: such a file could ask for any other on this machine.
    """
    import onnx
    from onnx.external_data_helper import load_external_data_for_model

    model = opened(path)
    if not model.graph.node:
        raise NasctlError("holds no network", where=str(path))
    for held in externals(model, path):
        if held.is_symlink() or not held.is_file():
            raise NasctlError(f"its weights are to be in {held.name}", where=str(path))
    try:
        onnx.checker.check_model(path)  # with its weights inside, one above 2 GB is refused
        load_external_data_for_model(model, str(path.parent))
    except (onnx.checker.ValidationError, ValueError) as error:
        raise NasctlError(f"is not a valid ONNX file: {error}", where=str(path)) from error
    return model


def inputs(path: Path) -> dict[str, tuple[int | str, ...]]:
    """What goes into the model in `path`: sizes by name, a free one as a string."""
    graph = opened(path).graph
    weights = {tensor.name for tensor in graph.initializer}
    return {
        value.name: tuple(
            size.dim_value if size.HasField("dim_value") else size.dim_param
            for size in value.type.tensor_type.shape.dim
        )
        for value in graph.input
        if value.name not in weights
    }


def _move_weights(model: onnx.ModelProto, path: Path) -> None:
    """Put large weights into one file beside `path`, named after its content: the model's file,
    which is written last, then never points to weights of another version."""
    from onnx.external_data_helper import set_external_data

    large = [t for t in model.graph.initializer if len(t.raw_data) >= EXTERNAL]
    digest = hashlib.sha256()
    for tensor in large:
        digest.update(tensor.raw_data)
    held = path.with_name(f"{path.stem}.{digest.hexdigest()[:12]}.data")
    file.write(held, b"".join(tensor.raw_data for tensor in large))
    offset = 0
    for tensor in large:
        length = len(tensor.raw_data)
        set_external_data(tensor, held.name, offset, length)
        tensor.ClearField("raw_data")
        tensor.data_location = tensor.EXTERNAL
        offset += length


def _require_finite(net: nn.Module) -> None:
    for name, tensor in (*net.named_parameters(), *net.named_buffers()):
        if tensor.is_floating_point() and not bool(tensor.isfinite().all()):
            bad = int((~tensor.isfinite()).sum())
            raise NasctlError(
                f"{bad} of {tensor.numel()} values are not finite",
                where=f"weight '{name}'",
                next="Its training diverged: take an earlier checkpoint.",
            )


def draft(net: nn.Module, path: Path, example: torch.Tensor) -> None:
    """Write `net`, in eval mode, as a file to be timed on inputs like `example`, not to be shipped.

    By torch's older exporter: it takes a tenth of the other's seconds, and the runtime ends up with
    the same operators (the same milliseconds on three files of two networks), but it follows one
    path through the network's code and fixes the batch. Raises NasctlError as `export_inputs` does.
    """
    part = path.with_suffix(".part")
    with _eval_mode(net), _quiet():
        try:
            torch.onnx.export(net, (example,), part, dynamo=False, opset_version=OPSET)
        except RuntimeError as error:
            raise _cannot_export(net, (example,), error) from error
    part.replace(path)


def _trace(
    net: nn.Module,
    examples: Mapping[str, Tensor],
    free: Mapping[str, Mapping[int, Free]],
    opset: int,
) -> onnx.ModelProto:
    first = next(net.parameters(), torch.empty(0))
    inputs = tuple(
        x.to(first.device, first.dtype if x.is_floating_point() else x.dtype)
        for x in examples.values()
    )
    # one Dim per name, or two inputs get batches of different names; without: s77 or so
    every = {dim for axes in free.values() for dim in axes.values()}
    dims = {dim: torch.export.Dim(dim) if isinstance(dim, str) else dim for dim in every}
    shapes = tuple({axis: dims[dim] for axis, dim in free.get(key, {}).items()} for key in examples)
    with _eval_mode(net), _quiet(), torch.no_grad():
        try:
            program = torch.onnx.export(
                net,
                inputs,
                dynamo=True,
                opset_version=opset,
                input_names=list(examples),
                output_names=list(named(net(*inputs))),
                dynamic_shapes=shapes,
                verbose=False,
            )
        except RuntimeError as error:  # the exporter's own is one; so is a forward that fails
            raise _cannot_export(net, inputs, error) from error
    assert program is not None  # dynamo=True always returns one
    return program.model_proto


def _cannot_export(net: nn.Module, inputs: tuple[Tensor, ...], error: RuntimeError) -> NasctlError:
    """What could not be exported, and in which module or line."""
    name, cause = type(net).__name__, error.__cause__ or error
    if untranslated := _UNTRANSLATED.search(str(cause)):
        operator = untranslated[1] or untranslated[2].replace("::", ".")
        return NasctlError(
            f"torch cannot export {name}: operator {operator} has no ONNX form",
            where=_module_of(net, inputs, operator),
            next="Write that module with other operators.",
        )
    said = str(cause).strip().splitlines() or [type(cause).__name__]
    line = re.search(r"File \".*?\", line \d+, in \w+\n[ \t]+(\S.*)", str(error))
    at = f", at `{line[1].strip()}`" if line else ""
    return NasctlError(
        f"torch cannot export {name} ({said[0]}{at})",
        next="Its forward must not depend on values in tensors, nor on a fixed batch size.",
    )


def _module_of(net: nn.Module, inputs: tuple[Tensor, ...], operator: str) -> str:
    """The innermost module that uses an operator (prims.bessel_j0.default), as "'path' (Type)"."""
    # the exporter rewrites operators first: aten.special_bessel_j0 is prims.bessel_j0 by then
    word = operator.split(".")[1]
    for node in torch.export.export(net, inputs).graph.nodes:
        if word in str(node.target) and (stack := node.meta.get("nn_module_stack")):
            path, kind = list(stack.values())[-1]
            return f"module '{path}' ({kind.rpartition('.')[2]})"
    return type(net).__name__


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
