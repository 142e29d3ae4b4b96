"""SWAP: the number of distinct patterns that units show over the samples (Peng et al., ICLR 2024,
arXiv 2403.04161), without its optional regularisation by size.

A pattern is one ReLU unit's on / off over the batch. Bounded by the number of units, so it grows
with the network, and by 2^B.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from nas.passes import Batch, Passes, alone, codes

CHUNK = 32  # samples per exact integer


def value(seen: Passes) -> float:
    patterns = torch.cat([_pattern(code) for code in seen.read(codes)])
    return float(len(torch.unique(patterns)))


def _pattern(code: Tensor) -> Tensor:
    """A number per unit [units] that equal columns of [B, units] share: exact up to 32 samples, a
    hash modulo 2^64 beyond."""
    found = torch.zeros(code.shape[1], dtype=torch.int64, device=code.device)
    for chunk in code.split(CHUNK):
        powers = 2.0 ** torch.arange(len(chunk), dtype=torch.float64, device=code.device)
        found = found * 6364136223846793005 + (powers @ chunk.double()).long()
    return found


def score(net: nn.Module, batch: Batch) -> float:
    return alone(value, net, batch)
