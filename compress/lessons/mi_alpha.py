"""MI-alpha: a lower bound of the mutual information of the two networks' features (Distiller,
arXiv 2109.11105; the bound is Poole et al., arXiv 1905.06922, section 2.3).

    I = 1 + E[f(x, y) - log d(y)] - E[exp f(x', y) / d(y)],  d = alpha m(y) + (1 - alpha) q

with m(y) the mean of exp f(x', y) over the batch and q the constant e. At alpha = 1 it is InfoNCE,
of low variance and at most log N; at 0 it is NWJ's, unbiased and of high variance. The second
expectation is over all pairs of the batch, the matching ones too: so alpha = 1 is InfoNCE exactly.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from compress.lessons.shapes import pooled
from nas.errors import UsageError
from nas.seen import Seen
from nas.transformer import Project


class MiAlpha(nn.Module):
    """The negative bound, of features averaged over places; the critic is a scaled product of two
    learned projections. `width` and `teachers_width` are channels."""

    def __init__(
        self,
        width: int,
        teachers_width: int,
        alpha: float = 0.9,
        *,
        size: int = 128,
        layer: int = -1,
        teachers: int = -1,
    ) -> None:
        super().__init__()
        if not 0 <= alpha <= 1:
            raise UsageError(f"{alpha}", where="alpha", allowed="0 to 1")
        self.mine, self.theirs = Project(width, size), Project(teachers_width, size)
        self.alpha, self.layer, self.teachers = alpha, layer, teachers

    def extra_repr(self) -> str:
        return f"{self.alpha}, layers {self.layer}, {self.teachers}"

    def forward(self, student: Seen, teacher: Seen) -> Tensor:
        x = self.mine(pooled(student.features[self.layer], student.mask).float())
        y = pooled(teacher.features[self.teachers], student.mask).float().detach()
        return -bound(x @ self.theirs(y).t() / x.shape[1] ** 0.5, self.alpha)


def bound(f: Tensor, alpha: float) -> Tensor:
    """In nats, of critic values [N, N]: rows are the student's examples, columns the teacher's."""
    mean = f.logsumexp(0) - math.log(len(f))
    log_d = mean if alpha == 1 else torch.ones_like(mean)
    if 0 < alpha < 1:
        log_d = torch.logaddexp(mean + math.log(alpha), log_d + math.log1p(-alpha))
    return 1 + (f.diagonal() - log_d).mean() - (f - log_d).exp().mean()
