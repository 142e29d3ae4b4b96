"""NASWOT: how well the ReLUs' on / off codes tell samples apart (Mellor et al., arXiv 2006.04647).

log |det K|, with K the number of units on which two samples agree. Grows with the batch: compare
only scores of one batch size.
"""

from __future__ import annotations

import torch
from torch import nn

from nas.passes import Batch, Missing, Passes, alone, codes


def value(seen: Passes) -> float:
    found = seen.read(codes)
    k = torch.zeros(len(found[0]), len(found[0]), dtype=torch.float64, device=seen.device)
    for code in found:
        on = code.float()
        both = (on @ on.T).double()  # exact: counts below 2^24
        ones = both.diagonal()
        k += code.shape[1] - ones[:, None] - ones[None] + 2 * both
    sign, log_det = torch.linalg.slogdet(k)
    # two equal rows cancel to a determinant of rounding errors at best
    if float(sign) <= 0 or torch.linalg.matrix_rank(k) < len(k):
        raise Missing("two samples have the same code")
    return log_det.item()


def score(net: nn.Module, batch: Batch) -> float:
    return alone(value, net, batch)
