"""Zen-score: how much the features before the last pooling move when the input does, with weights
N(0, 1), the scale that batch norms take away added back (Lin et al., arXiv 2102.01063).

log E|f(x) - f(x + 0.01 noise)|_1 + sum over norms of log sqrt(mean variance of what enters). Made
for plain chains of convolution, batch norm and ReLU; in cells without a path of convolutions it
says little. The features are the last map that a layer or an activation gave.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from nas.passes import Batch, Missing, Passes, alone
from nas.record import Recorder

STEP = 0.01


def value(seen: Passes) -> float:
    weights = seen.fresh(lambda matrix: 1.0)
    generator = seen.generator()
    x, step = (
        torch.randn(seen.batch.inputs.shape, generator=generator).to(seen.device) for _ in range(2)
    )
    with torch.no_grad():
        before, features = _features(seen, x, weights)
        _, moved = _features(seen, x + STEP * step, weights)
    if other := [call.name for call in before.norms if call.name != "batch_norm"]:
        raise Missing(f"its scale is hidden by {other[0]}")
    distance = (features - moved).abs().flatten(1).sum(1).mean().item()
    if distance == 0:
        raise Missing("dead: the features do not depend on the input")
    return math.log(distance) + sum(_log_scale(call.entered) for call in before.norms)


def _features(seen: Passes, x: Tensor, weights: dict[str, Tensor]) -> tuple[Recorder, Tensor]:
    with Recorder() as record:
        seen.run(x, weights)
    if record.last_map is None:
        raise Missing("no map of features was seen")
    return record, record.last_map


def _log_scale(entered: Tensor) -> float:
    others = [dim for dim in range(entered.dim()) if dim != 1]
    variance = entered.var(others, correction=0).mean().item()
    return 0.5 * math.log(variance) if variance > 0 else 0.0  # a branch of zeros scales nothing


def score(net: nn.Module, batch: Batch) -> float:
    return alone(value, net, batch)
