"""Networks whose graphs pruning must get right: detectors, transformers, and random ones."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn


def conv(c_in, c_out, kernel=3, stride=1, groups=1):
    return nn.Sequential(
        nn.Conv2d(c_in, c_out, kernel, stride, kernel // 2, groups=groups, bias=False),
        nn.BatchNorm2d(c_out),
        nn.SiLU(inplace=True),
    )


def settled(net, size=16, channels=3, seed=0):
    """The network with statistics and weights such that no batch norm is the identity."""
    generator = torch.Generator().manual_seed(seed)
    for module in net.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            for name, low in (("weight", 0.5), ("bias", -0.2), ("running_mean", -0.2)):
                tensor = getattr(module, name).data
                tensor.copy_(low + torch.rand(tensor.shape, generator=generator))
            module.running_var.copy_(0.5 + torch.rand(len(module.running_var), generator=generator))
    return net.eval()


# ---- a detector: C2f, split, concat, SPPF, an upsampled neck, heads on two scales ----------------


class Bottleneck(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.cv1, self.cv2 = conv(c, c), conv(c, c)

    def forward(self, x):
        return x + self.cv2(self.cv1(x))


class C2f(nn.Module):
    """Halves of a convolution, one through bottlenecks; all that arises is joined."""

    def __init__(self, c_in, c_out, n=1):
        super().__init__()
        self.cv1, self.cv2 = conv(c_in, c_out, 1), conv((2 + n) * c_out // 2, c_out, 1)
        self.m = nn.ModuleList(Bottleneck(c_out // 2) for _ in range(n))

    def forward(self, x):
        y = list(self.cv1(x).chunk(2, 1))
        y.extend(m(y[-1]) for m in self.m)
        return self.cv2(torch.cat(y, 1))


class SPPF(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.cv1, self.cv2 = conv(c, c // 2, 1), conv(2 * c, c, 1)
        self.pool = nn.MaxPool2d(5, 1, 2)

    def forward(self, x):
        x = self.cv1(x)
        y = [x, self.pool(x)]
        y += [self.pool(y[-1])]
        y += [self.pool(y[-1])]
        return self.cv2(torch.cat(y, 1))


class Detector(nn.Module):
    """Boxes and classes at two scales, and the whole image's class."""

    def __init__(self, c=16, classes=5):
        super().__init__()
        self.stem, self.down1 = conv(3, c, 3, 2), conv(c, 2 * c, 3, 2)
        self.c2f1, self.down2 = C2f(2 * c, 2 * c), conv(2 * c, 4 * c, 3, 2)
        self.c2f2, self.sppf = C2f(4 * c, 4 * c, 2), SPPF(4 * c)
        self.neck = C2f(6 * c, 2 * c)
        self.box = nn.ModuleList(
            nn.Sequential(conv(w, c), nn.Conv2d(c, 4, 1)) for w in (2 * c, 4 * c)
        )
        self.cls = nn.ModuleList(
            nn.Sequential(conv(w, c), nn.Conv2d(c, classes, 1)) for w in (2 * c, 4 * c)
        )
        self.scene = nn.Linear(4 * c, 3)

    def forward(self, x):
        fine = self.c2f1(self.down1(self.stem(x)))
        coarse = self.sppf(self.c2f2(self.down2(fine)))
        up = F.interpolate(coarse, scale_factor=2.0)
        maps = (self.neck(torch.cat([up, fine], 1)), coarse)
        box, cls = (
            [head(y) for head, y in zip(hs, maps, strict=True)] for hs in (self.box, self.cls)
        )
        return {"box": box, "cls": cls, "scene": self.scene(coarse.mean((2, 3)))}


# ---- a vision transformer with several heads -----------------------------------------------------


class Attention(nn.Module):
    def __init__(self, width, heads):
        super().__init__()
        self.heads, self.scale = heads, (width // heads) ** -0.5
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x):
        b, n, _ = x.shape
        q, k, v = self.qkv(x).reshape(b, n, 3, self.heads, -1).permute(2, 0, 3, 1, 4).unbind(0)
        shares = (q @ k.transpose(-2, -1) * self.scale).softmax(-1)
        return self.proj((shares @ v).transpose(1, 2).reshape(b, n, -1))


class Layer(nn.Module):
    def __init__(self, width, heads):
        super().__init__()
        self.norm1, self.attention = nn.LayerNorm(width), Attention(width, heads)
        self.norm2 = nn.LayerNorm(width)
        self.fc1, self.fc2 = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x):
        x = x + self.attention(self.norm1(x))
        return x + self.fc2(F.gelu(self.fc1(self.norm2(x))))


