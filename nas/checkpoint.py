"""Weights on disk, in safetensors files that say what they are.

A training state is weights, optimiser momentum and step in one file, replaced atomically, so that
weights and momentum can never come from different moments. A supernet, or a network cut from one,
carries a description of the space and the data that it was trained on: whoever reads it compares
that with what is here, and refuses with the difference named.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from nas import file, parallel
from nas.errors import NasctlError
from nas.space import SearchSpace

FORMAT = 1  # of the description; another one cannot be compared with ours
SAID = "nasctl"  # the description's one entry: safetensors writes several in no fixed order

#: what an optimiser's state is called here -> in the optimiser
SLOTS = {
    "momentum": "momentum_buffer",
    "ema": "ema",
    **{"first": "exp_avg", "second": "exp_avg_sq", "updates": "step"},  # Adam's
}


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
    tensors, meta = _shared(path)
    if not tensors:
        return 0
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
    tensors, meta = _shared(path)
    found = {k.removeprefix("safe."): t for k, t in tensors.items() if k.startswith("safe.")}
    return found, meta.get("notes", "")


def _shared(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and metadata, on every process; nothing if there is no file.

    The first process alone reads; the others get the content from it and need no common disk.
    """
    workers = parallel.workers()
    content = workers.share(_content(path) if workers.first and path.exists() else b"")
    return _parse(content, path) if content else ({}, {})


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
                # like the parameter: on its memory format bit-equal resuming depends
                like = parameter if value.shape == parameter.shape else value
                optimiser.state[parameter][theirs] = torch.empty_like(like).copy_(value)


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
    data = safetensors.torch.save(
        {k: t.detach().cpu().contiguous() for k, t in tensors.items()}, meta
    )
    file.write(path, data)


def read(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and metadata of a safetensors file; raises NasctlError if it is none."""
    return _parse(_content(path), path)


def _content(path: Path) -> bytes:
    try:
        content = path.read_bytes()
    except OSError as error:
        raise _damaged(path, str(error)) from error
    if not content:  # which `share` would take for no file at all
        raise _damaged(path, "it is empty")
    return content


def _parse(content: bytes, path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    try:
        tensors = safetensors.torch.load(content)
    except SafetensorError as error:
        raise _damaged(path, str(error)) from error
    # the library reads metadata from files only; it has just found this header to be sound
    header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
    return tensors, header.get("__metadata__", {})


def _damaged(path: Path, why: str) -> NasctlError:
    return NasctlError(
        f"damaged or not a safetensors file ({why})",
        where=str(path),
        next="A file of your own: write it again. One that a run keeps: delete it, and the same "
        "command makes it again.",
    )


def digest(net: nn.Module) -> str:
    """sha256 of all tensors of a network."""
    found = hashlib.sha256()
    for tensor in net.state_dict().values():
        found.update(tensor.cpu().contiguous().numpy().data)
    return found.hexdigest()


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


# ---- what weights were trained on ----------------------------------------------------------------


def describe(name: str, width: float | None, space: SearchSpace, data: str) -> dict[str, Any]:
    """What weights of the space `name` at `width` say of themselves; `data` is a fingerprint.

    The genes with their options are in it because rows of genes mean something else, and tensors
    may still fit, when a space's file changes.
    """
    genes = {gene.name: list(gene.options) for gene in space.genes}
    return {"format": FORMAT, "space": name, "width": width, "data": data, "genes": genes}


def write_described(path: Path, net: nn.Module, description: Mapping[str, Any]) -> None:
    """The weights of `net` with their description inside."""
    write(path, net.state_dict(), {SAID: json.dumps(description)})


def description(meta: Mapping[str, str], path: Path) -> dict[str, Any]:
    """What the file at `path` says of itself, from its metadata."""
    try:
        said = json.loads(meta[SAID])
    except (KeyError, ValueError) as error:
        raise NasctlError(
            "these weights do not say what they were trained on",
            where=str(path),
            next="Only files that nasctl wrote as a supernet or a network can be read.",
        ) from error
    if not isinstance(said, dict) or said.get("format") != FORMAT:
        there = said.get("format") if isinstance(said, dict) else None
        raise NasctlError(
            f"written in format {there} by another version of nasctl, this one reads {FORMAT}",
            where=str(path),
        )
    return said


def difference(there: Mapping[str, Any], here: Mapping[str, Any]) -> str:
    """The first thing in which two descriptions differ, in words; empty if nothing does."""
    for name in ("space", "width"):
        if there.get(name) != here[name]:
            return f"{name} is {there.get(name)} there, {here[name]} here"
    # by content, not by name: training images of the one must not be test images of the other
    if there.get("data") != here["data"]:
        return f"other data (sha256 {str(there.get('data'))[:8]} there, {here['data'][:8]} here)"
    theirs: dict[str, list[int]] = there.get("genes", {})
    for gene in {**here["genes"], **theirs}:
        options, before = here["genes"].get(gene), theirs.get(gene)
        if options != before:
            return f"the space changed: gene {gene} has options {before} there, {options} here"
    return ""
