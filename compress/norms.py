"""Statistics of batch norms, taken anew once channels went.

What a norm knows of its inputs was true for the whole network. Judged with it, a pruned network
looks worse than a few steps of training make it, and which of two looks worse says little of which
one is (an extension of PAGCP).
"""

from __future__ import annotations

import contextlib

import torch
from torch import Tensor, nn

from compress.graph import forward
from compress.reuse import Prefix

IMAGES = 160  # are enough: losses with statistics of so many rank networks as training does


def of(net: nn.Module) -> list[nn.modules.batchnorm._BatchNorm]:
    """The batch norms of a network that have statistics."""
    kind = nn.modules.batchnorm._BatchNorm
    return [m for m in net.modules() if isinstance(m, kind) and m.running_mean is not None]


@torch.no_grad()
def renew(net: nn.Module, images: Tensor, prefix: Prefix | None = None) -> None:
    """Give the batch norms of `net`, which is in evaluation mode and stays so, the statistics of
    `images`. Nothing else is in training mode, so nothing is random.

    Norms that do not run keep what they have: with a `prefix`, what was pruned must have come with
    statistics of the same images, and those that `prefix` spares are right already.
    """
    found = of(net)
    if not found:
        return
    before = [(norm.momentum, norm.num_batches_tracked) for norm in found]
    for norm in found:
        norm.momentum = None  # the mean over all calls since the counter was 0
        norm.num_batches_tracked = torch.tensor(0)
        norm.train()
    try:
        with prefix.on(net) if prefix else contextlib.nullcontext():
            forward(net, images)
    finally:
        for norm, (momentum, batches) in zip(found, before, strict=True):
            norm.momentum, norm.num_batches_tracked = momentum, batches
            norm.eval()
