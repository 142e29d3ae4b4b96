"""Torch-Pruning's group norm (DepGraph, CVPR 2023, arXiv 2301.12900): the L2 norm of all weights
that go with a channel, relative to its unit's mean; one order of all channels."""

from __future__ import annotations

from collections.abc import Sequence

import torch_pruning as tp

from compress import units
from compress.graph import Graph
from compress.job import Job, Settings, Steps
from compress.reach import Scores, by_threshold, reach
from compress.record import Record
from compress.units import Unit
from compress.widths import by_place


def prune(job: Job, settings: Settings = Settings(), known: Record | None = None) -> Steps:
    found = units.find(job.net, job.example_inputs)
    scores = norms(job.graph(), found.units)
    return reach(
        job, found, scores, by_threshold(scores, lambda unit: "all", settings), settings, known
    )


def norms(graph: Graph, members: Sequence[Unit]) -> Scores:
    """What Torch-Pruning gives a group, by place."""
    importance = tp.importance.GroupMagnitudeImportance(p=2)
    return {unit: by_place(importance(graph.group(unit.root)), unit) for unit in members}
