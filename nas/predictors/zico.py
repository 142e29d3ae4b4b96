"""ZiCo: gradients that are large and agree between batches (Li et al., arXiv 2301.11300).

Per layer the log of sum over weights of mean |g| / deviation of g over batches, summed over layers.
The two halves of the batch stand for its batches.
"""

from __future__ import annotations

import math

import torch
from torch import nn

from nas.passes import Batch, Missing, Passes, alone, forward, gradient


def value(seen: Passes) -> float:
    seen.read(forward)  # which says if it is dead
    inputs, labels = seen.batch.inputs, seen.batch.labels
    half = len(inputs) // 2
    if half < 1:
        raise Missing("a batch of one cannot be halved")
    of_halves = []
    for part in (slice(0, half), slice(half, 2 * half)):
        logits = seen.run(inputs[part].to(seen.device))
        loss = seen.batch.loss(logits, labels[part].to(seen.device))
        of_halves.append(gradient(loss, seen.weights))
    layers = []
    for pair in zip(*of_halves, strict=True):
        g = torch.stack(pair)
        mean, deviation = g.abs().mean(0), g.std(0, correction=0)
        total = (mean[deviation > 0] / deviation[deviation > 0]).sum().item()
        if total > 0:
            layers.append(math.log(total))
    if not layers:
        raise Missing("dead: no gradient reaches any weight")
    return sum(layers)


def score(net: nn.Module, batch: Batch) -> float:
    return alone(value, net, batch)
