"""First-order Taylor scores (Molchanov et al., CVPR 2019, arXiv 1906.10771): how much the tasks'
losses would change, to first order, if the weights that give a channel were zero; one order of all
channels. Each task's loss counts relative to its value, so that none drowns the others."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from compress import losses, units
from compress.graph import LAYERS, Member, forward, gives
from compress.job import Job, Settings, Steps
from compress.reach import Scores, by_threshold, reach, scored
from compress.units import Unit


def prune(job: Job, settings: Settings = Settings()) -> Steps:
    found = units.find(job.net, job.example_inputs)
    scores = taylor(job, found.units)
    return reach(job, found, scores, by_threshold(scores, lambda unit: "all", settings))


def taylor(job: Job, found: Sequence[Unit]) -> Scores:
    """Squared sums of weight times gradient over the batches, by unit and place."""
    graph = job.graph()
    before = losses.measure(graph.net, job.objectives, job.batches).values
    graph.net.zero_grad()
    for inputs, targets in job.batches:
        outputs = forward(graph.net, inputs)
        shares = [o.loss(outputs, targets) / before[o.name] for o in job.objectives]
        (torch.stack(shares).sum() * len(inputs)).backward()
    # what goes together counts together: a place is worth the sum of its channels in all parts
    return {u: worth * u.parts * u.block for u, worth in scored(graph, found, _squares).items()}


def _squares(members: Sequence[Member], total: int) -> Tensor:
    """[total]: over the layers that give a root's channel, the squares of their sums."""
    sums = torch.zeros(total)
    for member in members:
        module = member.module
        if member.inputs or not isinstance(module, LAYERS) or module.weight.grad is None:
            continue
        product = (module.weight.grad * module.weight).detach().float().cpu()
        change = product.transpose(0, gives(module)).flatten(1).sum(1)
        if module.bias is not None and module.bias.grad is not None:
            change = change + (module.bias.grad * module.bias).detach().float().cpu()
        at, roots = (torch.as_tensor(list(part)) for part in (member.at, member.roots))
        sums.index_add_(0, roots, change[at] ** 2)
    return sums
