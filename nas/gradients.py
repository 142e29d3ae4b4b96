"""The gradient of one training step: its images, and the networks that run on them one by one.

Backward follows each forward pass, so memory holds one network's activations at a time. Everything
random is drawn on the CPU from (seed, step, shard), so a seed means the same on every device. How a
step's images are cut into shards, over processes and in time, is `nas.parallel`'s.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from nas import parallel
from nas.data.augment import augment
from nas.data.randaugment import cutout, randaugment
from nas.distillation import Lesson
from nas.elastic import Network, Noise, resize
from nas.errors import NasctlError
from nas.judge import device_of
from nas.recipe import Recipe
from nas.sampling import Contest
from nas.tasks import Split, Task

AUGMENT, NOISE = 0, 1  # streams of a shard's random numbers
APART = (
    0x9E3779B1  # 2^32 over the golden ratio: its multiples lie far apart in torch's 32-bit seeds
)


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
    """A shard's normalised, augmented images, and the same at other resolutions."""

    images: Tensor
    labels: Tensor
    share: float  # of the step's images
    noise: Noise | None  # for the largest network
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


def batches(
    course: Course, step: int, device: torch.device, among: range | None = None
) -> list[Batch]:
    """This process's shards of a step, of all training images or of those `among` them."""
    task, recipe = course.task, course.recipe
    among = among or range(len(task.train))
    rows = among.start + batch_indices(len(among), recipe.batch, step, recipe.seed)
    made = []
    for shard, part in parallel.workers().shards(len(rows), recipe.accumulate):
        at = rows[part].to(task.train.images.device)
        images, labels = task.train.images[at].to(device), task.train.labels[at].to(device)
        x = _inputs(task, recipe, images, _generator(recipe, step, shard, AUGMENT))
        noise = _noise(recipe, _generator(recipe, step, shard, NOISE))
        made.append(Batch(x, labels, len(at) / len(rows), noise))
    return made


def _inputs(task: Task, recipe: Recipe, images: Tensor, generator: torch.Generator) -> Tensor:
    images = augment(images, generator, flip=task.flip, pad=task.pad)
    if recipe.operations:
        images = randaugment(
            images, generator, operations=recipe.operations, magnitude=recipe.magnitude
        )
    if recipe.cutout:
        images = cutout(images, generator, share=recipe.cutout)
    return task.normalise(images).contiguous(memory_format=torch.channels_last)


def _generator(recipe: Recipe, step: int, shard: int, stream: int) -> torch.Generator:
    apart = (2 * shard + stream) * APART
    return torch.Generator().manual_seed(recipe.seed * 1_000_003 + step + apart)


def gradients(net: nn.Module, archs: Sequence[Any], course: Course, step: int) -> Tensor:
    """Adds this process's part of the gradient of the networks' mean loss over the step's images to
    `net`; returns its part of each one's loss.

    A lack of device memory becomes one line that says which batch would fit.
    """
    try:
        return _gradients(net, archs, course, step)
    except torch.OutOfMemoryError as error:
        full = str(error).partition("\n")[0]
    # out of the handler, whose traceback would keep the failed step's tensors alive
    if parallel.workers().size > 1:  # a probe would leave the others waiting
        raise NasctlError(
            f"this process's device does not hold its images of a step ({full})",
            where="--batch",
            next="Ask for a smaller one, or for more --accumulate.",
        )
    size, recipe = course.recipe.batch // 2, course.recipe
    least = 2 * recipe.accumulate
    while size >= least and not _fits(
        net, archs, replace(course, recipe=replace(recipe, batch=size))
    ):
        size //= 2
    raise NasctlError(
        f"the device's memory does not hold a batch of {recipe.batch} ({full})",
        where="--batch",
        next=f"--batch {size} fits." if size >= least else f"Not even a batch of {least} fits.",
    )


def _fits(net: nn.Module, archs: Sequence[Any], course: Course) -> bool:
    try:
        _gradients(net, archs, course, 0)
    except torch.OutOfMemoryError:
        return False
    finally:
        net.zero_grad(set_to_none=True)
    return True


def _gradients(net: nn.Module, archs: Sequence[Any], course: Course, step: int) -> Tensor:
    device = device_of(net)
    shards = batches(course, step, device)
    with torch.autocast(device.type, torch.bfloat16, enabled=course.recipe.bf16):
        chosen = [_winner(net, a, shards, course) if isinstance(a, Contest) else a for a in archs]
    losses = torch.zeros(len(chosen), device=device)
    for images in shards:
        losses += images.share * _of_shard(net, chosen, course, images)
    return losses


def _of_shard(net: nn.Module, archs: Sequence[Any], course: Course, images: Batch) -> Tensor:
    """The losses of the networks on a shard, whose gradients it adds."""
    device, recipe = images.images.device, course.recipe
    precision = torch.autocast(device.type, torch.bfloat16, enabled=recipe.bf16)
    with precision:
        taught = _taught(course, images)
    lesson = Lesson(course.task, recipe, images.labels, taught)
    largest: Tensor | None = None
    losses: list[Tensor] = []
    for arch in archs:
        with precision:
            noise = images.noise if largest is None else None
            logits = _logits(net, images, arch, noise)
        loss = lesson.loss(logits, largest)
        if largest is None:
            largest = logits.detach()
        (images.share * loss / len(archs)).backward()
        losses.append(loss.detach())
    return torch.stack(losses)


@torch.no_grad()
def _taught(course: Course, images: Batch) -> Tensor | None:
    if course.teacher is None:
        return None
    return course.teacher(images.at(course.teacher.arch.resolution)).float()


def _noise(recipe: Recipe, generator: torch.Generator) -> Noise | None:
    if not (recipe.dropout or recipe.drop_connect):
        return None
    return Noise(recipe.dropout, recipe.drop_connect, generator)


def _logits(net: nn.Module, images: Batch, arch: Any, noise: Noise | None) -> Tensor:
    x = images.at(arch.resolution)
    logits = net(x, arch) if noise is None else net(x, arch, noise)
    return logits.float()


@torch.no_grad()
def _winner(net: nn.Module, contest: Contest, shards: Sequence[Batch], course: Course) -> Any:
    """By the loss on all of the step's images, so that every process takes the same one."""
    rated = torch.zeros(len(contest.archs), device=device_of(net))
    for images in shards:
        each = [
            course.task.loss(_logits(net, images, arch, None), images.labels)
            for arch in contest.archs
        ]
        rated += images.share * torch.stack(each)
    parallel.workers().sum_([rated])
    best = rated.argmax() if contest.worst else rated.argmin()
    return contest.archs[int(best)]
