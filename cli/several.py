"""The file of a network that a search for several tasks found: what it says of itself, and reading
it again, for whoever goes on with it (`nasctl prune`, `nasctl verify`)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from cli.many_tasks_stages import TasksSpec
from deploy import interface, onnx
from deploy.interface import Interface
from nas import checkpoint, multitask
from nas.data import module
from nas.elastic import channels_last
from nas.errors import NasctlError
from nas.multitask import MultiTask
from nas.multitask_search import space_for
from nas.outputs import ONLY
from nas.search_spaces.fbnetv5 import Space

SEVERAL = "several"  # the entry of a description that other files do not have


@dataclass(frozen=True, eq=False)
class Read:
    """A network in eval mode, with the task that it answers."""

    net: nn.Module
    task: MultiTask
    genes: list[int]
    interface: Interface
    licence: str  # of its weights, as stated when they were searched; "" where nobody did


def describe(
    spec: TasksSpec, task: MultiTask, space: Space, genes: Sequence[int]
) -> dict[str, Any]:
    """What the network's weights say of themselves; `task` has the goals that it answers."""
    said = checkpoint.describe(spec.space, spec.width, space, task.fingerprint)
    names = [goal.name for goal in task.goals]
    more = {"data": spec.data, "size": spec.size, "tasks": names, "genes": list(genes)}
    return {**said, SEVERAL: more, **onnx.licensed(spec.licence)}


def described(meta: Mapping[str, str], path: Path) -> dict[str, Any] | None:
    """The description of weights, if they are of such a network."""
    if not meta:
        return None
    said = checkpoint.description(meta, path)
    return said if SEVERAL in said else None


def read(path: Path, data: str | None) -> Read:
    """The network of a file, and its data (at `data`, if they are not where they were).

    Raises NasctlError for another file, for data that are not those it was trained on, and for data
    that are code which the user did not name.
    """
    tensors, meta = checkpoint.read(path)
    said = described(meta, path)
    if said is None:
        raise NasctlError("is not of a search for several tasks", where=str(path))
    more = said[SEVERAL]
    module.require_typed(data, more["data"])
    reference = data or more["data"]
    task = multitask.load(reference, size=more["size"]).only(more["tasks"])
    space = space_for(task, said["width"])
    here = checkpoint.describe(said["space"], said["width"], space, task.fingerprint)
    if differs := checkpoint.difference(said, here):
        raise NasctlError(differs, where=str(path), next="Train it again, or name its own --data.")
    net = channels_last(space.build(space.decode(np.array(more["genes"]))))
    checkpoint.fill(net, tensors, path)
    found = interface_of(task, reference, more["size"])
    return Read(net.eval(), task, more["genes"], found, said.get("licence", ""))


def interface_of(task: MultiTask, data: str, size: int | None) -> Interface:
    """Of such a network's file: one output alone has no name of its own."""
    found = interface.of_tasks(task, data, size)
    return found if len(task.goals) > 1 else found.model_copy(update={"outputs": (ONLY,)})
