"""One order of all channels of the network, by mean absolute weight; layers may be emptied."""

from __future__ import annotations

from compress import units, widths
from compress.job import Job, Settings, Steps
from compress.reach import by_threshold, reach, scored
from compress.record import Record


def prune(job: Job, settings: Settings = Settings(), known: Record | None = None) -> Steps:
    found = units.find(job.net, job.example_inputs)
    scores = scored(job.graph(), found.units, widths.magnitude)
    return reach(
        job, found, scores, by_threshold(scores, lambda unit: "all", settings), settings, known
    )
