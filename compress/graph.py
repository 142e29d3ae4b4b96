"""One network's dependency graph: which channels must go together (Torch-Pruning's DepGraph).

Facts about Torch-Pruning 1.6 that this file works around: its graph refers to module objects, so
every copy of a network needs a graph of its own; it calls `model(*inputs)` and, should that fail,
`model(inputs)`, which for one tensor first tries its rows; it finds operations by their gradients,
so frozen parameters hide them; operations it does not know count as element-wise.
"""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
import torch_pruning as tp
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch_pruning.dependency import index_mapping

from nas.errors import NasctlError
from nas.outputs import tensors

Inputs = Tensor | tuple[Any, ...]  # of one forward call
LAYERS = (nn.modules.conv._ConvNd, nn.Linear)
#: change what stays when channels go: the statistics are over channels
MIXING = (nn.LayerNorm, nn.GroupNorm, nn.MultiheadAttention)
#: what forward calls of networks with other widths raise, whatever their authors checked with
FAILS = (RuntimeError, ValueError, TypeError, IndexError, KeyError, AttributeError, AssertionError)


def forward(net: nn.Module, inputs: Inputs) -> Any:
    return net(*inputs) if isinstance(inputs, tuple) else net(inputs)


@dataclasses.dataclass(frozen=True)
class Member:
    """One module of a group: its channels at `at` go with the root's channels at `roots`."""

    name: str
    module: nn.Module | nn.Parameter
    inputs: bool  # the channels are those that the module reads, not those that it gives
    at: Sequence[int]
    roots: Sequence[int]


class Graph:
    """The graph of one network, which is put in eval mode; `prune_` changes the network and uses
    the graph up.

    Raises NasctlError, naming the operation, where the network does not run or autograd cannot
    follow it from its parameters to its outputs.
    """

    def __init__(self, net: nn.Module, example_inputs: Inputs) -> None:
        self.net = net.eval()
        self._trained = {name: p.requires_grad for name, p in net.named_parameters()}
        for parameter in net.parameters():
            parameter.requires_grad_(parameter.is_floating_point())
        self._graph = tp.DependencyGraph()
        with warnings.catch_warnings(), torch.enable_grad():
            warnings.simplefilter("ignore")
            seen = _Followed()
            try:
                self._graph.build_dependency(
                    self.net,
                    example_inputs,
                    forward_fn=lambda net, inputs: _followed(net, inputs, seen),
                    output_transform=_differentiable,
                )
            except TypeError as error:  # a forward that fails is told by `_followed`
                raise NasctlError(
                    f"Torch-Pruning cannot tell which channels are joined where ({error})",
                    where="model",
                    next="A concatenation of parts whose channels it does not know is one cause.",
                ) from error
        #: the first operation that passed numbers on and no gradient; empty without one
        self.severed = seen.severed
        _place_joins(self._graph, seen.joins)
        self._freeze()
        self._names = {module: name for name, module in self.net.named_modules()}

    def layers(self) -> list[str]:
        """Names of the convolutions and linear layers that the graph holds, in its order."""
        return [
            self._names[module]
            for module in self._graph.module2node
            if isinstance(module, LAYERS) and module in self._names
        ]

    def members(self, root: str, indices: Sequence[int] | None = None) -> list[Member]:
        """All that goes with output channels `indices` (None: all) of `root`, the root first."""
        return [
            Member(
                name=self._name(item.dep.target.module),
                module=item.dep.target.module,
                inputs=item.dep.handler.__name__ == "prune_in_channels",
                at=item.idxs,
                roots=item.root_idxs,
            )
            for item in self.group(root, indices)
            if isinstance(item.dep.target.module, nn.Parameter)
            or item.dep.target.module in self._names
        ]

    def prune_(self, root: str, indices: Sequence[int]) -> None:
        """Take these channels away from the network."""
        if indices:
            self.group(root, indices).prune(record_history=False)
        self._freeze()

    def _freeze(self) -> None:
        for name, parameter in self.net.named_parameters():
            parameter.requires_grad_(self._trained[name])

    def group(self, root: str, indices: Sequence[int] | None = None) -> tp.Group:
        """The same as Torch-Pruning has it, for its importances."""
        module = self.net.get_submodule(root)
        if indices is None:
            indices = range(width(module))
        function = self._graph.get_pruner_of_module(module).prune_out_channels
        return self._graph.get_pruning_group(module, function, list(indices))

    def norm_after(self, module: nn.Module) -> nn.Module | None:
        """The batch norm that alone reads what a layer gives; None without one."""
        readers = self._graph.module2node[module].outputs
        found = readers[0].module if len(readers) == 1 else None
        return found if isinstance(found, nn.modules.batchnorm._BatchNorm) else None

    def _name(self, module: nn.Module | nn.Parameter) -> str:
        if isinstance(module, nn.Parameter):
            return self._graph._param_to_name[module]
        return self._names[module]


