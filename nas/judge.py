"""Judging sub-networks: cut out, batch norms re-calibrated, run on held-out images."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from nas.elastic import N, Network, channels_last, extract, recalibrate, resize
from nas.space import Genes, SearchSpace
from nas.tasks import Split, Task

BATCH_EVAL = 256


@dataclass(frozen=True)
class Score:
    """A sub-network on held-out images. The loss ranks: accuracy ties on small sets."""

    cross_entropy: float  # or the task's own loss
    accuracy: float  # or the task's own metric


def device_of(net: nn.Module) -> torch.device:
    """Where its weights are; one without weights is the processor's."""
    first = next(net.parameters(), None)
    return torch.device("cpu") if first is None else first.device


def child(net: nn.Module, space: SearchSpace, genes: Genes, calibration: Tensor) -> Network:
    """The stand-alone network of `genes`, batch-norm statistics re-calibrated, in eval mode.

    `calibration`: normalised images [N, C, H, W] at the task's size.
    """
    arch = space.decode(genes)
    small = channels_last(extract(net, space.build(arch).to(device_of(net))))
    return calibrate(small, calibration, arch.resolution)


def calibrate(net: N, calibration: Tensor, resolution: int) -> N:
    """`net` in eval mode with the batch-norm statistics of the calibration images."""
    images = calibration.to(device_of(net))
    return recalibrate(net, torch.split(resize(images, resolution), BATCH_EVAL))


@torch.no_grad()
def evaluate(net: nn.Module, task: Task, split: Split, resolution: int) -> Score:
    """Cross-entropy (nats) and the task's metric of an eval-mode network on a split."""
    logits, device = [], device_of(net)
    for images in torch.split(split.images, BATCH_EVAL):
        x = task.normalise(images.to(device)).contiguous(memory_format=torch.channels_last)
        logits.append(net(resize(x, resolution)))
    every = torch.cat(logits)
    labels = split.labels.to(device)
    return Score(float(task.loss(every, labels)), float(task.metric(every, labels)))


def calibration_images(task: Task, n: int = 1024) -> Tensor:
    """Normalised, unaugmented training images, drawn once: the same for every sub-network."""
    order = np.random.default_rng(0).permutation(len(task.train))[:n]
    x = task.normalise(task.train.images[torch.from_numpy(order)])
    return x.contiguous(memory_format=torch.channels_last)
