"""A training state on disk: weights, optimiser momentum and step in one safetensors file.

One file, replaced atomically, so weights and momentum can never come from different moments.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path

import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from nas import file
from nas.errors import NasctlError

#: what an optimiser's state is called here -> in the optimiser
SLOTS = {"momentum": "momentum_buffer", "ema": "ema"}


def save(
    path: Path,
    state: Mapping[str, Tensor],
    step: int,
    fingerprint: str,
    *,
    safe: Mapping[str, Tensor] | None = None,
    notes: str = "",
) -> None:
    """Write a `state` (see below) after `step` steps, and with it an earlier one that may be
    returned to; raises NasctlError when the disk refuses."""
    tensors = {**state, **{f"safe.{name}": tensor for name, tensor in (safe or {}).items()}}
    meta = {"step": str(step), "fingerprint": _digest(fingerprint)}
    write(path, tensors, {**meta, "notes": notes} if notes else meta)


def load(path: Path, net: nn.Module, optimiser: torch.optim.Optimizer, fingerprint: str) -> int:
    """Fill `net` and `optimiser` from `path`; return the steps done (0 if there is no file)."""
    if not path.exists():
        return 0
    tensors, meta = read(path)
    if meta.get("fingerprint") != _digest(fingerprint):
        raise NasctlError(
            "the saved training state belongs to another recipe or other data",
            where=str(path),
            next="Use --force to train again, or another --run.",
        )
    restore(tensors, net, optimiser, path)
    return int(meta["step"])


def safe(path: Path) -> tuple[dict[str, Tensor], str]:
    """The earlier state and the notes in a saved one; nothing if there is no file."""
    if not path.exists():
        return {}, ""
    tensors, meta = read(path)
    found = {k.removeprefix("safe."): t for k, t in tensors.items() if k.startswith("safe.")}
    return found, meta.get("notes", "")


def state(net: nn.Module, optimiser: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Everything that a step changes, by name; the tensors themselves, not copies."""
    tensors = {f"net.{name}": tensor for name, tensor in net.state_dict().items()}
    for name, parameter in net.named_parameters():
        for ours, theirs in SLOTS.items():
            if (value := optimiser.state.get(parameter, {}).get(theirs)) is not None:
                tensors[f"{ours}.{name}"] = value
    return tensors


def restore(
    tensors: Mapping[str, Tensor], net: nn.Module, optimiser: torch.optim.Optimizer, path: Path
) -> None:
    """The inverse of `state`, with copies; `path` is blamed for a tensor that does not fit."""
    fill(net, {name[4:]: t for name, t in tensors.items() if name.startswith("net.")}, path)
    for name, parameter in net.named_parameters():
        for ours, theirs in SLOTS.items():
            optimiser.state[parameter].pop(theirs, None)
            if (value := tensors.get(f"{ours}.{name}")) is not None:
                # empty_like keeps the memory format, on which bit-equal resuming depends
                optimiser.state[parameter][theirs] = torch.empty_like(parameter).copy_(value)


def fill(net: nn.Module, state: dict[str, Tensor], path: Path) -> None:
    """Copy `state` into `net`; raises NasctlError naming the first tensor that does not fit."""
    for name, tensor in net.state_dict().items():
        if name not in state or state[name].shape != tensor.shape:
            found = tuple(state[name].shape) if name in state else "nothing"
            raise NasctlError(
                f"tensor {name}: found {found}, the network needs {tuple(tensor.shape)}",
                where=str(path),
                next="The file was written for another space or task.",
            )
        tensor.copy_(state[name])
    if more := sorted(set(state) - set(net.state_dict())):
        raise NasctlError(
            f"tensor {more[0]}: the network has none of that name",
            where=str(path),
            next="The file was written for another space or kind of training.",
        )


def write(path: Path, tensors: dict[str, Tensor], meta: dict[str, str]) -> None:
    data = safetensors.torch.save({k: t.detach().contiguous() for k, t in tensors.items()}, meta)
    file.write(path, data)


def read(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    try:
        with safe_open(path, framework="pt") as opened:
            return {k: opened.get_tensor(k) for k in opened.keys()}, opened.metadata() or {}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise NasctlError(
            f"damaged or not a safetensors file ({error})",
            where=str(path),
            next="Delete it to train this stage again; the rest of the run is kept.",
        ) from error


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
