"""The gradient of one training step: its images, and the networks that run on them one by one.

Backward follows each forward pass, so memory holds one network's activations at a time. Everything
random is drawn on the CPU from (seed, step), so a seed means the same on every device.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from nas.data.augment import augment
from nas.data.randaugment import cutout, randaugment
from nas.distillation import Lesson
from nas.elastic import Network, Noise, resize
from nas.errors import NasctlError
from nas.judge import device_of
from nas.recipe import Recipe
from nas.sampling import Contest
from nas.tasks import Split, Task

AUGMENT, NOISE = 0, 0x7F4A7C15  # streams; torch seeds from the low 32 bits, where these lie apart


@dataclass(frozen=True)
class Course:
    """What a training teaches, and how; `teacher` is frozen, or None."""

    task: Task
    recipe: Recipe
    teacher: Network | None = None

    def on(self, device: torch.device) -> Course:
        """With the training images on the device, if they take at most half of its free memory."""
        images, labels = self.task.train.images, self.task.train.labels
        if device.type != "cuda" or images.nbytes > torch.cuda.mem_get_info(device)[0] / 2:
            return self
        there = Split(images.to(device), labels.to(device))
        return replace(self, task=replace(self.task, train=there))


@dataclass(frozen=True)
class Batch:
    """A step's normalised, augmented images, and the same at other resolutions."""

    images: Tensor
    labels: Tensor
    resized: dict[int, Tensor] = field(default_factory=dict)

    def at(self, resolution: int) -> Tensor:
        if resolution not in self.resized:
            self.resized[resolution] = resize(self.images, resolution)
        return self.resized[resolution]


def batch_indices(n: int, batch: int, step: int, seed: int) -> Tensor:
    """The images of one step: epochs are private permutations of (seed, epoch), read in order."""
    batch = min(batch, n)
    epoch, at = divmod(step, n // batch)
    order = np.random.default_rng((seed, 1, epoch)).permutation(n)
    return torch.from_numpy(order[at * batch : (at + 1) * batch])


def batch(course: Course, step: int, device: torch.device) -> Batch:
    task, recipe = course.task, course.recipe
    at = batch_indices(len(task.train), recipe.batch, step, recipe.seed)
    at = at.to(task.train.images.device)
    images, labels = task.train.images[at].to(device), task.train.labels[at].to(device)
    generator = _generator(recipe, step, AUGMENT)
    images = augment(images, generator, flip=task.flip, pad=task.pad)
    if recipe.operations:
        images = randaugment(
            images, generator, operations=recipe.operations, magnitude=recipe.magnitude
        )
    if recipe.cutout:
        images = cutout(images, generator, share=recipe.cutout)
    x = task.normalise(images).contiguous(memory_format=torch.channels_last)
    return Batch(x, labels)


def _generator(recipe: Recipe, step: int, stream: int) -> torch.Generator:
    return torch.Generator().manual_seed(recipe.seed * 1_000_003 + step + stream)


def gradients(net: nn.Module, archs: Sequence[Any], course: Course, step: int) -> tuple[float, ...]:
    """Adds the gradient of the networks' mean loss to `net`; returns each one's loss.

    A lack of device memory becomes one line that says which batch would fit.
    """
    try:
        return _gradients(net, archs, course, step)
    except torch.OutOfMemoryError as error:
        full = str(error).partition("\n")[0]
    # out of the handler, whose traceback would keep the failed step's tensors alive
    size, recipe = course.recipe.batch // 2, course.recipe
    while size >= 2 and not _fits(net, archs, replace(course, recipe=replace(recipe, batch=size))):
        size //= 2
    raise NasctlError(
        f"the device's memory does not hold a batch of {recipe.batch} ({full})",
        where="--batch",
        next=f"--batch {size} fits." if size >= 2 else "Not even a batch of 2 fits.",
    )


def _fits(net: nn.Module, archs: Sequence[Any], course: Course) -> bool:
    try:
        _gradients(net, archs, course, 0)
    except torch.OutOfMemoryError:
        return False
    finally:
        net.zero_grad(set_to_none=True)
    return True


def _gradients(
    net: nn.Module, archs: Sequence[Any], course: Course, step: int
) -> tuple[float, ...]:
    device, recipe = device_of(net), course.recipe
    images = batch(course, step, device)
    precision = torch.autocast(device.type, torch.bfloat16, enabled=recipe.bf16)
    with precision:
        taught = _taught(course, images)
    lesson = Lesson(course.task, recipe, images.labels, taught)
    largest: Tensor | None = None
    losses: list[Tensor] = []
    for entry in archs:
        with precision:
            arch = _winner(net, entry, images, course) if isinstance(entry, Contest) else entry
            noise = _noise(recipe, step) if largest is None else None
            logits = _logits(net, images, arch, noise)
        loss = lesson.loss(logits, largest)
        if largest is None:
            largest = logits.detach()
        (loss / len(archs)).backward()
        losses.append(loss.detach())
    return tuple(torch.stack(losses).tolist())  # one wait for the device


@torch.no_grad()
def _taught(course: Course, images: Batch) -> Tensor | None:
    if course.teacher is None:
        return None
    return course.teacher(images.at(course.teacher.arch.resolution)).float()


def _noise(recipe: Recipe, step: int) -> Noise | None:
    if not (recipe.dropout or recipe.drop_connect):
        return None
    return Noise(recipe.dropout, recipe.drop_connect, _generator(recipe, step, NOISE))


def _logits(net: nn.Module, images: Batch, arch: Any, noise: Noise | None) -> Tensor:
    x = images.at(arch.resolution)
    logits = net(x, arch) if noise is None else net(x, arch, noise)
    return logits.float()


@torch.no_grad()
def _winner(net: nn.Module, contest: Contest, images: Batch, course: Course) -> Any:
    loss = course.task.loss
    rated = [float(loss(_logits(net, images, a, None), images.labels)) for a in contest.archs]
    return contest.archs[int(np.argmax(rated) if contest.worst else np.argmin(rated))]
