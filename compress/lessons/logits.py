"""The teacher's prediction as a soft label (Hinton et al., arXiv 1503.02531, section 2)."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from nas.seen import Seen


class Logits(nn.Module):
    """KL of the two predictions at a temperature, times its square: so the size of the gradient
    does not depend on it."""

    def __init__(self, temperature: float = 2.0) -> None:
        super().__init__()
        self.temperature = temperature

    def extra_repr(self) -> str:
        return f"{self.temperature}"

    def forward(self, student: Seen, teacher: Seen) -> Tensor:
        assert student.logits is not None and teacher.logits is not None
        mine = (student.logits.float() / self.temperature).log_softmax(1)
        wanted = (teacher.logits.float() / self.temperature).log_softmax(1).detach()
        kl = F.kl_div(mine, wanted, reduction="batchmean", log_target=True)
        return kl * self.temperature**2
