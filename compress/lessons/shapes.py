"""Features of every kind of network in one shape."""

from __future__ import annotations

from torch import Tensor


def last(x: Tensor) -> Tensor:
    """Maps [N, C, H, W] with the channels last; sequences and vectors as they are."""
    return x.movedim(1, -1) if x.ndim == 4 else x


def tokens(x: Tensor, mask: Tensor | None) -> Tensor:
    """Features with the channels last as rows [rows, C], without those of padding."""
    return x[mask] if mask is not None and x.ndim == 3 else x.reshape(-1, x.shape[-1])


def pooled(x: Tensor, mask: Tensor | None) -> Tensor:
    """One vector [N, C] per example: the mean over places, padding left out."""
    x = last(x)
    if mask is not None and x.ndim == 3:
        weight = mask[..., None].to(x)
        return (x * weight).sum(1) / weight.sum(1)
    return x.flatten(1, -2).mean(1) if x.ndim > 2 else x
