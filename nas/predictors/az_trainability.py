"""AZ-NAS, trainability: how near each block's backward pass is to an isometry (Lee and Ham, arXiv
2403.19232, section 3.2).

With s the largest singular value of E[g_in g_out^T] for signs g_out: the mean over blocks of
2 - (s + 1 / s), at most 0. Places that a stride merges are channels of g_in.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nas.passes import Batch, Missing, Passes, alone, gradient, places
from nas.predictors._az_nas import Block, blocks


def value(seen: Passes) -> float:
    generator = seen.generator()
    found = [_isometry(block, generator) for block in seen.read(blocks)]
    return sum(found) / len(found)


def _isometry(block: Block, generator: torch.Generator) -> float:
    left = block.left
    if not block.entered.requires_grad:
        raise Missing("no gradient reaches a block")
    signs = 2.0 * torch.randint(0, 2, left.shape, generator=generator).to(left) - 1
    (g_in,) = gradient((left * signs).sum(), [block.entered])
    a, b = places(_merged(g_in, left)), places(signs)
    if len(a) != len(b):
        raise Missing("a block changes the number of places by no whole stride")
    s = torch.linalg.svdvals(a.T @ b / len(a))[0].item()
    if s == 0:
        raise Missing("dead: no gradient goes through a block")
    return 2 - (s + 1 / s)


def _merged(g_in: Tensor, left: Tensor) -> Tensor:
    if g_in.dim() != 4 or left.dim() != 4 or g_in.shape[-1] <= left.shape[-1]:
        return g_in
    return F.pixel_unshuffle(g_in, g_in.shape[-1] // left.shape[-1])


def score(net: nn.Module, batch: Batch) -> float:
    return alone(value, net, batch)
