"""Families of operators that share the terms of a latency or energy table.

The networks of one space can hardly tell more than one family per kind of operator (KINDS).
Networks of many kinds can (`chains`): then 1x1, grouped and ragged depthwise convolutions are told
apart, an activation that costs more than a comparison is charged apart from the convolution before
it, and MACs count in whole tiles of output channels, where the staircase of latencies comes from.
"""

from __future__ import annotations

from typing import NamedTuple

from hw_profiles.op import Op
from nas.errors import unknown

KINDS = {
    "conv": "conv",
    "dwconv": "dwconv",
    "linear": "linear",
    "avgpool": "pool",
    "maxpool": "pool",
    "gap": "pool",
    "upsample": "join",  # one more pass over a map
    "add": "join",
    "mul": "join",
    "concat": "join",
    "act": "act",
    # too few were measured for families of their own
    "embed": "join",
    "position": "join",
    "layernorm": "act",
    "attention": "linear",
}
COARSE = tuple(dict.fromkeys(KINDS.values()))
FAMILIES = (*COARSE, "pointwise", "grouped", "ragged", "gap", "mul", "upsample", "epilogue")
RAGGED = 4  # depthwise convolutions of channels that are no multiple of it take slow paths
EPILOGUES = (
    "hswish",
    "silu",
    "hsigmoid",
    "gelu",
)  # relu is one comparison in the convolution's own loop


class Share(NamedTuple):
    """What an operator adds to a family."""

    family: str
    ops: float
    gmacs: float
    mb: float


def shares(op: Op, itemsize: int, tile: int = 0) -> tuple[Share, ...]:
    """By kind; with a `tile` of output channels by the finer families.

    Raises NasctlError for an unknown kind of operator.
    """
    if op.kind not in KINDS:
        raise unknown("operator", op.kind, KINDS)
    mb = op.bytes(itemsize) * 1e-6
    if not tile:
        return (Share(KINDS[op.kind], 1.0, op.macs * 1e-9, mb),)
    own = Share(_fine(op), 1.0, _tiled(op, tile) * 1e-9, mb)
    if op.act not in EPILOGUES or op.kind == "act" or op.h == 1:
        return (own,)
    written = op.c_out * op.h_out * op.w_out * itemsize * 1e-6
    return own, Share("epilogue", 1.0, 0.0, 2 * written)  # once read, once written


def _fine(op: Op) -> str:
    if op.kind == "conv":
        if op.h == op.w == 1:
            return "linear"
        return "pointwise" if op.kernel == 1 else "grouped" if op.groups > 1 else "conv"
    if op.kind == "dwconv":
        return "ragged" if op.c_out % RAGGED else "dwconv"
    return op.kind if op.kind in ("gap", "mul", "upsample") else KINDS[op.kind]


def _tiled(op: Op, tile: int) -> float:
    """MACs with the output channels rounded up to whole tiles."""
    if op.kind not in ("conv", "dwconv"):
        return op.macs
    return op.macs * (-(-op.c_out // tile) * tile) / op.c_out
