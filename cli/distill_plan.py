"""`nasctl distill --dry-run`: what would be done and for how long, from steps timed now."""

from __future__ import annotations

import time
from contextlib import closing
from pathlib import Path
from typing import Any

import torch

from cli import console
from cli import distilling as stages
from cli.distilling import Distilling
from compress import members
from nas.data import text


def seconds(distilling: Distilling) -> dict[str, float]:
    """Of each stage but what follows the ranking: packing by a sample of the text, training by a
    step of each supernet after its first, ranking by the smallest and the largest member."""
    spec = distilling.spec
    began = time.monotonic()
    tokens, share = text.sampled([Path(path) for path in spec.text], distilling.teacher.encode)
    found = {"text": (time.monotonic() - began) / share}
    n = max(spec.batch, round(tokens / share / (spec.sequence - 2)))
    for name in distilling.spaces:
        found[f"training {name}"] = stages.steps(distilling, n) * _step(distilling, name)
        found[f"ranking {name}"] = stages.held_out(n) / spec.batch * _ranking(distilling, name)
    return found


def say(found: dict[str, float], *, tuned: bool) -> None:
    for name, value in found.items():
        console.say(console.format_seconds(value), name)
    rest = "without fine-tuning and files" if tuned else "without timing the students"
    console.say(f"{console.format_seconds(sum(found.values()))}, {rest}", "in all")


def _batch(distilling: Distilling) -> torch.Tensor:
    """Sequences of a step; which tokens they are costs no time."""
    spec, words = distilling.spec, distilling.teacher.net.frame.vocabulary
    generator = torch.Generator().manual_seed(spec.seed)
    return torch.randint(1, words, (spec.batch, spec.sequence), generator=generator)


def _step(distilling: Distilling, name: str) -> float:
    """Seconds of a training step of a sub-space."""
    batch = _batch(distilling)
    _, going = stages.training(distilling, name, lambda step: batch, 2)
    with closing(going):
        next(going)  # which also allocates
        began = time.monotonic()
        next(going)
    return time.monotonic() - began


def _ranking(distilling: Distilling, name: str) -> float:
    """Seconds of ranking all members of a sub-space on one batch."""
    space, device = distilling.spaces[name], distilling.accelerator
    batches: Any = [_batch(distilling).to(device)]
    wanted = members.taught(distilling.teacher.net.to(device).look, batches, distilling.lesson)
    archs = [space.decode(genes) for genes in (space.smallest, space.largest)]
    net = space.build(archs[1]).to(device).eval()
    began = time.monotonic()
    for arch in archs:
        members.loss_of(net, arch, distilling.lesson, batches, wanted)
    return (time.monotonic() - began) / 2 * space.count()
