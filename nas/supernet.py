"""Train one weight-sharing network whose every sub-network works: sandwich rule with in-place
distillation (BigNAS, arXiv 2003.11142, section 3.1; universally slimmable networks, 1903.05134).

Each step runs the largest, the smallest and `n_random` other networks on the same images, each at
its own resolution. The largest learns from labels and is regularised; the others learn only its
prediction of the same step (`nas.distillation`). The four gradients are averaged (several published
codes sum them: divide their learning rates by four) and the optimiser steps once, so weight decay
acts once, as the largest network's.

Everything random is a function of (seed, step, shard), never of a generator's history, so a run
continues from a checkpoint exactly as if it had not stopped. The device is the network's own. In a
torch process group every process trains its shards of each step (`nas.parallel`).
"""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections.abc import Generator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nas import checkpoint, parallel
from nas.collapse import MAX_HALVINGS, Watch
from nas.data.augment import augment
from nas.data.randaugment import cutout, randaugment
from nas.distillation import Lesson
from nas.elastic import Network, Noise, resize
from nas.errors import NasctlError
from nas.judge import Score, calibrate, calibration_images, child, device_of, evaluate
from nas.recipe import Recipe
from nas.sampling import Archs, Contest, alone, sandwich
from nas.tasks import Split, Task

# one name for training and judging, which callers do in turn
__all__ = [
    "Archs",
    "Recipe",
    "Score",
    "Step",
    "alone",
    "batch_indices",
    "calibrate",
    "calibration_images",
    "child",
    "evaluate",
    "sandwich",
    "train",
]

SAFE_EVERY = 100  # steps between the states that a collapse can return to
AUGMENT, NOISE = 0, 1  # streams of a step's random numbers


@dataclass(frozen=True)
class Step:
    """What a training step reports. After a collapse `step` is where the training returned to."""

    step: int  # steps done so far
    steps: int
    losses: tuple[float, ...]  # of each network, in the order of the step's architectures
    halvings: int = 0  # how often a collapse has halved the learning rate


