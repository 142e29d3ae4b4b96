"""First-order Taylor scores (Molchanov et al., CVPR 2019, arXiv 1906.10771): how much the tasks'
losses would change, to first order, if a channel were zero; one order of all channels. As published
the gate is the batch norm behind a layer, where there is one: its scale and shift are zero only
together with the channel. Each task's loss counts relative to its value, so that none drowns the
others."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from compress import losses, units
from compress.graph import LAYERS, Graph, Member, forward, gives
from compress.job import Job, Settings, Steps
from compress.reach import Scores, by_threshold, reach, scored
from compress.record import Record
from compress.units import Unit


def prune(job: Job, settings: Settings = Settings(), known: Record | None = None) -> Steps:
    found = units.find(job.net, job.example_inputs)
    scores = taylor(job, found.units)
    return reach(
        job, found, scores, by_threshold(scores, lambda unit: "all", settings), settings, known
    )


def taylor(job: Job, found: Sequence[Unit]) -> Scores:
    """Sums over the batches of squares of weight times gradient, by unit and place: squared
    before they are added, as published, so that what batches disagree on is not worth nothing."""
    graph = job.graph()
    before = losses.measure(graph.net, job.objectives, job.batches).values
    for parameter in graph.net.parameters():  # of a copy: a frozen layer is worth something too
        parameter.requires_grad_(parameter.is_floating_point())
    worth = {unit: torch.zeros(unit.places) for unit in found}
    for inputs, targets in job.batches:
        graph.net.zero_grad()
        outputs = forward(graph.net, inputs)
        shares = [o.loss(outputs, targets) / before[o.name] for o in job.objectives]
        (torch.stack(shares).sum() * len(inputs)).backward()
        for unit, squares in scored(graph, found, functools.partial(_squares, graph)).items():
            # what goes together counts together: the sum of a place's channels in all parts
            worth[unit] += squares * unit.parts * unit.block
    return worth


def _squares(graph: Graph, members: Sequence[Member], total: int) -> Tensor:
    """[total]: over the layers that give a root's channel, the squares of what they are worth."""
    sums = torch.zeros(total)
    for member in members:
        module = member.module
        if member.inputs or not isinstance(module, LAYERS) or module.weight.grad is None:
            continue
        norm = graph.norm_after(module)
        change = _change(module if norm is None or norm.weight is None else norm)
        at, roots = (torch.as_tensor(list(part)) for part in (member.at, member.roots))
        sums.index_add_(0, roots, change[at] ** 2)
    return sums


def _change(gate: Any) -> Tensor:
    """[what it gives]: of the losses, if these weights of a layer or a norm were zero."""
    product = (gate.weight.grad * gate.weight).detach().float().cpu().transpose(0, gives(gate))
    change = product.reshape(len(product), -1).sum(1)
    if gate.bias is not None:
        change = change + (gate.bias.grad * gate.bias).detach().float().cpu()
    return change
