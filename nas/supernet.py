"""Train one weight-sharing network whose every sub-network works: sandwich rule with in-place
distillation (BigNAS, arXiv 2003.11142, section 3.1; universally slimmable networks, 1903.05134).

Each step runs the largest, the smallest and `n_random` random networks on the same images. The
largest learns from labels; the others learn only its softened prediction of the same step. The four
gradients are averaged (several published codes sum them: divide their learning rates by four) and
the optimiser steps once, so weight decay acts once, as the largest network's.

Everything random is a function of (seed, step), never of a generator's history, so a run continues
from a checkpoint exactly as if it had not stopped.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Generator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nas import checkpoint, parallel
from nas.data.augment import augment
from nas.elastic import N, Network, channels_last, extract, recalibrate, resize
from nas.errors import NasctlError
from nas.space import Genes, SearchSpace
from nas.tasks import Split, Task

BATCH_EVAL = 256


@dataclass(frozen=True)
class Recipe:
    """How to train; the defaults suit small images and minutes, not days."""

    steps: int
    batch: int = 128
    lr: float = 0.2  # peak, Nesterov SGD on the mean of the networks' losses
    momentum: float = 0.9
    weight_decay: float = 5e-4  # not on norms and biases
    label_smoothing: float = 0.1
    warmup: float = 0.1  # share of the steps
    clip_norm: float = 2.0
    n_random: int = 2
    seed: int = 0
    start: str = ""  # names the initial weights, where they are not the seed's
    #: micro-batches per process and step. As the number of processes, no part of what identifies a
    #: training: a state may be continued with another
    accumulate: int = field(default=1, repr=False)

    def lr_at(self, step: int) -> float:
        """Linear warm-up, then linear to zero: with few epochs a floor only costs accuracy."""
        warm = max(1, round(self.warmup * self.steps))
        if step < warm:
            return self.lr * (step + 1) / warm
        return self.lr * (self.steps - step) / max(1, self.steps - warm)


@dataclass(frozen=True)
class Step:
    """What a training step reports."""

    step: int  # steps done so far
    steps: int
    losses: tuple[float, ...]  # of each network, in the order of the step's architectures


def batch_indices(n: int, batch: int, step: int, seed: int) -> Tensor:
    """The images of one step: epochs are private permutations of (seed, epoch), read in order."""
    batch = min(batch, n)
    epoch, at = divmod(step, n // batch)
    order = np.random.default_rng((seed, 1, epoch)).permutation(n)
    return torch.from_numpy(order[at * batch : (at + 1) * batch])


def sandwich(space: SearchSpace, recipe: Recipe) -> Callable[[int], list[Any]]:
    """The architectures of a step: the largest first (it teaches), then the smallest, then random
    ones."""

    def archs(step: int) -> list[Any]:
        rng = np.random.default_rng((recipe.seed, 2, step))
        rows = [space.largest, space.smallest, *space.sample(rng, recipe.n_random)]
        return [space.decode(row) for row in rows]

    return archs


def alone(net: Network) -> Callable[[int], list[Any]]:
    """For `train`: every step runs `net` itself, and only that."""
    return lambda step: [net.arch]


def train(
    net: nn.Module,
    archs: Callable[[int], list[Any]],
    task: Task,
    recipe: Recipe,
    *,
    resume: Path | None = None,
    save_every_s: float = 20.0,
) -> Generator[Step, None, None]:
    """Train `net` in place, yielding after each step. `archs(step)` are the architectures it runs:
    the first learns from the labels, the others from the first.

    With `resume`, the state is saved to that file every `save_every_s` seconds and when the caller
    closes the generator, and a state found there is continued. In a torch process group, every
    process trains its shards of each step (`nas.parallel`) and the first alone reads and writes the
    file; all of them have to take the same steps and close at the same one.

    Raises NasctlError if the loss stops being finite, the file belongs to another recipe, or
    another process is gone.
    """
    workers = parallel.workers()
    net.train()
    optimiser = _optimiser(net, recipe)
    fingerprint = f"{recipe} {task.fingerprint}"
    done = checkpoint.load(resume, net, optimiser, fingerprint) if resume else 0
    saved_at = time.monotonic()
    while done < recipe.steps:
        losses = _step(net, optimiser, archs(done), task, recipe, done)
        done += 1
        if not all(map(math.isfinite, losses)):
            raise NasctlError(
                f"training diverged at step {done}: the loss is not finite",
                where="--lr",
                next=f"Try --lr {recipe.lr / 3:.2g}.",
            )
        due = done == recipe.steps or time.monotonic() - saved_at > save_every_s
        if resume and due and workers.first:
            checkpoint.save(resume, net, optimiser, done, fingerprint)
            saved_at = time.monotonic()
        try:
            yield Step(done, recipe.steps, losses)
        except GeneratorExit:
            # The caller stops between two steps, where weights and momentum agree. (An interrupt
            # inside a step is not caught: the file of the last save stands.)
            if resume and not due and workers.first:
                checkpoint.save(resume, net, optimiser, done, fingerprint)
            raise


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


def _step(
    net: nn.Module,
    optimiser: torch.optim.Optimizer,
    archs: list[Any],
    task: Task,
    recipe: Recipe,
    step: int,
) -> tuple[float, ...]:
    rows = batch_indices(len(task.train), recipe.batch, step, recipe.seed)
    workers = parallel.workers()
    losses = torch.zeros(len(archs), device=next(net.parameters()).device)
    for shard, part in workers.shards(len(rows), recipe.accumulate):
        at = rows[part]
        weight = len(at) / len(rows)
        x = _inputs(task, recipe, at, step, shard)
        target: Tensor | None = None
        for place, arch in enumerate(archs):
            logits = net(resize(x, arch.resolution), arch)
            if target is None:
                loss = _label_loss(task, logits, task.train.labels[at], recipe.label_smoothing)
                target = logits.detach().softmax(1)
            else:
                loss = F.cross_entropy(logits, target)
            (weight * loss / len(archs)).backward()
            losses[place] += weight * loss.detach()
    gradients = [p.grad for p in net.parameters() if p.grad is not None]
    workers.sum_([*gradients, losses])
    for group in optimiser.param_groups:
        group["lr"] = recipe.lr_at(step)
    nn.utils.clip_grad_norm_(net.parameters(), recipe.clip_norm)
    optimiser.step()
    optimiser.zero_grad(set_to_none=True)
    return tuple(losses.tolist())


def _inputs(task: Task, recipe: Recipe, at: Tensor, step: int, shard: int) -> Tensor:
    """A shard's augmented images, drawn from (seed, step, shard)."""
    # torch seeds from the low 32 bits; multiples of this (2^32 over the golden ratio) lie far apart
    seed = recipe.seed * 1_000_003 + step + shard * 0x9E3779B1
    generator = torch.Generator().manual_seed(seed)
    images = augment(task.train.images[at], generator, flip=task.flip, pad=task.pad)
    return task.normalise(images).contiguous(memory_format=torch.channels_last)


