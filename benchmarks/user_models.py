"""Op lists of networks as users bring them: none is in a search space of ours or in `chains`.

Well-known shapes at the sizes of small boards, written from their papers' tables: VGG (1409.1556),
ResNet-18 (1512.03385), MobileNet V1 (1704.04861) and V2 (1801.04381), DenseNet-BC (1608.06993),
SqueezeNet (1602.07360), EfficientNet (1905.11946), RegNetX (2003.13678), Inception (1409.4842),
LeNet-5.
"""

from __future__ import annotations

from hw_profiles.op import Op, Tape, Wire

#: expansion, channels, blocks, stride, kernel
V2_STAGES = (
    (1, 16, 1, 1, 3),
    (6, 24, 2, 2, 3),
    (6, 32, 3, 2, 3),
    (6, 64, 3, 2, 3),
    (6, 96, 2, 1, 3),
)
B0_STAGES = (
    (1, 16, 1, 1, 3),
    (6, 24, 2, 2, 3),
    (6, 40, 2, 2, 5),
    (6, 80, 3, 2, 3),
    (6, 112, 2, 1, 5),
)
V1_LAYERS = ((64, 1), (128, 2), (128, 1), (256, 2), (256, 1), (512, 2), (512, 1), (512, 1))


def all_models() -> dict[str, list[Op]]:
    return {
        "vgg 32 px": vgg(32, 16),
        "vgg 64 px": vgg(64, 12),
        "resnet18 64 px": resnet18(64, 16),
        "resnet18 96 px": resnet18(96, 24),
        "mobilenet v1 64 px": mobilenet_v1(64, 0.5),
        "mobilenet v1 96 px": mobilenet_v1(96, 0.75),
        "mobilenet v2 96 px": inverted(96, 0.5, V2_STAGES, act="relu", gate=False),
        "mobilenet v2 64 px": inverted(64, 1.0, V2_STAGES, act="relu", gate=False),
        "efficientnet 96 px": inverted(96, 0.5, B0_STAGES, act="silu", gate=True),
        "efficientnet 64 px": inverted(64, 1.0, B0_STAGES, act="silu", gate=True),
        "densenet 32 px": densenet(32, 12, 6),
        "squeezenet 64 px": squeezenet(64),
        "regnet 64 px": regnet(64, 24),
        "inception 32 px": inception(32),
        "lenet 28 px": lenet(28),
    }


class _Norm:
    """A tape whose convolutions are followed by a norm and an activation."""

    def __init__(self, size: int, act: str, channels: int = 3) -> None:
        self.tape, self.act = Tape(channels, size), act

    def conv(self, x: Wire, c: int, kernel: int = 1, stride: int = 1, groups: int = 1) -> Wire:
        return self.tape.conv(
            x, c, kernel=kernel, stride=stride, groups=groups, norm=True, act=self.act
        )

    def linear_conv(self, x: Wire, c: int, kernel: int = 1, stride: int = 1) -> Wire:
        return self.tape.conv(x, c, kernel=kernel, stride=stride, norm=True)

    def head(self, x: Wire, classes: int) -> list[Op]:
        self.tape.linear(self.tape.gap(x), classes)
        return self.tape.ops


def vgg(size: int, width: int) -> list[Op]:
    net = _Norm(size, "relu")
    x = net.tape.input
    for channels in (width, 2 * width, 4 * width, 8 * width):
        x = net.conv(net.conv(x, channels, 3), channels, 3)
        x = net.tape.maxpool(x)
    return net.head(x, 10)


def resnet18(size: int, width: int) -> list[Op]:
    net = _Norm(size, "relu")
    x = net.tape.maxpool(net.conv(net.tape.input, width, 7, 2), kernel=3, stride=2)
    for stage in range(4):
        channels = width * 2**stage
        for block in range(2):
            stride = 2 if stage and not block else 1
            same = stride == 1 and x.c == channels
            shortcut = x if same else net.linear_conv(x, channels, stride=stride)
            y = net.linear_conv(net.conv(x, channels, 3, stride), channels, 3)
            x = net.tape.add(y, shortcut, act="relu")
    return net.head(x, 100)


