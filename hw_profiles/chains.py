"""Random networks of common blocks: what calibrates a device for no search space in particular.

Plain, residual, bottleneck, separable, inverted-residual and densely connected networks over wide
ranges of image size, channels (also odd ones), kernels, strides and activations. Their operators
surround those of most convolutional networks, so a table fitted on them interpolates; and since
each is a whole network, fusion and overlapping overheads are in what is measured.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from hw_profiles import op
from hw_profiles.op import Op, Tape, Wire

SIZES = (8, 12, 16, 24, 32, 32, 48, 64, 96)
ACTS = ("relu", "relu", "hswish", "silu")
BASES = (4, 8, 8, 16, 16, 24, 32, 48)  # channels of the first stage
STEPS = (1, 4, *[8] * 8, 16, 16)  # of channels; odd ones are slow, and rare in what people build
MACS = (0.2e6, 40e6)  # what takes from some ten microseconds to some ten milliseconds


def sample(rng: np.random.Generator, n: int, macs: tuple[float, float] = MACS) -> list[list[Op]]:
    """`n` networks, each with a number of MACs inside the range."""
    found: list[list[Op]] = []
    while len(found) < n:
        ops = _network(rng)
        if macs[0] <= op.macs(ops) <= macs[1]:
            found.append(ops)
    return found


@dataclass(frozen=True)
class _Block:
    """What a block function needs: the tape, the dice and the block's sizes."""

    tape: Tape
    rng: np.random.Generator
    channels: int
    stride: int
    kernel: int
    act: str

    def conv(self, x: Wire, c_out: int, kernel: int = 1, stride: int = 1, groups: int = 1) -> Wire:
        return self.tape.conv(
            x, c_out, kernel=kernel, stride=stride, groups=groups, norm=True, act=self.act
        )

    def linear_conv(self, x: Wire, c_out: int, kernel: int = 1) -> Wire:
        return self.tape.conv(x, c_out, kernel=kernel, norm=True)


def _network(rng: np.random.Generator) -> list[Op]:
    size, base = int(rng.choice(SIZES)), int(rng.choice(BASES))
    act = str(rng.choice(ACTS))
    block = _BLOCKS[int(rng.integers(len(_BLOCKS)))]
    tape = Tape(channels=int(rng.choice((1, 3, 3, 3))), size=size)
    kernel, stride = int(rng.choice((3, 3, 5, 7))), 2 if size >= 48 else 1
    x = tape.conv(tape.input, _near(rng, base), kernel=kernel, stride=stride, norm=True, act=act)
    for stage in range(int(rng.integers(2, 5))):
        channels = _near(rng, base * 2**stage)
        for place in range(int(rng.integers(1, 4))):
            halve = place == 0 and stage > 0 and x.h >= 4 and x.h % 2 == 0
            kernel = int(rng.choice((1, 3, 3, 5)))
            x = block(_Block(tape, rng, channels, 2 if halve else 1, kernel, act), x)
    if rng.random() < 0.5:
        x = tape.conv(x, _near(rng, 4 * x.c), norm=True, act=act)
    x = tape.gap(x)
    if rng.random() < 0.3:
        x = tape.linear(x, _near(rng, 128), act="relu")
    tape.linear(x, int(rng.choice((2, 10, 100, 1000))))
    return tape.ops


def _near(rng: np.random.Generator, channels: float) -> int:
    """A number of channels within a factor of 1.5, mostly a multiple of 8."""
    step = int(rng.choice(STEPS))
    return max(step, round(channels * 2 ** rng.uniform(-0.6, 0.6) / step) * step)


def _plain(b: _Block, x: Wire) -> Wire:
    stride = b.stride
    if stride == 2 and b.rng.random() < 0.5:
        x, stride = (b.tape.maxpool(x) if b.rng.random() < 0.5 else b.tape.avgpool(x)), 1
    return b.conv(x, b.channels, b.kernel, stride)


def _separable(b: _Block, x: Wire) -> Wire:
    if x.c > 1:
        x = b.conv(x, x.c, max(3, b.kernel), b.stride, groups=x.c)
    return b.conv(x, b.channels)


def _dense(b: _Block, x: Wire) -> Wire:
    if b.stride == 2:
        x = b.tape.avgpool(x)
    growth = max(4, b.channels // 4)
    return b.tape.concat(x, b.conv(b.conv(x, 4 * growth), growth, 3))


def _residual(b: _Block, x: Wire) -> Wire:
    y = b.conv(x, _near(b.rng, b.channels), 3, b.stride)
    y = b.linear_conv(y, b.channels, 3)
    if b.stride == 1 and x.c == b.channels:
        return b.tape.add(y, x, act=b.act)
    return b.tape.add(y, _shortcut(b, x), act=b.act)


def _bottleneck(b: _Block, x: Wire) -> Wire:
    middle = max(8, _near(b.rng, b.channels / 2) // 8 * 8)
    y = b.conv(x, middle)
    y = b.conv(y, middle, max(3, b.kernel), b.stride, groups=int(b.rng.choice((1, 1, 2, 4))))
    return _join(b, x, b.linear_conv(y, b.channels))


def _inverted(b: _Block, x: Wire) -> Wire:
    middle = x.c * int(b.rng.choice((2, 3, 4, 6)))
    y = b.conv(x, middle)
    y = b.conv(y, middle, max(3, b.kernel), b.stride, groups=middle)
    if b.rng.random() < 0.5:  # squeeze-excite
        gate = b.tape.conv(b.tape.gap(y), max(4, middle // 4), bias=True, act="relu")
        y = b.tape.mul(y, b.tape.conv(gate, middle, bias=True, act="hsigmoid"))
    return _join(b, x, b.linear_conv(y, b.channels))


def _join(b: _Block, x: Wire, y: Wire) -> Wire:
    """With the identity where shapes agree, sometimes with a projected shortcut where not."""
    if b.stride == 1 and x.c == b.channels:
        return b.tape.add(y, x)
    return b.tape.add(y, _shortcut(b, x)) if b.rng.random() < 0.3 else y


def _shortcut(b: _Block, x: Wire) -> Wire:
    return b.linear_conv(b.tape.avgpool(x) if b.stride == 2 else x, b.channels)


_BLOCKS: tuple[Callable[[_Block, Wire], Wire], ...] = (
    _plain,
    _residual,
    _residual,
    _inverted,
    _inverted,
    _separable,
    _dense,
    _bottleneck,
)
