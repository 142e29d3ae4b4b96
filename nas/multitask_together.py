"""One network that answers every task, out of a search for several (`nas.multitask_search`).

Each task's distribution prefers other gates, and one backbone has to serve them all. Proposed are
the likeliest networks of their product (the mean of their logits: what all of them like; Hinton,
products of experts, Neural Computation 14, 2002) and of each alone, inside the budget of the whole
network. Judged are they by the weights they share, on validation images, by the mean over tasks of
the loss as a share of its best constant answer's, so that no task's unit decides.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import numpy as np

from nas.differentiable.proposals import propose
from nas.errors import BudgetInfeasible
from nas.multitask import evidence, scores
from nas.multitask_outcome import Finalist, child, constant_loss, validation_loss
from nas.multitask_search import Search, Shared
from nas.search import GENERATION
from nas.space import Genes


def judged(shared: Shared, search: Search, n: int = GENERATION) -> Iterator[Finalist]:
    """At most `n` networks with all heads, inside the budget that all problems of the search have.

    A finalist's loss is the mean share, its score the mean of the tasks' metrics. Raises
    BudgetInfeasible where no network was found.
    """
    constant = {goal.name: constant_loss(search.task, goal) for goal in search.task.goals}
    for row in proposed(shared, search)[:n]:
        net = child(shared, search, search.names, row)
        shares = [
            validation_loss(net, search.task.only([name])) / constant[name] for name in search.names
        ]
        found = scores(search.task, evidence(net, search.task, search.task.val))
        mean = float(np.mean(list(found.values())))
        yield Finalist(tuple(row.tolist()), float(np.mean(shares)), mean)


def proposed(shared: Shared, search: Search) -> Genes:
    """Distinct rows [N, G], of the product and of each task's distribution in turn."""
    problem, logits = search.problems[search.names[0]], shared.state.logits
    lists = [
        propose(replace(problem, policy=policy), 0, []) for policy in (logits.mean(0), *logits)
    ]
    turns = range(max(map(len, lists)))
    rows = [tuple(each[at].tolist()) for at in turns for each in lists if at < len(each)]
    if not rows:
        raise BudgetInfeasible(
            "no network inside the budget was found", where=f"tasks {', '.join(search.names)}"
        )
    return np.array(list(dict.fromkeys(rows)))
