"""A training state on disk: weights, optimiser momentum and step in one safetensors file.

One file, replaced atomically, so weights and momentum can never come from different moments.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from nas import file
from nas.errors import NasctlError


def save(
    path: Path, net: nn.Module, optimiser: torch.optim.Optimizer, step: int, fingerprint: str
) -> None:
    """Write weights, momentum and `step`; raises NasctlError when the disk refuses."""
    tensors = {f"net.{name}": tensor for name, tensor in net.state_dict().items()}
    for name, parameter in net.named_parameters():
        momentum = optimiser.state.get(parameter, {}).get("momentum_buffer")
        if momentum is not None:
            tensors[f"momentum.{name}"] = momentum
    write(path, tensors, {"step": str(step), "fingerprint": _digest(fingerprint)})


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
    state = {name[4:]: t for name, t in tensors.items() if name.startswith("net.")}
    fill(net, state, path)
    for name, parameter in net.named_parameters():
        if f"momentum.{name}" in tensors:
            # empty_like keeps the parameter's memory format, on which bit-equal resuming depends
            buffer = torch.empty_like(parameter).copy_(tensors[f"momentum.{name}"])
            optimiser.state[parameter]["momentum_buffer"] = buffer
    return int(meta["step"])


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