def width(module: nn.Module) -> int:
    """Output channels of a convolution or linear layer."""
    found = module.out_features if isinstance(module, nn.Linear) else module.out_channels
    assert isinstance(found, int)
    return found


def gives(module: nn.Module) -> int:
    """The dimension of a layer's weight that counts what it gives."""
    return 1 if getattr(module, "transposed", False) and not is_depthwise(module) else 0


def is_depthwise(module: nn.Module | nn.Parameter) -> bool:
    return isinstance(module, nn.modules.conv._ConvNd) and (
        module.groups == module.out_channels == module.in_channels > 1
    )


# ---- tracing -------------------------------------------------------------------------------------


class _Followed(TorchFunctionMode):
    """Watches a forward pass for what the graph needs to know.

    Chunks of channels are cut out one by one, as slices: Torch-Pruning has one node for all parts
    of a split, and mistakes them for each other where one is read twice.
    """

    def __init__(self) -> None:
        super().__init__()
        self.last = self.cut = ""  # the last function called; the first that no gradient passed
        self.severed = ""  # the first of those that gave numbers on, not a comparison or an index
        #: first and last channel of each part of what was joined, by its gradient
        self.joins: dict[Any, list[tuple[int, int]]] = {}

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        name = getattr(func, "__name__", str(func))
        if name != "__get__":
            self.last = name
        out = func(*args, **(kwargs or {}))
        if name in _CUTS:
            out = _slices(args[0], out)
        elif name in _JOINS:
            self._join(args[0] if args else (kwargs or {})["tensors"], out)
        if name not in _NO_VALUES and any(_follows(arg) for arg in args):
            self._note_cut(name, tensors(out))
        return out

    def _note_cut(self, name: str, produced: Sequence[Tensor]) -> None:
        leaves = name in _LEAVES
        if leaves or (produced and not any(map(_follows, produced))):
            self.cut = self.cut or name
            if leaves or any(tensor.is_floating_point() for tensor in produced):
                self.severed = self.severed or name

    def _join(self, parts: Sequence[Tensor], out: Tensor) -> None:
        channel = channel_of(out)
        sizes = [part.shape[channel] for part in parts]
        ends = [sum(sizes[: at + 1]) for at in range(len(sizes))]
        spans = [(end - size, end) for end, size in zip(ends, sizes, strict=True)]
        if ends[-1] == out.shape[channel]:  # joined along this dimension
            # the graph knows of parts that have a gradient only: not of the network's inputs
            self.joins[out.grad_fn] = [
                span for span, part in zip(spans, parts, strict=True) if part.requires_grad
            ]


def channel_of(tensor: Tensor) -> int:
    """The dimension of channels: [B, C], [B, T, C], [B, C, H, W]."""
    return 2 if tensor.dim() == 3 else 1


def _slices(whole: Tensor, parts: Sequence[Tensor]) -> Sequence[Tensor]:
    channel = channel_of(whole)
    sizes = [part.shape[channel] for part in parts] if whole.dim() > 1 else []
    if sum(sizes) != whole.shape[channel if sizes else 0] or len(sizes) < 2:
        return parts  # cut along another dimension
    starts = [sum(sizes[:at]) for at in range(len(sizes))]
    return tuple(whole.narrow(channel, s, size) for s, size in zip(starts, sizes, strict=True))


