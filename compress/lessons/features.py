"""A teacher's hidden layer as a regression target (FitNets, arXiv 1412.6550, section 2.1)."""

from __future__ import annotations

from torch import Tensor, nn

from compress.lessons.shapes import last, tokens
from nas.seen import Seen
from nas.transformer import Project


class Features(nn.Module):
    """Mean square between a projection of a student's features and those of the teacher, per
    element. `width` and `teachers_width` are channels; a narrower student uses a slice."""

    def __init__(
        self, width: int, teachers_width: int, *, layer: int = -1, teachers: int = -1
    ) -> None:
        super().__init__()
        self.adapter = Project(width, teachers_width)
        self.layer, self.teachers = layer, teachers

    def extra_repr(self) -> str:
        return f"layers {self.layer}, {self.teachers}"

    def forward(self, student: Seen, teacher: Seen) -> Tensor:
        mine = self.adapter(last(student.features[self.layer]).float())
        wanted = last(teacher.features[self.teachers]).float().detach()
        return (tokens(mine, student.mask) - tokens(wanted, student.mask)).square().mean()
