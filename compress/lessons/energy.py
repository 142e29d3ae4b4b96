"""Where a network looks, by the energy of its features: attention transfer (arXiv 1612.03928,
section 3.1). Needs no adapter: channels are summed over, places must agree."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from compress.lessons.shapes import last
from nas.seen import Seen


class Energy(nn.Module):
    """Mean square between the two maps of squared activations, each of norm 1 per example."""

    def __init__(self, *, layer: int = -1, teachers: int = -1) -> None:
        super().__init__()
        self.layer, self.teachers = layer, teachers

    def extra_repr(self) -> str:
        return f"layers {self.layer}, {self.teachers}"

    def forward(self, student: Seen, teacher: Seen) -> Tensor:
        mine = _map(student.features[self.layer], student.mask)
        wanted = _map(teacher.features[self.teachers], student.mask).detach()
        return (mine - wanted).square().sum(1).mean()


def _map(x: Tensor, mask: Tensor | None) -> Tensor:
    """[N, places], of norm 1."""
    energy = last(x).float().square().mean(-1)
    if mask is not None:
        energy = energy * mask
    return F.normalize(energy.flatten(1))
