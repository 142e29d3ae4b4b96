"""REINFORCE (Williams 1992, as Zoph and Le 2017 search): a policy over genes learns from rewards.

The policy is a softmax over the networks of the pool that were not queried, its logits linear in
the encoding; so its gradient is exact and no query is spent on what is known.
"""

from __future__ import annotations

import numpy as np

from nas.pool import Pool, Search
from nas.pool.scales import graded

RATE = 0.1  # of Adam; at the published 0.01 twenty rewards leave the policy uniform
MOMENTS = (0.9, 0.999)


def search(pool: Pool, budget: int, seed: int) -> Search:
    """The reward is the answer's normal score among all so far: tasks differ in unit and scale."""
    rng = np.random.default_rng((seed, 22))
    encoding = pool.encoding.astype(np.float64)
    logits, first, second = np.zeros((3, encoding.shape[1]))
    seen: list[int] = []
    answers: list[float] = []
    for step in range(1, budget + 1):
        score = encoding @ logits
        score[seen] = -np.inf
        policy = np.exp(score - score.max())
        policy /= policy.sum()
        row = int(rng.choice(len(pool), p=policy))
        seen.append(row)
        answers.append((yield row))
        gradient = graded(np.array(answers))[-1] * (encoding[row] - policy @ encoding)
        first = MOMENTS[0] * first + (1 - MOMENTS[0]) * gradient
        second = MOMENTS[1] * second + (1 - MOMENTS[1]) * gradient**2
        unbiased = first / (1 - MOMENTS[0] ** step), second / (1 - MOMENTS[1] ** step)
        logits = logits + RATE * unbiased[0] / (np.sqrt(unbiased[1]) + 1e-8)
