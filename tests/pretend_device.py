"""A device that is none: its tensors lie in ordinary memory, but torch takes them for another
device's, and whatever mixes them with the processor's tensors fails as on a GPU.

It shows that code moves what it must; nothing about a real GPU's speed, memory or rounding.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten
from torch.utils.backend_registration import (
    _DummyBackendModule,
    _setup_privateuseone_for_python_backend,
)

NAME = "pretended"


class There(Tensor):
    """A tensor of the device; `held` is where its values are."""

    held: Tensor

    @staticmethod
    def __new__(cls, held: Tensor) -> There:
        made: There = Tensor._make_wrapper_subclass(
            cls,
            held.shape,
            strides=held.stride(),
            storage_offset=held.storage_offset(),
            dtype=held.dtype,
            device=f"{NAME}:0",
            requires_grad=False,
        )
        made.held = held
        return made

    def __repr__(self) -> str:
        return f"There({self.held})"

    def tolist(self) -> Any:
        return self.held.tolist()

    @classmethod
    def __torch_dispatch__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        return run(func, args, kwargs or {})


ran = 0  # operations on the device


def run(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """On the values themselves, if all tensors are of one device."""
    flat, spec = tree_flatten((args, kwargs))
    there = [value for value in flat if isinstance(value, There)]
    here = [value for value in flat if isinstance(value, Tensor) and not isinstance(value, There)]
    wanted = kwargs.get("device")
    copies = func in (torch.ops.aten._to_copy.default, torch.ops.aten.copy_.default)
    if there and any(value.ndim for value in here) and not copies:
        raise RuntimeError(f"{func}: tensors of {NAME}:0 and cpu")
    held = [value.held if isinstance(value, There) else value for value in flat]
    inner_args, inner_kwargs = tree_unflatten(held, spec)
    if wanted is not None:
        inner_kwargs["device"] = torch.device("cpu")
    goes = bool(there) if wanted is None else torch.device(wanted).type == NAME
    if func is torch.ops.aten.copy_.default:
        goes = isinstance(args[0], There)
    found = func(*inner_args, **inner_kwargs)
    if not goes:
        return found
    global ran
    ran += 1
    if func is torch.ops.aten._to_copy.default and found is inner_args[0]:
        found = found.clone()
    wrapped = tree_map(lambda value: There(value) if isinstance(value, Tensor) else value, found)
    return return_and_correct_aliasing(func, args, kwargs, wrapped)


class _Mode(TorchDispatchMode):
    """For what makes tensors from nothing, or moves them there."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        wanted = kwargs.get("device")
        if wanted is not None and torch.device(wanted).type == NAME:
            return run(func, args, kwargs)
        flat, _ = tree_flatten((args, kwargs))
        if any(isinstance(value, There) for value in flat):
            return run(func, args, kwargs)
        return func(*args, **kwargs)


def _empty_strided(size: Any, stride: Any, *, dtype: Any = None, **options: Any) -> There:
    return There(torch.empty_strided(size, stride, dtype=dtype))


def _copy(to: There, source: Tensor, non_blocking: bool = False) -> There:
    to.held.copy_(source)
    return to


def _register() -> None:
    """`torch.tensor(..., device=...)` asks no mode: it makes a tensor and copies into it."""
    _setup_privateuseone_for_python_backend(NAME, backend_module=_Backend())
    kernels = torch.library.Library("aten", "IMPL")
    kernels.impl("empty_strided", _empty_strided, "PrivateUse1")
    kernels.impl("copy_", _copy, "PrivateUse1")
    _kernels.append(kernels)


class _Backend(_DummyBackendModule):
    """What torch asks of `torch.pretended`."""

    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.bfloat16]


_kernels: list[torch.library.Library] = []  # they last as long as this


@contextlib.contextmanager
def pretended() -> Iterator[torch.device]:
    """The device, as long as the context lasts."""
    if not _kernels:
        _register()
    with _Mode():
        yield torch.device(NAME, 0)