class Vit(nn.Module):
    """A class token, positions, and heads for the image and for each patch."""

    def __init__(self, width=32, heads=4, depth=2, size=16):
        super().__init__()
        self.patches = nn.Conv2d(3, width, 4, 4)
        self.token = nn.Parameter(torch.randn(1, 1, width) * 0.1)
        self.positions = nn.Parameter(torch.randn(1, (size // 4) ** 2 + 1, width) * 0.1)
        self.layers = nn.Sequential(*(Layer(width, heads) for _ in range(depth)))
        self.norm = nn.LayerNorm(width)
        self.image, self.patch = nn.Linear(width, 5), nn.Linear(width, 2)

    def forward(self, x):
        x = self.patches(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.token.expand(len(x), -1, -1), x], 1) + self.positions
        x = self.norm(self.layers(x))
        return self.image(x[:, 0]), self.patch(x[:, 1:])


# ---- ResNet-18, for the published counts ---------------------------------------------------------


class Basic(nn.Module):
    def __init__(self, c_in, c_out, stride):
        super().__init__()
        self.conv1 = nn.Conv2d(c_in, c_out, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(c_out)
        self.conv2 = nn.Conv2d(c_out, c_out, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(c_out)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = None
        if stride > 1:
            self.downsample = nn.Sequential(
                nn.Conv2d(c_in, c_out, 1, stride, bias=False), nn.BatchNorm2d(c_out)
            )

    def forward(self, x):
        y = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
        return self.relu(y + (x if self.downsample is None else self.downsample(x)))


class ResNet18(nn.Module):
    def __init__(self, classes=1000):
        super().__init__()
        self.conv1 = nn.Conv2d(3, 64, 7, 2, 3, bias=False)
        self.bn1, self.relu = nn.BatchNorm2d(64), nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(3, 2, 1)
        widths = [(64, 64, 1), (64, 128, 2), (128, 256, 2), (256, 512, 2)]
        self.layers = nn.Sequential(
            *(nn.Sequential(Basic(a, b, s), Basic(b, b, 1)) for a, b, s in widths)
        )
        self.avgpool, self.fc = nn.AdaptiveAvgPool2d(1), nn.Linear(512, classes)

    def forward(self, x):
        x = self.layers(self.maxpool(self.relu(self.bn1(self.conv1(x)))))
        return self.fc(self.avgpool(x).flatten(1))


# ---- random networks, from a list of blocks ------------------------------------------------------

BLOCKS = ("plain", "residual", "concat", "split", "grouped", "depthwise", "gated", "attention")


class Block(nn.Module):
    """One block at a constant number of channels, by name."""

    def __init__(self, kind, c):
        super().__init__()
        self.kind = kind
        if kind == "concat":
            self.a, self.b, self.join = conv(c, c), conv(c, 2 * c, 1), conv(3 * c, c, 1)
        elif kind == "split":
            self.a, self.b, self.join = conv(c, 2 * c), conv(c, c), conv(2 * c, c, 1)
        elif kind == "grouped":
            self.a, self.b = conv(c, 2 * c, 1), conv(2 * c, c, 3, groups=4)
        elif kind == "depthwise":
            self.a, self.b, self.join = (
                conv(c, 2 * c, 1),
                conv(2 * c, 2 * c, groups=2 * c),
                conv(2 * c, c, 1),
            )
        elif kind == "gated":
            self.a, self.b = (
                conv(c, c),
                nn.Sequential(nn.Conv2d(c, 8, 1), nn.ReLU(), nn.Conv2d(8, c, 1)),
            )
        elif kind == "attention":
            self.a = Attention(c, 2)
        else:
            self.a, self.b = conv(c, 2 * c), conv(2 * c, c)

    def forward(self, x):
        if self.kind == "concat":
            return self.join(torch.cat([self.a(x), self.b(x)], 1))
        if self.kind == "split":
            first, second = self.a(x).chunk(2, 1)
            return self.join(torch.cat([first, self.b(second)], 1))
        if self.kind == "depthwise":
            return x + self.join(self.b(self.a(x)))
        if self.kind == "gated":
            x = self.a(x)
            return x * torch.sigmoid(self.b(x.mean((2, 3), keepdim=True)))
        if self.kind == "attention":
            tokens = self.a(x.flatten(2).transpose(1, 2))
            return x + tokens.transpose(1, 2).reshape(x.shape)
        y = self.b(self.a(x))
        return x + y if self.kind == "residual" else y


class Chain(nn.Module):
    """A stem, blocks, and two heads: one number per class, one map."""

    def __init__(self, kinds, c=16):
        super().__init__()
        self.stem = conv(3, c)
        self.blocks = nn.Sequential(*(Block(kind, c) for kind in kinds))
        self.label, self.map = nn.Linear(c, 4), nn.Conv2d(c, 2, 1)

    def forward(self, x):
        x = self.blocks(self.stem(x))
        return {"label": self.label(x.mean((2, 3))), "map": self.map(x)}


def chain(*kinds, c=16, seed=0):
    torch.manual_seed(seed)
    return settled(Chain(kinds, c))
