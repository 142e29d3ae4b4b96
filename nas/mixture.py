"""Gradients of many tasks' architecture distributions from one sample of networks.

Every task t has a distribution of its own over genes, a product of categoricals p_t. Networks are
drawn once, from the tasks' uniform mixture q = mean of p_s, and each task reads every network's
loss with the importance weight p_t / q. As q >= p_t / T the weights are at most T, their mean is 1,
and for every task the estimate of

    d/d logits_t  E_{a ~ p_t}[loss_t(a)]  =  E_{a ~ q}[ weight_t(a) (loss_t(a) - b_t) score_t(a) ]

is unbiased for any b_t that does not depend on a (REINFORCE, Williams 1992; balance heuristic,
Veach and Guibas 1995). So T tasks cost as many networks as one. FBNetV5 (arXiv 2111.10007) searches
for many tasks at the cost of one; whether by exactly this proposal and this baseline is not public.

Imports without torch.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from nas.space import Genes

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Policies:
    """Per task a product of categoricals: logits [T, G, K], -inf where a gene has no such option.

    Genes that a row leaves without effect are drawn all the same: they only add noise.
    """

    logits: Array

    @cached_property
    def log_probs(self) -> Array:
        """[T, G, K]; each [t, g] sums to 1 in probability."""
        return self.logits - np.logaddexp.reduce(self.logits, axis=2, keepdims=True)

    @cached_property
    def probs(self) -> Array:
        return np.exp(self.log_probs)

    @property
    def tasks(self) -> int:
        return len(self.logits)

    def log_prob(self, rows: Genes) -> Array:
        """log p_t of each row: [M, T] for rows [M, G]."""
        of_gene = self.log_probs[:, np.arange(rows.shape[1]), rows]  # [T, M, G]
        return of_gene.sum(2).T

    def score(self, rows: Genes) -> Array:
        """d log p_t(row) / d logits_t: [M, T, G, K]."""
        chosen = rows[:, :, None] == np.arange(self.logits.shape[2])  # [M, G, K]
        return chosen[:, None] - self.probs[None]

    def entropy(self) -> Array:
        """Nats per gene [T], as a share of the uniform distribution's: 1 at first, 0 when settled.
        A gene with one option counts for nothing."""
        terms = np.where(self.probs > 0, self.probs * np.maximum(self.log_probs, -1e3), 0.0)
        options = np.isfinite(self.logits).sum(2)
        return -terms.sum((1, 2)) / np.log(options).sum(1)

    def likeliest(self) -> Genes:
        """Each task's most probable row [T, G]."""
        return self.log_probs.argmax(2)


def uniform(tasks: int, sizes: NDArray[np.int64]) -> Policies:
    """Every option of every gene equally likely, for every task; `sizes` [G] counts the options."""
    exists = np.arange(int(sizes.max())) < sizes[:, None]
    one = np.where(exists, 0.0, -np.inf)
    return Policies(np.repeat(one[None], tasks, axis=0))


def draw(policies: Policies, rng: np.random.Generator, n: int) -> Genes:
    """`n` rows [n, G] from the mixture: a task at random, then a network of its distribution."""
    of = rng.integers(0, policies.tasks, n)
    below = policies.probs.cumsum(2)[of]  # [n, G, K]
    at = rng.random((n, below.shape[1], 1)) * below[:, :, -1:]
    return (at >= below).sum(2)


def weights(policies: Policies, rows: Genes) -> Array:
    """p_t / q of each row [M, T]: between 0 and T, and over rows of the mixture 1 on average."""
    each = policies.log_prob(rows)
    mixture = np.logaddexp.reduce(each, axis=1) - np.log(policies.tasks)
    return np.exp(each - mixture[:, None])


def effective(weight: Array) -> Array:
    """Share [T] of the M rows that each task's estimate is worth (Kish): at least 1 / T in the
    limit, 1 where all tasks agree."""
    most = len(weight) * np.square(weight).sum(0)
    return np.square(weight.sum(0)) / np.maximum(most, np.finfo(float).tiny)


def leave_one_out(weight: Array, losses: Array) -> Array:
    """For each row the other rows' weighted mean loss [M, T]: it knows nothing of the row itself,
    so that subtracting it leaves an estimate unbiased. 0 where there is no other row of weight."""
    total, mass = (weight * losses).sum(0), weight.sum(0)
    others = mass - weight
    heavy = others > 1e-12 * len(weight)
    return np.where(heavy, (total - weight * losses) / np.where(heavy, others, 1.0), 0.0)


def gradient(policies: Policies, rows: Genes, losses: Array) -> Array:
    """Unbiased estimate of each task's d E[loss] / d logits [T, G, K] from rows of the mixture.

    `losses` [M, T]: lower is better; NaN where a task has no loss of a network (no labelled image,
    a failed evaluation): that task's estimate then rests on its other rows.
    """
    known = np.isfinite(losses)
    weight = np.where(known, weights(policies, rows), 0.0)
    losses = np.where(known, losses, 0.0)
    advantage = weight * (losses - leave_one_out(weight, losses))
    count = np.maximum(known.sum(0), 1)
    found: Array = np.einsum("mt,mtgk->tgk", advantage, policies.score(rows))
    return found / count[:, None, None]
