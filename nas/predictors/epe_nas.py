"""EPE-NAS: correlations of the input gradient between samples of one class (Lopes et al., arXiv
2102.08099).

Per class the sum over pairs of log(|correlation| + k). Up to 100 classes, the sum of the absolute
values; above, the mean difference between classes.
"""

from __future__ import annotations

import itertools

import torch
from torch import nn

from nas.passes import Batch, Missing, Passes, alone, correlation, forward, jacobian

K = 1e-5
MANY = 100  # classes


def value(seen: Passes) -> float:
    rows, labels = seen.read(jacobian), seen.batch.labels.to(seen.device)
    classes, counts = torch.unique(labels, return_counts=True)
    if int(counts.max()) < 2:
        raise Missing("no class has two samples in the batch")
    sums = [
        (correlation(rows[labels == label]).abs() + K).log().sum().item()
        for label, count in zip(classes, counts.tolist(), strict=True)
        if count > 1
    ]
    if seen.read(forward).logits.shape[1] <= MANY:
        return sum(map(abs, sums))
    pairs = [abs(a - b) for a, b in itertools.combinations(sums, 2)]
    if not pairs:
        raise Missing("fewer than two classes have two samples in the batch")
    return sum(pairs) / len(pairs)


def score(net: nn.Module, batch: Batch) -> float:
    return alone(value, net, batch)
