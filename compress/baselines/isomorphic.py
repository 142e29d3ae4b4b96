"""Isomorphic pruning (ECCV 2024, arXiv 2407.04616): channels compete with those of units of the
same structure only, by Torch-Pruning's group norm."""

from __future__ import annotations

from compress import units
from compress.baselines.group_norm import norms
from compress.graph import Graph
from compress.job import Job, Settings, Steps
from compress.reach import by_threshold, reach
from compress.record import Record
from compress.units import Unit


def prune(job: Job, settings: Settings = Settings(), known: Record | None = None) -> Steps:
    found = units.find(job.net, job.example_inputs)
    graph = job.graph()
    structure = {unit: _structure(graph, unit) for unit in found.units}
    scores = norms(graph, found.units)
    return reach(
        job, found, scores, by_threshold(scores, structure.__getitem__, settings), settings, known
    )


def _structure(graph: Graph, unit: Unit) -> tuple[str, ...]:
    """Kinds of the modules that change, and on which side, in the graph's order."""
    return tuple(
        f"{type(member.module).__name__} {'reads' if member.inputs else 'gives'}"
        for member in graph.members(unit.root)
    )
