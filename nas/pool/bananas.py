"""BANANAS-style search (White, Neiswanger and Savani, AAAI 2021): an ensemble of small networks on
the encoding, independent Thompson sampling, a few queries per fit.

The paper's path encoding needs a cell's graph; where the pool has graph features they go in.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from nas.pool import Array, Pool, Search
from nas.pool.scales import best_unseen, graded

STARTUP = 5
BATCH = 5  # queries between two fits
MEMBERS = 5
HIDDEN = 16
STEPS = 100  # of Adam, on everything seen at once
RATE = 0.02
DECAY = 1e-3


def search(pool: Pool, budget: int, seed: int) -> Search:
    """Random at first; then the best draws from N(mean, spread) of the members' predictions."""
    rng = np.random.default_rng((seed, 26))
    inputs = _standard(np.concatenate([pool.encoding, pool.graph], axis=1))
    seen: list[int] = []
    answers: list[float] = []
    mean = spread = np.zeros(len(pool))
    for step in range(budget):
        if step >= STARTUP and step % BATCH == 0:
            predicted = fitted(inputs, np.array(seen), graded(np.array(answers)), rng)
            mean, spread = predicted.mean(axis=0), predicted.std(axis=0)
        draw = rng.standard_normal(len(pool))
        row = best_unseen(draw if step < STARTUP else mean + spread * draw, seen)
        seen.append(row)
        answers.append((yield row))


def _standard(inputs: Array) -> Array:
    """Columns with mean 0 and deviation 1; one column of zeros where there are none."""
    varied = inputs[:, np.ptp(inputs, axis=0) > 0] if inputs.size else np.zeros((len(inputs), 0))
    if varied.shape[1] == 0:
        return np.zeros((len(inputs), 1))
    return (varied - varied.mean(axis=0)) / varied.std(axis=0)


def fitted(
    inputs: Array, rows: NDArray[np.int64], target: Array, rng: np.random.Generator
) -> Array:
    """Predictions [MEMBERS, N] of two-layer networks, each from its own random start, trained
    together on `rows`."""
    width = inputs.shape[1]
    weights = [
        rng.standard_normal((MEMBERS, width, HIDDEN)) / np.sqrt(width),
        rng.standard_normal((MEMBERS, 1, HIDDEN)) * 0.1,
        rng.standard_normal((MEMBERS, HIDDEN, 1)) / np.sqrt(HIDDEN),
        np.zeros((MEMBERS, 1, 1)),
    ]
    moments = [(np.zeros_like(w), np.zeros_like(w)) for w in weights]
    x, y = inputs[rows], target[:, None]
    for step in range(1, STEPS + 1):
        w1, b1, w2, b2 = weights
        hidden = np.maximum(x @ w1 + b1, 0)
        error = (hidden @ w2 + b2 - y) / len(y)
        back = (error @ w2.transpose(0, 2, 1)) * (hidden > 0)
        gradients = [
            x.T @ back,
            back.sum(axis=1, keepdims=True),
            hidden.transpose(0, 2, 1) @ error,
            error.sum(axis=1, keepdims=True),
        ]
        for at, gradient in enumerate(gradients):
            slope = gradient + DECAY * weights[at]
            first = 0.9 * moments[at][0] + 0.1 * slope
            second = 0.999 * moments[at][1] + 0.001 * slope**2
            moments[at] = first, second
            corrected = (first / (1 - 0.9**step)) / (np.sqrt(second / (1 - 0.999**step)) + 1e-8)
            weights[at] = weights[at] - RATE * corrected
    w1, b1, w2, b2 = weights
    return np.array(
        [(np.maximum(inputs @ w1[at] + b1[at], 0) @ w2[at] + b2[at])[:, 0] for at in range(MEMBERS)]
    )