def _label_loss(task: Task, logits: Tensor, labels: Tensor, smoothing: float) -> Tensor:
    if task.loss is F.cross_entropy:  # smoothing is defined for it alone
        return F.cross_entropy(logits, labels, label_smoothing=smoothing)
    return task.loss(logits, labels)


# ---- judging sub-networks ------------------------------------------------------------------------


@dataclass(frozen=True)
class Score:
    """A sub-network on held-out images. The loss ranks: accuracy ties on small sets."""

    cross_entropy: float  # or the task's own loss
    accuracy: float  # or the task's own metric


def child(net: nn.Module, space: SearchSpace, genes: Genes, calibration: Tensor) -> Network:
    """The stand-alone network of `genes`, batch-norm statistics re-calibrated, in eval mode.

    `calibration`: normalised images [N, C, H, W] at the task's size.
    """
    arch = space.decode(genes)
    small = channels_last(extract(net, space.build(arch)))
    return calibrate(small, calibration, arch.resolution)


def calibrate(net: N, calibration: Tensor, resolution: int) -> N:
    """`net` in eval mode with the batch-norm statistics of the calibration images."""
    return recalibrate(net, torch.split(resize(calibration, resolution), BATCH_EVAL))


@torch.no_grad()
def evaluate(net: nn.Module, task: Task, split: Split, resolution: int) -> Score:
    """Cross-entropy (nats) and the task's metric of an eval-mode network on a split."""
    logits = []
    for images in torch.split(split.images, BATCH_EVAL):
        x = task.normalise(images).contiguous(memory_format=torch.channels_last)
        logits.append(net(resize(x, resolution)))
    every = torch.cat(logits)
    return Score(float(task.loss(every, split.labels)), float(task.metric(every, split.labels)))


def calibration_images(task: Task, n: int = 1024) -> Tensor:
    """Normalised, unaugmented training images, drawn once: the same for every sub-network."""
    order = np.random.default_rng(0).permutation(len(task.train))[:n]
    x = task.normalise(task.train.images[torch.from_numpy(order)])
    return x.contiguous(memory_format=torch.channels_last)
