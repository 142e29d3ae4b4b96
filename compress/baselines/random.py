"""Every unit loses the same ratio, of channels drawn by the seed: what any criterion must beat."""

from __future__ import annotations

import torch

from compress import units
from compress.job import Job, Settings, Steps
from compress.reach import evenly, reach
from compress.record import Record


def prune(job: Job, settings: Settings = Settings(), known: Record | None = None) -> Steps:
    generator = torch.Generator().manual_seed(settings.seed)
    found = units.find(job.net, job.example_inputs)
    scores = {unit: torch.rand(unit.places, generator=generator) for unit in found.units}
    return reach(job, found, scores, evenly(scores, settings), settings, known)
