"""What a student learns from a teacher, one file per method.

A lesson is a module: `lesson(student, teacher)` is a scalar made of what both have shown of the
same batch (`nas.seen.Seen`). Parameters that it has of its own (adapters, critics) are trained with
the student and never deployed. The teacher's part carries no gradient. A lesson's `repr` names all
its settings: it is part of what identifies a training.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from nas.seen import Seen


def read_by(lesson: nn.Module, teacher: Seen) -> Seen:
    """Of what a teacher shows, what the lesson reads, if it says so (`read`): all that has to stay
    in memory."""
    read = getattr(lesson, "read", None)
    found: Seen = teacher if read is None else read(teacher)
    return found


class Weighted(nn.Module):
    """A sum of lessons, each with its weight."""

    def __init__(self, lessons: Sequence[nn.Module], weights: Sequence[float]) -> None:
        super().__init__()
        self.lessons, self.weights = nn.ModuleList(lessons), tuple(weights)

    def extra_repr(self) -> str:
        return f"{self.weights}"

    def forward(self, student: Seen, teacher: Seen) -> Tensor:
        terms = zip(self.weights, self.lessons, strict=True)
        return torch.stack([weight * lesson(student, teacher) for weight, lesson in terms]).sum()
