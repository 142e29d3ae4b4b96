"""Relations among a sequence's tokens, of queries, keys and values: MiniLMv2 and AutoDistil.

Queries, keys and values of one layer are each cut into R relation heads of equal size, whatever the
number of attention heads was; the products of every token with every other are S x S whatever the
width, so teacher and student are compared without any projection. R divides the teacher's channels;
of a student's, what does not divide is dropped, as in AutoDistil's code. MiniLMv2 (arXiv
2012.15828, section 3.1) compares distributions by `kl`. AutoDistil (arXiv 2201.12507, equation 4)
takes the mean square of the difference of distributions (`mse`); its released code takes that of
the products before the softmax (`scores`). Padded tokens count neither as rows nor as columns.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from nas.errors import UsageError
from nas.seen import Heads, Seen

KINDS = ("kl", "mse", "scores")


class Relations(nn.Module):
    """Summed over queries, keys and values of one layer each of student and teacher; by default the
    last ones. `heads` are relation heads."""

    def __init__(
        self,
        heads: int,
        kind: Literal["kl", "mse", "scores"] = "kl",
        *,
        layer: int = -1,
        teachers: int = -1,
    ) -> None:
        super().__init__()
        if kind not in KINDS:
            raise UsageError(f"'{kind}'", where="--loss", allowed=KINDS)
        self.heads, self.kind, self.layer, self.teachers = heads, kind, layer, teachers

    def extra_repr(self) -> str:
        return f"{self.heads}, {self.kind}, layers {self.layer}, {self.teachers}"

    def read(self, teacher: Seen) -> Seen:
        """One layer's queries, keys and values, in their place, and the mask."""
        at, nothing = self.teachers % len(teacher.attention), teacher.attention[0].q.new_zeros(0)
        attention = tuple(
            heads if n == at else Heads(nothing, nothing, nothing)
            for n, heads in enumerate(teacher.attention)
        )
        return Seen(attention=attention, heads=teacher.heads, mask=teacher.mask)

    def forward(self, student: Seen, teacher: Seen) -> Tensor:
        ours, theirs = student.attention[self.layer], teacher.attention[self.teachers]
        real = _real(student, ours.q)
        total = ours.q.new_zeros(())
        for mine, wanted in zip(ours, theirs, strict=True):
            a, b = (products(part.float(), self.heads) for part in (mine, wanted))
            total = total + self._difference(a, b.detach(), real)
        return total

    def _difference(self, mine: Tensor, wanted: Tensor, real: Tensor) -> Tensor:
        """Of products [N, R, S, S]; `real` [N, S]."""
        pairs = (real[:, :, None] & real[:, None, :])[:, None].expand_as(mine)
        if self.kind == "scores":
            return (mine - wanted)[pairs].square().mean()
        columns = real[:, None, None, :]
        mine, wanted = (x.masked_fill(~columns, -torch.inf) for x in (mine, wanted))
        if self.kind == "mse":
            return (mine.softmax(-1) - wanted.softmax(-1))[pairs].square().mean()
        # where both are -inf their difference is not a number; such columns are left out
        logs = [x.log_softmax(-1).masked_fill(~columns, 0.0) for x in (wanted, mine)]
        rows = (wanted.softmax(-1) * (logs[0] - logs[1])).sum(-1)
        return rows[real[:, None].expand_as(rows)].mean()


def require(heads: int, teacher: int, students: Sequence[int]) -> None:
    """Raises UsageError for relation heads that cut off channels of the teacher, which has that
    many, or that the narrowest student has no channels for."""
    least = min(students)
    if teacher % heads or heads > least:
        raise UsageError(
            f"{heads} relation heads of {teacher} channels (the narrowest student has {least})",
            where="--relation-heads",
            allowed=(str(n) for n in range(1, least + 1) if teacher % n == 0),
        )


def products(x: Tensor, heads: int) -> Tensor:
    """[N, S, C] to scaled products of every token with every other [N, heads, S, S]."""
    size = x.shape[-1] // heads
    if not size:
        raise UsageError(
            f"{heads} relation heads of {x.shape[-1]} channels", where="--relation-heads"
        )
    parts = x[..., : heads * size].unflatten(-1, (heads, size)).transpose(1, 2)
    return parts @ parts.transpose(2, 3) / size**0.5


def _real(seen: Seen, like: Tensor) -> Tensor:
    if seen.mask is not None:
        return seen.mask
    return torch.ones(like.shape[:2], dtype=torch.bool, device=like.device)
