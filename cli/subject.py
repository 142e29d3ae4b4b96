"""What `nasctl prune` works on: a trained network of anybody's, and the tasks it is judged by."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from cli import child, several
from cli.training import require_search
from deploy import interface
from deploy.interface import Interface
from nas import checkpoint, multitask
from nas.data import module
from nas.errors import NasctlError, UsageError
from nas.judge import device_of
from nas.multitask import MultiTask
from nas.outputs import named
from nas.run import Run

FORMS = "my_pkg.my_mod:build, a network's .safetensors, or a run of ours that is finished"
OWN = "model.safetensors"  # of a finished run


@dataclass(frozen=True, eq=False)
class Subject:
    """`net` is trained, in eval mode and fits `task`."""

    net: nn.Module
    task: MultiTask
    origin: dict[str, Any]  # what builds the unpruned network again
    interface: Interface  # of its file
    licence: str = ""  # of its weights, where their file states one

    @property
    def example(self) -> Tensor:
        """One image, as the network is fed, where it is."""
        return self.task.normalise(self.task.train.images[:1].to(device_of(self.net)))


def load(
    model: str, weights: Path | None, data: str | None, size: int | None, tasks: Sequence[str]
) -> Subject:
    """The network that `model` names with its data; `tasks` are some of the data's goals, or none
    for all.

    Raises UsageError or NasctlError for what cannot be built, fed or judged.
    """
    if module.is_reference(model):
        net, task, origin, found = _users(model, weights, data, size)
        licence = ""
    else:
        net, task, origin, found, licence = _ours(model, weights, data, size)
    if tasks:
        task = task.only(tasks)
    outputs = _check_answers(net, task, model)
    goals = tuple(goal.name for goal in task.goals)
    found = found.model_copy(update={"goals": goals, "outputs": tuple(outputs)})
    return Subject(net, task, origin, found, licence)


def _users(
    model: str, weights: Path | None, data: str | None, size: int | None
) -> tuple[nn.Module, MultiTask, dict[str, Any], Interface]:
    if data is None:
        raise UsageError("no data for a model of your own", where="--data", allowed=multitask.FORMS)
    task = multitask.load(data, size=size)
    net, origin = built(model, weights)
    return net, task, origin, interface.of_tasks(task, data, size)


def built(model: str, weights: Path | None) -> tuple[nn.Module, dict[str, Any]]:
    """The network that a user's `my_pkg.my_mod:build` gives, in eval mode, and what builds it.

    Raises UsageError or NasctlError for what gives none, or has no place for the weights.
    """
    net = module.call(module.attribute(model, "MODEL"), "MODEL")
    if not isinstance(net, nn.Module):
        raise NasctlError(f"gave a {type(net).__name__}", where=model, allowed="a torch module")
    if weights is not None:
        checkpoint.fill(net, checkpoint.read(weights)[0], weights)
    return net.eval(), {"model": model, "weights": weights and str(weights)}


def _ours(
    model: str, weights: Path | None, data: str | None, size: int | None
) -> tuple[nn.Module, MultiTask, dict[str, Any], Interface, str]:
    path = Path(model)
    if path.is_dir():
        recorded = Run(path).manifest().get("spec", {})
        if not recorded.get("together"):
            require_search(recorded, path)
        path /= OWN
    if not path.is_file():
        raise UsageError(f"no model '{model}'", where="MODEL", allowed=FORMS)
    for flag, value in (("--weights", weights), ("--size", size)):
        if value is not None:
            raise UsageError("a network of ours knows its own", where=flag, next="Leave it out.")
    if several.described(checkpoint.read(path)[1], path):
        read = several.read(path, data)
        origin = {"model": str(path), "genes": read.genes}
        return read.net, read.task, origin, read.interface, read.licence
    training, genes, net = child.read(path, data)
    resolution = training.space.decode(genes).resolution
    task = multitask.single(training.task, resolution)
    spec, (mean, std) = training.spec, task.moments
    found = interface.of_task(training.task, spec.data, spec.size, resolution)
    found = found.model_copy(update={"mean": mean, "std": std})  # of the resized images
    return net, task, {"model": str(path), "genes": genes.tolist()}, found, spec.licence


@torch.no_grad()
def _check_answers(net: nn.Module, task: MultiTask, model: str) -> list[str]:
    """The names of what the network gives, after checking that it takes the images and that every
    goal can judge what it gives."""
    images, targets = next(task.batches(task.val, 2))
    try:
        given = net(images)
        outputs = multitask.answers(given, task)
    except (RuntimeError, TypeError, ValueError) as error:
        raise NasctlError(
            f"it does not run on images of {list(task.shape)} ({str(error).splitlines()[0]})",
            where=model,
            next="Name the --size it was trained for, or other data.",
        ) from error
    for goal in task.goals:
        try:
            goal.loss(outputs, targets)
        except (RuntimeError, IndexError, TypeError, ValueError) as error:
            raise NasctlError(
                f"output '{goal.name}' of {list(outputs[goal.name].shape)} does not fit its "
                f"targets ({str(error).splitlines()[0]})",
                where=model,
            ) from error
    return list(named(given))
