"""Activations that a change cannot have touched, kept from one network to the next.

Trials of one unit differ from each other in its members only, so whatever runs before the first of
them gives the same activations every time. `Prefix` finds out what that is by watching the first
network run, keeps the outputs of the outermost modules among it, and gives them to the others
instead of running those modules. Nothing is approximated: what is given is what would be computed.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

LIMIT_BYTES = 1 << 30  # kept at most; modules beyond it run


class Prefix:
    """What networks that differ in the modules `changed` share. They must be run on the same
    batches in the same order, as often as they like: each `on` begins with the first."""

    def __init__(self, changed: Collection[str]) -> None:
        self._changed = frozenset(changed)
        self._kept: dict[str, list[Tensor]] | None = None
        self._bytes = self._batch = 0

    @contextmanager
    def on(self, net: nn.Module) -> Iterator[None]:
        """Inside, the first network is watched, and the others are spared what it showed."""
        if self._kept is None:
            self._kept = {}
            with self._watched(net):
                yield
        else:
            with self._spared(net, self._kept):
                yield

    @contextmanager
    def _watched(self, net: nn.Module) -> Iterator[None]:
        call = _Call(self._changed)
        hooks = [net.register_forward_hook(lambda *_: self._keep(call))]
        for name, module in net.named_modules():
            if name:
                hooks.append(module.register_forward_pre_hook(call.entering(name)))
                hooks.append(module.register_forward_hook(call.leaving(name)))
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def _keep(self, call: _Call) -> None:
        assert self._kept is not None
        for name, output in call.finish().items():
            outputs = self._kept.setdefault(name, [])
            self._bytes += output.numel() * output.element_size()
            if self._bytes <= LIMIT_BYTES and len(outputs) == self._batch:  # else one is missing
                outputs.append(output)
        self._batch += 1

    @contextmanager
    def _spared(self, net: nn.Module, kept: dict[str, list[Tensor]]) -> Iterator[None]:
        modules = dict(net.named_modules())
        for name, outputs in kept.items():
            modules[name].forward = _given(outputs, modules[name].forward)
        try:
            yield
        finally:
            for name in kept:
                del modules[name].forward  # the class's own shows again


def _given(outputs: list[Tensor], run: Callable[..., Any]) -> Callable[..., Any]:
    """`outputs` one after the other, and what was not kept by running it."""
    left = iter(outputs)

    def forward(*args: Any, **kwargs: Any) -> Any:
        found = next(left, None)
        return run(*args, **kwargs) if found is None else found

    return forward


class _Call:
    """One forward call as it happens: which modules ended before a changed one began."""

    def __init__(self, changed: frozenset[str]) -> None:
        self._changed = changed
        self._begin()

    def _begin(self) -> None:
        self._entered: dict[str, int] = {}
        self._ended: dict[str, tuple[Tensor, int]] = {}

    def entering(self, name: str) -> Callable[..., None]:
        def hook(*_: Any) -> None:
            self._entered[name] = self._entered.get(name, 0) + 1

        return hook

    def leaving(self, name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            if isinstance(output, Tensor) and self._changed.isdisjoint(self._entered):
                inner = [other for other in self._ended if other.startswith(f"{name}.")]
                for other in inner:
                    del self._ended[other]
                self._ended[name] = output, output._version

        return hook

    def finish(self) -> dict[str, Tensor]:
        """Outputs to keep: of modules that were called once, left alone afterwards. None at all
        where a changed module was not seen to run: its weights may have been used before."""
        kept = {
            name: output
            for name, (output, version) in self._ended.items()
            if self._entered[name] == 1 and output._version == version
        }
        seen = self._changed <= self._entered.keys()
        self._begin()
        return kept if seen else {}