def batch_indices(n: int, batch: int, step: int, seed: int) -> Tensor:
    """The images of one step: epochs are private permutations of (seed, epoch), read in order."""
    batch = min(batch, n)
    epoch, at = divmod(step, n // batch)
    order = np.random.default_rng((seed, 1, epoch)).permutation(n)
    return torch.from_numpy(order[at * batch : (at + 1) * batch])


@dataclass
class _Progress:
    """Where a training is, beside its weights and momentum: saved and resumed with them."""

    done: int = 0
    watch: Watch = field(default_factory=Watch)
    safe_step: int = -1  # none yet
    safe: dict[str, Tensor] = field(default_factory=dict)


def train(
    net: nn.Module,
    archs: Archs,
    task: Task,
    recipe: Recipe,
    *,
    teacher: Network | None = None,
    resume: Path | None = None,
    save_every_s: float = 20.0,
) -> Generator[Step, None, None]:
    """Train `net` in place, yielding after each step. `archs(step)` are the architectures it runs
    (or a Contest for one): the first learns from the labels, the others from the first. With a
    frozen `teacher` (called as it is: put it in eval mode) all learn from labels and from it.

    With `resume`, the state is saved to that file every `save_every_s` seconds and when the caller
    closes the generator, and a state found there is continued. Of several processes the first alone
    reads and writes it; all have to take the same steps and close at the same one.

    A collapse (the loss is not finite, or back at chance for 20 steps) returns to a state of at
    most 100 steps earlier, or the last sound one, with half the learning rate; after
    MAX_HALVINGS of these, NasctlError. Also NasctlError if the file belongs to another recipe or a
    batch does not fit the device's memory, or if another process is gone.
    """
    workers = parallel.workers()
    net.train()
    optimiser = _optimiser(net, recipe)
    taught_by = "" if teacher is None else f" {_digest(teacher)}"
    fingerprint = f"{recipe} {task.fingerprint}{taught_by}"
    now = _loaded(resume, net, optimiser, fingerprint) if resume else _Progress()
    task = _placed(task, device_of(net))
    chance = math.log(task.n_classes) if task.loss is F.cross_entropy else math.inf

    def save() -> None:
        if resume and workers.first:
            notes = json.dumps({"watch": asdict(now.watch), "safe_step": now.safe_step})
            done, safe = now.done, now.safe
            checkpoint.save(resume, net, optimiser, done, fingerprint, extra=safe, notes=notes)

    saved_at = time.monotonic()
    while now.done < recipe.steps:
        found = _gradients_that_fit(net, archs(now.done), teacher, task, recipe, now.done)
        workers.sum_([*(p.grad for p in net.parameters() if p.grad is not None), found])
        losses = tuple(found.tolist())
        now.watch = now.watch.after(losses, chance)
        if now.watch.collapsed:
            _roll_back(now, net, optimiser, recipe)
        else:
            if now.done % SAFE_EVERY == 0 and now.watch.calm:
                # before the update: these weights are known to give a finite loss
                state = checkpoint.state(net, optimiser)
                now.safe = {name: tensor.to("cpu", copy=True) for name, tensor in state.items()}
                now.safe_step = now.done
            _update(net, optimiser, recipe, now)
            now.done += 1
        due = now.done == recipe.steps or time.monotonic() - saved_at > save_every_s
        if due:
            save()
            saved_at = time.monotonic()
        try:
            yield Step(now.done, recipe.steps, losses, now.watch.halvings)
        except GeneratorExit:
            # The caller stops between two steps, where weights and momentum agree. (An interrupt
            # inside a step is not caught: the file of the last save stands.)
            if not due:
                save()
            raise


def _loaded(
    resume: Path, net: nn.Module, optimiser: torch.optim.Optimizer, fingerprint: str
) -> _Progress:
    done = checkpoint.load(resume, net, optimiser, fingerprint)
    safe, notes = checkpoint.extra(resume)
    if not notes:
        return _Progress(done)
    said = json.loads(notes)
    return _Progress(done, Watch(**said["watch"]), said["safe_step"], safe)


def _digest(teacher: nn.Module) -> str:
    digest = hashlib.sha256()
    for tensor in teacher.state_dict().values():
        digest.update(tensor.cpu().contiguous().numpy().data)
    return digest.hexdigest()


def _placed(task: Task, device: torch.device) -> Task:
    """With the training images on the device, if they take at most half of its free memory."""
    images, labels = task.train.images, task.train.labels
    if device.type != "cuda" or images.nbytes > torch.cuda.mem_get_info(device)[0] / 2:
        return task
    return replace(task, train=Split(images.to(device), labels.to(device)))


def _roll_back(
    now: _Progress, net: nn.Module, optimiser: torch.optim.Optimizer, recipe: Recipe
) -> None:
    optimiser.zero_grad(set_to_none=True)
    halvings = now.watch.halvings
    if now.safe_step < 0 or halvings == MAX_HALVINGS:
        why = "the loss is back at chance" if now.watch.finite else "the loss is not finite"
        also = f", and was so at 1/{2**halvings} of the rate" if halvings else ""
        raise NasctlError(
            f"training diverged at step {now.done + 1}: {why}{also}",
            where="--lr",
            next=f"Try --lr {recipe.lr / 2**halvings / 3:.2g}.",
        )
    checkpoint.restore(now.safe, net, optimiser, Path("the last sound state"))
    now.done, now.watch = now.safe_step, now.watch.rolled_back()


# ---- one step ------------------------------------------------------------------------------------


def _optimiser(net: nn.Module, recipe: Recipe) -> torch.optim.Optimizer:
    matrices = [p for p in net.parameters() if p.ndim > 1]
    vectors = [p for p in net.parameters() if p.ndim <= 1]
    return torch.optim.SGD(
        [
            {"params": matrices, "weight_decay": recipe.weight_decay},
            {"params": vectors, "weight_decay": 0.0},
        ],
        lr=recipe.lr,
        momentum=recipe.momentum,
        nesterov=True,
    )


@dataclass(frozen=True)
class _Batch:
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


def _batches(task: Task, recipe: Recipe, step: int, device: torch.device) -> list[_Batch]:
    """This process's shards of a step."""
    rows = batch_indices(len(task.train), recipe.batch, step, recipe.seed)
    parts = parallel.workers().shards(len(rows), recipe.accumulate)
    made = []
    for shard, part in parts:
        at = rows[part].to(task.train.images.device)
        images, labels = task.train.images[at].to(device), task.train.labels[at].to(device)
        x = _inputs(task, recipe, images, _generator(recipe, step, shard, AUGMENT))
        noise = _noise(recipe, _generator(recipe, step, shard, NOISE))
        made.append(_Batch(x, labels, len(at) / len(rows), noise))
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
    # torch seeds from the low 32 bits; multiples of this (2^32 over the golden ratio) lie far apart
    apart = (2 * shard + stream) * 0x9E3779B1
    return torch.Generator().manual_seed(recipe.seed * 1_000_003 + step + apart)


def _gradients(
    net: nn.Module,
    archs: list[Any],
    teacher: Network | None,
    task: Task,
    recipe: Recipe,
    step: int,
) -> Tensor:
    """Adds this process's part of the gradient of the networks' mean loss over the step's images;
    returns its part of each one's loss."""
    device = device_of(net)
    batches = _batches(task, recipe, step, device)
    losses = torch.zeros(len(archs), device=device)
    with torch.autocast(device.type, torch.bfloat16, enabled=recipe.bf16):
        archs = [_winner(net, a, batches, task) if isinstance(a, Contest) else a for a in archs]
    for batch in batches:
        losses += batch.share * _taught(net, archs, teacher, batch, task, recipe)
    return losses


def _taught(
    net: nn.Module,
    archs: list[Any],
    teacher: Network | None,
    batch: _Batch,
    task: Task,
    recipe: Recipe,
) -> Tensor:
    """The losses of the networks on a shard, whose gradients it adds."""
    precision = torch.autocast(batch.images.device.type, torch.bfloat16, enabled=recipe.bf16)
    taught: Tensor | None = None
    if teacher is not None:
        with precision, torch.no_grad():
            taught = teacher(batch.at(teacher.arch.resolution)).float()
    lesson = Lesson(task, recipe, batch.labels, taught)
    largest: Tensor | None = None
    losses: list[Tensor] = []
    for arch in archs:
        with precision:
            noise = batch.noise if largest is None else None
            logits = _logits(net, batch, arch, noise).float()
        loss = lesson.loss(logits, largest)
        if largest is None:
            largest = logits.detach()
        (batch.share * loss / len(archs)).backward()
        losses.append(loss.detach())
    return torch.stack(losses)


def _noise(recipe: Recipe, generator: torch.Generator) -> Noise | None:
    if not (recipe.dropout or recipe.drop_connect):
        return None
    return Noise(recipe.dropout, recipe.drop_connect, generator)


def _logits(net: nn.Module, batch: _Batch, arch: Any, noise: Noise | None) -> Tensor:
    x = batch.at(arch.resolution)
    return net(x, arch) if noise is None else net(x, arch, noise)


@torch.no_grad()
def _winner(net: nn.Module, contest: Contest, batches: list[_Batch], task: Task) -> Any:
    """By the loss on all of the step's images, so that every process takes the same one."""
    rated = torch.zeros(len(contest.archs), device=device_of(net))
    for batch in batches:
        each = [
            task.loss(_logits(net, batch, arch, None).float(), batch.labels)
            for arch in contest.archs
        ]
        rated += batch.share * torch.stack(each)
    parallel.workers().sum_([rated])
    best = rated.argmax() if contest.worst else rated.argmin()
    return contest.archs[int(best)]


def _update(
    net: nn.Module, optimiser: torch.optim.Optimizer, recipe: Recipe, now: _Progress
) -> None:
    for group in optimiser.param_groups:
        group["lr"] = recipe.lr_at(now.done) / 2**now.watch.halvings
    nn.utils.clip_grad_norm_(net.parameters(), recipe.clip_norm)
    optimiser.step()
    optimiser.zero_grad(set_to_none=True)
    if recipe.ema:
        _average(net, optimiser, recipe, now.done)


@torch.no_grad()
def _average(net: nn.Module, optimiser: torch.optim.Optimizer, recipe: Recipe, step: int) -> None:
    """Keep the moving average of the weights; after the last step it becomes the weights."""
    decay = min(recipe.ema, (1 + step) / (10 + step))  # else the start would weigh on short runs
    for parameter in net.parameters():
        average = optimiser.state[parameter].setdefault("ema", parameter.detach().clone())
        average.lerp_(parameter, 1 - decay)
        if step + 1 == recipe.steps:
            parameter.copy_(average)


def _gradients_that_fit(
    net: nn.Module,
    archs: list[Any],
    teacher: Network | None,
    task: Task,
    recipe: Recipe,
    step: int,
) -> Tensor:
    """`_gradients`; a lack of device memory becomes one line that says which batch would fit."""
    try:
        return _gradients(net, archs, teacher, task, recipe, step)
    except torch.OutOfMemoryError as error:
        full = str(error)  # the traceback holds the step's tensors: let go of it before probing
    if parallel.workers().size > 1:  # a probe would leave the others waiting
        raise NasctlError(
            f"this process's device does not hold its images of a step ({full.splitlines()[0]})",
            where="--batch",
            next="Ask for a smaller one, or for more --accumulate.",
        )
    batch, least = recipe.batch // 2, 2 * recipe.accumulate
    while batch >= least:
        net.zero_grad(set_to_none=True)
        try:
            _gradients(net, archs, teacher, task, replace(recipe, batch=batch), step)
        except torch.OutOfMemoryError:
            batch //= 2
        else:
            break
    fits = f"--batch {batch} fits." if batch >= least else f"Not even a batch of {least} fits."
    raise NasctlError(
        f"the device's memory does not hold a batch of {recipe.batch} ({full.splitlines()[0]})",
        where="--batch",
        next=fits,
    )
