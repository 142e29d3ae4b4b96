"""What a network returns, as named tensors: a multi-task network gives one or more per task."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from torch import Tensor

ONLY = "logits"  # the name of a network's one and only output


def named(outputs: Any) -> dict[str, Tensor]:
    """The tensors in any nesting of mappings, dataclasses, lists and tuples, in their order.

    A name is the path to the tensor: a mapping's keys (`box`), a sequence's places (`output_0`),
    joined by dots. Anything else than a tensor is left out.
    """
    if isinstance(outputs, Tensor):
        return {ONLY: outputs}
    return {".".join(path): tensor for path, tensor in _walk(outputs)}


def tensors(outputs: Any) -> list[Tensor]:
    """The same tensors without their names."""
    return [tensor for _, tensor in _walk(outputs)]


def changed(outputs: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """The same nesting with another tensor for each, in the order of `tensors`."""
    if isinstance(outputs, Tensor):
        return change(outputs)
    if dataclasses.is_dataclass(outputs) and not isinstance(outputs, type):
        parts = {name: changed(part, change) for name, part in vars(outputs).items()}
        return dataclasses.replace(outputs, **parts)
    if isinstance(outputs, (list, tuple)):
        made = [changed(part, change) for part in outputs]
        return type(outputs)(*made) if hasattr(outputs, "_fields") else type(outputs)(made)
    if isinstance(outputs, Mapping):
        return {key: changed(part, change) for key, part in outputs.items()}
    return outputs


def _walk(outputs: Any) -> Iterator[tuple[tuple[str, ...], Tensor]]:
    if isinstance(outputs, Tensor):
        yield (), outputs
        return
    if dataclasses.is_dataclass(outputs):
        outputs = vars(outputs)
    if isinstance(outputs, (list, tuple)):
        outputs = {f"output_{place}": part for place, part in enumerate(outputs)}
    if isinstance(outputs, Mapping):
        for key, part in outputs.items():
            yield from (((str(key), *path), tensor) for path, tensor in _walk(part))
