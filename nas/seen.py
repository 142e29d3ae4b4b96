"""Seen: what one forward pass shows of itself to whoever distils it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor


class Heads(NamedTuple):
    """Queries, keys and values of one attention layer, heads side by side: [N, S, heads * size]."""

    q: Tensor
    k: Tensor
    v: Tensor


@dataclass(frozen=True)
class Seen:
    """Of a batch of N: what its layers computed, in order, and the prediction at the end."""

    features: tuple[Tensor, ...] = ()  # maps [N, C, H, W], sequences [N, S, C] or vectors [N, C]
    attention: tuple[Heads, ...] = ()  # of each attention layer
    heads: tuple[int, ...] = ()  # their numbers
    mask: Tensor | None = None  # [N, S]: True where there is a token
    logits: Tensor | None = None  # [N, classes]
