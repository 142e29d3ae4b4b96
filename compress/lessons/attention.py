"""Who attends to whom: attention distributions of one layer (MiniLM, arXiv 2002.10957, section
3.1), averaged over the heads, whose number may differ."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from nas.seen import Seen


class Attention(nn.Module):
    """KL of the student's mean distribution from the teacher's, per real token."""

    def __init__(self, *, layer: int = -1, teachers: int = -1) -> None:
        super().__init__()
        self.layer, self.teachers = layer, teachers

    def extra_repr(self) -> str:
        return f"layers {self.layer}, {self.teachers}"

    def forward(self, student: Seen, teacher: Seen) -> Tensor:
        mine, wanted = _shares(student, self.layer), _shares(teacher, self.teachers).detach()
        tiny = torch.finfo(mine.dtype).tiny  # masked columns are zero in both
        kl = (wanted * (wanted.clamp_min(tiny).log() - mine.clamp_min(tiny).log())).sum(-1)
        return kl.mean() if student.mask is None else kl[student.mask].mean()


def _shares(seen: Seen, layer: int) -> Tensor:
    """[N, S, S]: what each token (row) gives to each, averaged over heads."""
    heads = seen.heads[layer]
    q, k = (
        part.float().unflatten(-1, (heads, -1)).transpose(1, 2)
        for part in seen.attention[layer][:2]
    )
    scores = q @ k.transpose(2, 3) / q.shape[-1] ** 0.5
    if seen.mask is not None:
        scores = scores.masked_fill(~seen.mask[:, None, None], -torch.inf)
    return scores.softmax(-1).mean(1)
