"""Task-agnostic distillation of a weight-sharing student: every network of a space learns at once
to show what a frozen teacher shows (AutoDistil, arXiv 2201.12507, section 3).

Each step runs the largest, the smallest and some other networks on the same batch (the sandwich),
backward after backward, and takes one AdamW step on the mean of their gradients. One network alone
is the same with a list of one. Nothing here knows what is distilled: students and teachers answer
`look` (`nas.seen.Seen`) and a lesson compares them (`compress.lessons`), text or images alike.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from compress import adamw
from compress.adamw import Plan, Step
from compress.lessons import read_by
from nas import parallel
from nas.seen import Seen

Archs = Callable[[int], Sequence[Any]]  # a step's number to the networks that it trains


class Student(Protocol):
    """A weight-sharing network that shows what it computes."""

    def look(self, x: Tensor, arch: Any) -> Seen: ...


@dataclass(frozen=True)
class Course:
    """From whom, what and on what is learned."""

    teacher: Callable[[Tensor], Seen]
    lesson: nn.Module  # (student's Seen, teacher's Seen) -> a loss
    batches: Callable[[int], Tensor]  # a step's number to its examples [N, ...]
    fingerprint: str  # of the teacher, the data, the space and the seed
    bf16: bool = False  # forward passes in bfloat16; losses are computed in float32
    accumulate: int = 1  # micro-batches per process and step: no part of what is learned


def distill(
    net: nn.Module,
    archs: Archs,
    course: Course,
    plan: Plan,
    *,
    resume: Path | None = None,
    save_every_s: float = 20.0,
) -> Generator[Step, None, None]:
    """Train `net` (a Student) in place by `compress.adamw.train`, yielding after each step."""
    both = nn.ModuleDict({"net": net.train(), "lesson": course.lesson})
    return adamw.train(
        both,
        lambda step: _gradients(net, archs(step), course, step),
        plan,
        f"{course.fingerprint} {course.lesson} {course.bf16}",
        resume=resume,
        save_every_s=save_every_s,
    )


def _gradients(net: Any, archs: Sequence[Any], course: Course, step: int) -> Tensor:
    """Adds this process's part of the gradient of the networks' mean loss; returns its part of
    each one's loss."""
    device = next(net.parameters()).device
    examples = course.batches(step).to(device)
    losses = torch.zeros(len(archs), device=device)
    precision = torch.autocast(device.type, torch.bfloat16, enabled=course.bf16)
    for _, part in parallel.workers().shards(len(examples), course.accumulate):
        x = examples[part]
        share = len(x) / len(examples)
        with torch.no_grad(), precision:
            wanted = read_by(course.lesson, course.teacher(x))
        for at, arch in enumerate(archs):
            with precision:
                shown = net.look(x, arch)
            loss = course.lesson(shown, wanted)
            (share * loss / len(archs)).backward()
            losses[at] += share * loss.detach()
    return losses
