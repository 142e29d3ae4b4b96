"""Adaptive clipped alpha-divergence for in-place distillation (AlphaNet, arXiv 2102.07954).

With t = p / q for teacher p and student q, D_a = (E_q[t^a] - 1) / (a (a - 1)); its limit at a = 1
is KL(p || q). KL lets a student be unsure where its teacher is sure; a = -1 punishes that. Each
image is taught by the larger of the two (section 4.2).

The gradient is that of the surrogate -sum_c q_c rho_c log q_c in which q and rho = t^a / a are held
constant (section 4.1); tests hold it against autograd of the exact divergence. Powers of t are
clipped, for a sharp teacher would else dominate; at a = 1 nothing is, as in the released code.
"""

from __future__ import annotations

import torch
from torch import Tensor

LOW, HIGH, CLIP = -1.0, 1.0, 5.0


def divergence(student: Tensor, teacher: Tensor, alpha: float, clip: float = CLIP) -> Tensor:
    """D_alpha of each row [N] from logits [N, C]; differentiable in `student` alone."""
    assert alpha != 0, "the limit at zero is not implemented"
    log_q = student.log_softmax(1)
    with torch.no_grad():
        q, p = log_q.exp(), teacher.softmax(1)
        log_t = teacher.log_softmax(1) - log_q
        if alpha == 1:
            value, weight = p * log_t, p
        else:
            power = (alpha * log_t).exp().clamp(max=clip)
            value, weight = q * (power - 1) / (alpha * (alpha - 1)), q * power / alpha
    surrogate = -(weight * log_q).sum(1)
    return value.sum(1) + surrogate - surrogate.detach()


def adaptive(student: Tensor, teacher: Tensor, clip: float = CLIP) -> Tensor:
    """The mean over images of the larger divergence of alpha = -1 and 1; logits [N, C]."""
    low, high = (divergence(student, teacher, alpha, clip) for alpha in (LOW, HIGH))
    return torch.maximum(low, high).mean()
