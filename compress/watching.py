"""Any torch module as a teacher or student: what chosen parts of it compute (`nas.seen.Seen`)."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence

from torch import Tensor, nn

from nas.errors import UsageError
from nas.seen import Seen

Look = Callable[[Tensor], Seen]


@contextlib.contextmanager
def watching(net: nn.Module, names: Sequence[str]) -> Iterator[Look]:
    """A function `x -> Seen` with the outputs of the named submodules as features, in that order,
    and the network's own as logits. Raises UsageError for a name that it lacks.
    """
    caught: dict[str, Tensor] = {}
    modules = dict(net.named_modules())
    if missing := [name for name in names if name not in modules]:
        near = [name for name in modules if name and not any(modules[name].children())]
        raise UsageError(f"no submodule '{missing[0]}'", where="features", allowed=near[:20])

    def note(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, inputs: object, output: Tensor) -> None:
            caught[name] = output

        return hook

    def look(x: Tensor) -> Seen:
        caught.clear()
        logits = net(x)
        return Seen(tuple(caught[name] for name in names), logits=logits)

    hooks = [modules[name].register_forward_hook(note(name)) for name in names]
    try:
        yield look
    finally:
        for hook in hooks:
            hook.remove()
