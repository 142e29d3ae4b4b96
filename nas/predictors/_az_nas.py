"""The pass that AZ-NAS's proxies share (Lee and Ham, CVPR 2024, arXiv 2403.19232): what blocks give
for noise, with weights normal by fan-in.

A block is an outermost element of the network's lists (nn.Sequential, nn.ModuleList, lists in them
opened) that has layers inside; a network without two of these is its single layers.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from nas.passes import Missing, Passes, places

LISTS = (nn.Sequential, nn.ModuleList)


@dataclass(frozen=True)
class Block:
    entered: Tensor
    left: Tensor


def blocks(seen: Passes) -> list[Block]:
    """What entered and left each block, in the order in which they ran."""
    found: list[Block] = []

    def note(module: nn.Module, args: tuple[Any, ...], left: Any) -> None:
        if args and isinstance(args[0], Tensor) and isinstance(left, Tensor):
            # a copy: what is changed in place later was something else here
            found.append(Block(args[0], left.clone()))

    handles = [block.register_forward_hook(note) for block in _of(seen.net)]
    x = seen.noise().requires_grad_()
    try:
        seen.run(x, seen.fresh(lambda matrix: (2 * len(matrix) / matrix.numel()) ** 0.5))
    finally:
        for handle in handles:
            handle.remove()
    if len(found) < 2:
        raise Missing("fewer than two blocks")
    return found


def _of(net: nn.Module) -> list[nn.Module]:
    composite = list(_outermost(net))
    if len(composite) > 1:
        return composite
    return [m for m in net.modules() if isinstance(m, nn.Linear | nn.modules.conv._ConvNd)]


def _outermost(module: nn.Module) -> Iterator[nn.Module]:
    for child in module.children():
        opened = isinstance(child, LISTS)
        inside = isinstance(module, LISTS) and not opened
        if inside and any(True for _ in child.children()):
            yield child
        else:
            yield from _outermost(child)


def entropies(seen: Passes) -> list[float]:
    """Per block the entropy of the normalised spectrum of its features' covariance."""
    return [_entropy(places(block.left.detach()).double()) for block in seen.read(blocks)]


def _entropy(features: Tensor) -> float:
    centred = features - features.mean(0)
    spectrum = torch.linalg.eigvalsh(centred.T @ centred / len(centred)).clamp(min=0)
    if not torch.isfinite(spectrum).all():
        raise Missing("overflow: the features are not finite")
    if spectrum.sum() <= 0:
        raise Missing("dead: a block gives the same for every sample")
    share = spectrum / spectrum.sum()
    share = share[share > 0]
    return -(share * share.log()).sum().item()
