"""A small two-task network that its tasks' targets fit, and jobs on it."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from compress import norms
from compress.cost import Macs
from compress.job import Job
from compress.objective import Objective
from tests.graphs import chain


def objectives():
    return [
        Objective("label", lambda out, y: F.cross_entropy(2 * out["label"], y["label"])),
        Objective("map", lambda out, y: F.mse_loss(out["map"], y["map"])),
    ]


def job(*kinds, share=0.6, seed=0, n=24, cost=None, c=16):
    """Targets are what the network says, and noise: losses are positive, and grow by little."""
    net = chain(*(kinds or ("residual", "concat")), c=c, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(n, 3, 8, 8, generator=generator)
    norms.renew(net, images)  # as if it had been trained on them
    with torch.no_grad():
        out = net(images)
    noise = torch.randn(out["map"].shape, generator=generator)
    said = {"label": out["label"].argmax(1), "map": out["map"] + noise}
    batches = [
        (images[at : at + 8], {name: t[at : at + 8] for name, t in said.items()})
        for at in range(0, n, 8)
    ]
    cost = cost or Macs()
    return Job(net, images[:1], objectives(), batches, cost, share * cost.of(net, images[:1]))
