"""Fisher: saliency of channels, from activations and their gradients (Theis et al., arXiv
1801.05787; as a proxy Turner et al., arXiv 1906.04113, and Abdelfattah et al., arXiv 2101.08134).

For channel c of a layer's output a: half the mean over samples of (sum over places of a dL/da)^2,
weighted by the channel's number of weights, because the published proxy gives every weight of a
filter its channel's value before it sums. L is the mean over the batch, so values fall with B^2.
"""

from __future__ import annotations

from torch import Tensor, nn

from nas.passes import Batch, Missing, Passes, alone, forward, gradients
from nas.record import Layer


def value(seen: Passes) -> float:
    found = seen.read(gradients)
    if opaque := seen.read(forward).record.opaque:
        raise Missing(f"not looked into: {opaque[0]}")
    if not found.layers:
        raise Missing("no convolution and no linear layer was seen")
    batch = len(seen.batch.inputs)
    if any(len(layer.output) != batch for layer, _ in found.layers):
        raise Missing("a layer's output does not begin with the samples")
    return sum(_saliency(layer, gradient) for layer, gradient in found.layers)


def _saliency(layer: Layer, gradient: Tensor) -> float:
    product = (layer.output.detach() * gradient).movedim(layer.channel, 1)  # [B, C, ...]
    per_sample = product.flatten(2).sum(2) if product.dim() > 2 else product
    return layer.fan_in * 0.5 * (per_sample**2).mean(0).sum().item()


def score(net: nn.Module, batch: Batch) -> float:
    return alone(value, net, batch)
