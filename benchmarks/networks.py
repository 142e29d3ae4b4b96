"""Op lists of the three network families that public latency tables measure.

NAS-Bench-201 (arXiv 2001.00326), FBNet as HW-NAS-Bench sizes it for CIFAR-100 (arXiv 2103.10584)
and Once-for-All's MobileNetV3 (arXiv 1908.09791). They are written here rather than taken from
`nas.search_spaces` because a table of other people's measurements needs other people's networks,
whatever our own spaces become.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import replace

from hw_profiles.op import Op, Tape, Wire

NB201_NODES = 4
FBNET_LAYERS = (  # channels, how many, stride of the first (CIFAR sizes of HW-NAS-Bench)
    (16, 1, 1),
    (24, 4, 1),
    (32, 4, 2),
    (64, 4, 2),
    (112, 4, 1),
    (184, 4, 2),
    (352, 1, 1),
)
FBNET_OPS = (  # kernel, expansion, groups of the 1x1 convolutions; index 8 is skip
    (3, 1, 1),
    (3, 1, 2),
    (3, 3, 1),
    (3, 6, 1),
    (5, 1, 1),
    (5, 1, 2),
    (5, 3, 1),
    (5, 6, 1),
)
FBNET_SKIP = len(FBNET_OPS)
OFA_STAGES = (  # channels at width 1.0, stride, squeeze-excite, activation
    (24, 2, False, "relu"),
    (40, 2, True, "relu"),
    (80, 2, False, "hswish"),
    (112, 1, True, "hswish"),
    (160, 2, True, "hswish"),
)
OFA_DEPTH = 4  # the lists of kernels and expansions hold this many layers per stage


def nb201_edges(arch: str) -> tuple[tuple[str, ...], ...]:
    """`|a~0|+|b~0|c~1|+...` as ((a,), (b, c), ...): per node the operator on the edge from each
    earlier node."""
    nodes = [part.strip("|").split("|") for part in arch.split("+")]
    parsed = [[edge.split("~") for edge in node] for node in nodes]
    for node in parsed:
        if [source for _, source in node] != [str(at) for at in range(len(node))]:
            raise ValueError(f"edges out of order in {arch}")
    return tuple(tuple(name for name, _ in node) for node in parsed)


def nb201_live(arch: str) -> tuple[tuple[str, ...], ...] | None:
    """The edges with every one that carries nothing set to `none`; None for a dead network."""
    return _live(nb201_edges(arch))


@functools.cache
def _live(edges: tuple[tuple[str, ...], ...]) -> tuple[tuple[str, ...], ...] | None:
    reached = {0}
    for node, incoming in enumerate(edges, start=1):
        if any(op != "none" and source in reached for source, op in enumerate(incoming)):
            reached.add(node)
    if NB201_NODES - 1 not in reached:
        return None
    useful = {NB201_NODES - 1}
    for node in range(NB201_NODES - 1, 0, -1):
        if node in useful:
            useful |= {source for source, op in enumerate(edges[node - 1]) if op != "none"}
    alive = reached & useful
    return tuple(
        tuple(
            op if node in alive and source in alive else "none"
            for source, op in enumerate(incoming)
        )
        for node, incoming in enumerate(edges, start=1)
    )


def nb201_ops(arch: str, classes: int) -> list[Op]:
    """Raises ValueError for one of the 341 networks whose output does not depend on the input."""
    edges = nb201_live(arch)
    if edges is None:
        raise ValueError(f"dead network {arch}")
    return _nb201(edges, _nb201_cell, classes)


def nb201_executed(arch: str, classes: int) -> list[Op]:
    """The same network as PyTorch runs it: an edge `none` multiplies by zero and is added like any
    other, and what no output depends on is computed too. It describes all 15,625 networks, and
    what was timed by those who measured them without removing anything."""
    return _nb201(nb201_edges(arch), _nb201_executed_cell, classes)


def _nb201(
    edges: tuple[tuple[str, ...], ...],
    cell: Callable[[Tape, Wire, tuple[tuple[str, ...], ...]], Wire],
    classes: int,
) -> list[Op]:
    """Stem, three stages of five cells, head."""
    tape = Tape(channels=3, size=32)
    x = tape.conv(tape.input, 16, kernel=3, norm=True)
    for stage, channels in enumerate((16, 32, 64)):
        if stage:
            x = _nb201_reduce(tape, x, channels)
        for _ in range(5):
            x = cell(tape, x, edges)
    x = tape.act(x, "relu")
    tape.ops[-1] = replace(tape.ops[-1], norm=True)  # the only norm that follows no convolution
    tape.linear(tape.gap(x), classes)
    return tape.ops


def _nb201_executed_cell(tape: Tape, x: Wire, edges: tuple[tuple[str, ...], ...]) -> Wire:
    nodes = [x]
    for incoming in edges:
        # a multiplication by a constant moves what one by its own input moves
        ys = [
            tape.mul(source, source) if op == "none" else _nb201_edge(tape, source, op)
            for source, op in zip(nodes, incoming, strict=True)
        ]
        nodes.append(functools.reduce(tape.add, ys))
    return nodes[-1]


def _relu_conv_bn(tape: Tape, x: Wire, channels: int, kernel: int, stride: int = 1) -> Wire:
    return tape.conv(tape.act(x, "relu"), channels, kernel=kernel, stride=stride, norm=True)


def _nb201_reduce(tape: Tape, x: Wire, channels: int) -> Wire:
    main = _relu_conv_bn(tape, x, channels, kernel=3, stride=2)
    main = _relu_conv_bn(tape, main, channels, kernel=3)
    return tape.add(main, tape.conv(tape.avgpool(x), channels))


def _nb201_cell(tape: Tape, x: Wire, edges: tuple[tuple[str, ...], ...]) -> Wire:
    nodes: list[Wire | None] = [x]
    for incoming in edges:
        total: Wire | None = None
        for source, op in zip(nodes, incoming, strict=False):
            if op == "none" or source is None:
                continue
            y = _nb201_edge(tape, source, op)
            total = y if total is None else tape.add(total, y)
        nodes.append(total)
    assert nodes[-1] is not None
    return nodes[-1]


def _nb201_edge(tape: Tape, x: Wire, op: str) -> Wire:
    if op == "skip_connect":
        return x
    if op == "avg_pool_3x3":
        return tape.avgpool(x, kernel=3, stride=1)
    return _relu_conv_bn(tape, x, x.c, kernel={"nor_conv_3x3": 3, "nor_conv_1x1": 1}[op])


def fbnet_ops(choice: Sequence[int], classes: int = 100) -> list[Op]:
    tape = Tape(channels=3, size=32)
    x = tape.conv(tape.input, 16, kernel=3, norm=True, act="relu")
    layers = [
        (channels, stride if at == 0 else 1)
        for channels, count, stride in FBNET_LAYERS
        for at in range(count)
    ]
    for op, (channels, stride) in zip(choice, layers, strict=True):
        x = _fbnet_block(tape, x, op, channels, stride)
    x = tape.conv(x, 1504, norm=True, act="relu")
    tape.linear(tape.gap(x), classes)
    return tape.ops


def _fbnet_block(tape: Tape, x: Wire, op: int, channels: int, stride: int) -> Wire:
    same = stride == 1 and x.c == channels
    if op == FBNET_SKIP:
        return x if same else tape.conv(x, channels, stride=stride, norm=True, act="relu")
    kernel, expansion, groups = FBNET_OPS[op]
    middle = x.c * expansion
    y = tape.conv(x, middle, groups=groups, norm=True, act="relu")
    if groups > 1:
        y = tape.concat(y)  # a channel shuffle moves what a concat of one tensor moves
    y = tape.conv(y, middle, kernel=kernel, stride=stride, groups=middle, norm=True, act="relu")
    y = tape.conv(y, channels, groups=groups, norm=True)
    return tape.add(x, y) if same else y


def _divisible(value: float, by: int = 8) -> int:
    """The MobileNet rule: the nearest multiple of `by`, but never below 90 % of the value."""
    rounded = max(by, int(value + by / 2) // by * by)
    return rounded if rounded >= 0.9 * value else rounded + by


def ofa_ops(
    kernels: Sequence[int],
    expansions: Sequence[int],
    depths: Sequence[int],
    size: int,
    width: float = 1.2,
) -> list[Op]:
    tape = Tape(channels=3, size=size)
    first = _divisible(16 * width)
    x = tape.conv(tape.input, first, kernel=3, stride=2, norm=True, act="hswish")
    y = tape.conv(x, first, kernel=3, groups=first, norm=True, act="relu")
    x = tape.add(x, tape.conv(y, first, norm=True))
    for stage, (base, stride, se, act) in enumerate(OFA_STAGES):
        channels = _divisible(base * width)
        for layer in range(depths[stage]):
            at = stage * OFA_DEPTH + layer
            middle = _divisible(round(x.c * expansions[at]))
            y = tape.conv(x, middle, norm=True, act=act)
            y = _ofa_depthwise(tape, y, kernels[at], 1 if layer else stride, (se, act))
            y = tape.conv(y, channels, norm=True)
            x = tape.add(x, y) if layer else y
    x = tape.gap(tape.conv(x, _divisible(960 * width), norm=True, act="hswish"))
    x = tape.conv(x, _divisible(1280 * width), act="hswish")
    tape.linear(x, 1000)
    return tape.ops


def _ofa_depthwise(
    tape: Tape, x: Wire, kernel: int, stride: int, se_and_act: tuple[bool, str]
) -> Wire:
    se, act = se_and_act
    y = tape.conv(x, x.c, kernel=kernel, stride=stride, groups=x.c, norm=True, act=act)
    if not se:
        return y
    squeezed = tape.conv(tape.gap(y), _divisible(x.c // 4), bias=True, act="relu")
    return tape.mul(y, tape.conv(squeezed, x.c, bias=True, act="hsigmoid"))