def mobilenet_v1(size: int, multiplier: float) -> list[Op]:
    net = _Norm(size, "relu")
    x = net.conv(net.tape.input, _scaled(32, multiplier), 3, 2)
    for channels, stride in V1_LAYERS:
        x = net.conv(x, x.c, 3, stride, groups=x.c)
        x = net.conv(x, _scaled(channels, multiplier))
    return net.head(x, 100)


def inverted(
    size: int, multiplier: float, stages: tuple[tuple[int, ...], ...], *, act: str, gate: bool
) -> list[Op]:
    net = _Norm(size, act)
    x = net.conv(net.tape.input, _scaled(32, multiplier), 3, 2)
    for expand, channels, blocks, stride, kernel in stages:
        for block in range(blocks):
            y = net.conv(x, x.c * expand) if expand > 1 else x
            y = net.conv(y, y.c, kernel, 1 if block else stride, groups=y.c)
            if gate:
                squeezed = net.tape.conv(net.tape.gap(y), max(4, x.c // 4), bias=True, act=act)
                y = net.tape.mul(y, net.tape.conv(squeezed, y.c, bias=True, act="hsigmoid"))
            y = net.linear_conv(y, _scaled(channels, multiplier))
            x = net.tape.add(y, x) if block else y
    return net.head(net.conv(x, _scaled(640, multiplier)), 100)


def densenet(size: int, growth: int, layers: int) -> list[Op]:
    net = _Norm(size, "relu")
    x = net.conv(net.tape.input, 2 * growth, 3)
    for stage in range(3):
        for _ in range(layers):
            x = net.tape.concat(x, net.conv(net.conv(x, 4 * growth), growth, 3))
        if stage < 2:
            x = net.tape.avgpool(net.conv(x, x.c // 2))
    return net.head(x, 10)


def squeezenet(size: int) -> list[Op]:
    tape = Tape(3, size)
    x = tape.conv(tape.input, 32, kernel=3, stride=2, bias=True, act="relu")
    x = tape.maxpool(x, kernel=3, stride=2)
    for squeeze, expand in ((16, 32), (16, 32), (32, 64), (32, 64)):
        y = tape.conv(x, squeeze, bias=True, act="relu")
        left = tape.conv(y, expand, bias=True, act="relu")
        x = tape.concat(left, tape.conv(y, expand, kernel=3, bias=True, act="relu"))
    tape.gap(tape.conv(x, 100, bias=True, act="relu"))
    return tape.ops


def regnet(size: int, width: int) -> list[Op]:
    net = _Norm(size, "relu")
    x = net.conv(net.tape.input, 16, 3, 2)
    for channels in (width, 2 * width, 4 * width):
        for block in range(2):
            stride = 1 if block else 2
            shortcut = x if block else net.linear_conv(x, channels, stride=stride)
            y = net.conv(net.conv(x, channels), channels, 3, stride, groups=channels // 8)
            x = net.tape.add(net.linear_conv(y, channels), shortcut, act="relu")
    return net.head(x, 10)


def inception(size: int) -> list[Op]:
    net = _Norm(size, "relu")
    x = net.tape.maxpool(net.conv(net.tape.input, 32, 3))
    for channels in (32, 64, 64):
        branches = (
            net.conv(x, channels),
            net.conv(net.conv(x, channels // 2), channels, 3),
            net.conv(net.conv(x, channels // 4), channels // 2, 5),
            net.conv(net.tape.maxpool(x, kernel=3, stride=1), channels // 2),
        )
        x = net.tape.concat(*branches)
    return net.head(x, 10)


def lenet(size: int) -> list[Op]:
    tape = Tape(1, size)
    x = tape.maxpool(tape.conv(tape.input, 8, kernel=5, bias=True, act="relu"))
    x = tape.maxpool(tape.conv(x, 24, kernel=5, bias=True, act="relu"))
    x = tape.linear(tape.linear(tape.gap(x), 128, act="relu"), 64, act="relu")
    tape.linear(x, 10)
    return tape.ops


def _scaled(channels: int, multiplier: float) -> int:
    return max(8, int(channels * multiplier / 8) * 8)
