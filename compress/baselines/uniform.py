"""Every unit loses the same ratio, filters of least norm first (Li et al., arXiv 1608.08710)."""

from __future__ import annotations

from compress import units, widths
from compress.job import Job, Settings, Steps
from compress.reach import evenly, reach, scored
from compress.record import Record


def prune(job: Job, settings: Settings = Settings(), known: Record | None = None) -> Steps:
    found = units.find(job.net, job.example_inputs)
    scores = scored(job.graph(), found.units, widths.magnitude)
    return reach(job, found, scores, evenly(scores, settings), settings, known)
