"""MeCo: the smallest eigenvalue of the correlations between channels, summed over layers (Jiang et
al., NeurIPS 2023).

From one sample's maps; here the batch's first, inside the pass that other proxies share, where the
paper draws one random image. A layer with a constant channel counts nothing, as in the paper's.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from nas.passes import Batch, Missing, Passes, alone, correlation, forward
from nas.record import Layer


def value(seen: Passes) -> float:
    layers = [layer for layer in seen.read(forward).record.layers if layer.output.dim() > 2]
    if not layers:
        raise Missing("no layer gives a map")
    return sum(_least(_channels(layer)) for layer in layers)


def _channels(layer: Layer) -> Tensor:
    """[C, places] of the first sample."""
    return layer.output[0].detach().movedim(layer.channel - 1, 0).flatten(1).double()


def _least(rows: Tensor) -> float:
    try:
        return torch.linalg.eigvalsh(correlation(rows))[0].clamp(min=0).item()
    except Missing:
        return 0.0


def score(net: nn.Module, batch: Batch) -> float:
    return alone(value, net, batch)