def _place_joins(graph: tp.DependencyGraph, joins: Mapping[Any, Sequence[tuple[int, int]]]) -> None:
    """Where each part of a concatenation lies: Torch-Pruning infers it from neighbours, and takes
    a slice to be as wide as what it is of."""
    for node in graph.module2node.values():
        spans = joins.get(node.grad_fn)
        if spans is None or node.type != graph.ops.OPTYPE.CONCAT or not node.enable_index_mapping:
            continue
        if len(spans) != len(node.inputs):  # weights of a module among the parts: for the trial
            continue
        for inward in (False, True):
            _map_parts(node, spans, inward)
        node.enable_index_mapping = False  # its own would be put in their place later


def _map_parts(node: Any, spans: Sequence[tuple[int, int]], inward: bool) -> None:
    """Index mappings of the edges from the parts to the whole, or back."""
    placed: list[Any] = []
    for part, span in zip(node.inputs, spans, strict=True):
        source, target = (part, node) if inward else (node, part)
        edges = (edge for edge in source.dependencies if edge.target is target)
        edge = next(edge for edge in edges if not any(edge is other for other in placed))
        edge.index_mapping[1] = index_mapping._ConcatIndexMapping(offset=span, reverse=not inward)
        placed.append(edge)


_CUTS = ("chunk", "split", "tensor_split", "unsafe_chunk")
_JOINS = ("cat", "concat", "concatenate")
_LEAVES = ("numpy", "tolist", "item", "__array__")
#: ask about a tensor, not for its values
_NO_VALUES = ("__get__", "size", "dim", "numel", "is_floating_point", "requires_grad_", "__len__")


def _follows(value: Any) -> bool:
    return isinstance(value, Tensor) and value.grad_fn is not None


def _followed(net: nn.Module, inputs: Inputs, seen: _Followed) -> Any:
    """The forward pass that the graph is made of."""
    with seen:
        try:
            outputs = forward(net, inputs)
        except FAILS as error:
            said = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise NasctlError(
                f"the network does not run on the example inputs: {seen.last or 'forward'} said: "
                f"{said}",
                where="model",
                next="Give inputs as the network takes them.",
            ) from error
    if not any(map(_follows, tensors(outputs))):
        through = f"operation '{seen.cut}' cuts it" if seen.cut else "nothing that it runs is known"
        raise NasctlError(
            f"the network cannot be traced from its parameters to its outputs: {through}",
            where="model",
            allowed="torch operations with gradients, and tensors as outputs",
        )
    return outputs


def _differentiable(outputs: Any) -> list[Tensor]:
    """Integer outputs, such as classes, end no path that the graph could follow."""
    return [tensor for tensor in tensors(outputs) if _follows(tensor)]


class _Shapes(TorchFunctionMode):
    """How operations divide a dimension: into chunks, or into two dimensions."""

    def __init__(self) -> None:
        super().__init__()
        self.found: set[int] = set()
        self.runs: set[int] = set()

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        name = getattr(func, "__name__", "")
        if name in ("chunk", "split", "tensor_split", "unbind"):
            self.found.add(len(out))
        elif name in ("view", "reshape", "unflatten") and isinstance(args[0], Tensor):
            for parts, run in _factors(args[0].shape, out.shape):
                self.found.add(parts)
                self.runs.add(run)
        return out


def _factors(before: Sequence[int], after: Sequence[int]) -> Iterator[tuple[int, int]]:
    """a and b, where a dimension of a * b became dimensions that multiply to a, and then b."""
    for start in range(len(after)):
        product = 1
        for size in after[start:-1]:
            product *= size
            rest = after[after.index(size, start) + 1 :]
            if any(product > 1 and product * last in before for last in rest[:1]):
                yield product, rest[0]


@dataclasses.dataclass(frozen=True)
class Divisions:
    """How operations divide channels."""

    parts: frozenset[int]  # into so many: chunks, heads, groups of channels
    runs: frozenset[int]  # of so many consecutive ones each: the width of a head


def divisions(net: nn.Module, inputs: Inputs) -> Divisions:
    with _Shapes() as seen, torch.no_grad():
        forward(net, inputs)
    for module in net.modules():
        if isinstance(module, nn.modules.conv._ConvNd) and not is_depthwise(module):
            seen.found.add(module.groups)
        elif isinstance(module, nn.GroupNorm):
            seen.found.add(module.num_groups)
        elif isinstance(module, nn.MultiheadAttention):
            seen.found.add(module.num_heads)
    return Divisions(frozenset(seen.found - {1}), frozenset(seen.runs - {1}))
