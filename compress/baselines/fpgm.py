"""FPGM (CVPR 2019, arXiv 1811.00250): the filters nearest to all others of their layer go, as what
they do is done by others; every unit loses the same ratio. Distances are Torch-Pruning's."""

from __future__ import annotations

import torch_pruning as tp

from compress import units
from compress.job import Job, Settings, Steps
from compress.reach import evenly, reach
from compress.record import Record
from compress.widths import by_place


def prune(job: Job, settings: Settings = Settings(), known: Record | None = None) -> Steps:
    found = units.find(job.net, job.example_inputs)
    graph, importance = (
        job.graph(),
        tp.importance.FPGMImportance(),
    )
    scores = {unit: by_place(importance(graph.group(unit.root)), unit) for unit in found.units}
    return reach(job, found, scores, evenly(scores, settings), settings, known)
