"""Stateless elastic layers: the size to use is an argument, the input width is read off `x`.

A layer asked for its full size *is* the plain torch layer, so a network built at one architecture
is ordinary torch code. `extract` is the whole of sub-network extraction: the small network's
tensor shapes say which leading slice (centre crop for kernels) of each same-named tensor to copy.

Sources: prefix slicing as in slimmable networks (arXiv 1812.08928) and BigNAS (arXiv 2003.11142);
centre-cropped kernels as in Once-for-All (arXiv 1908.09791, section 3.3), its learned transforms
where `nas.once_for_all` has added them.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

ACTIVATIONS = {"relu": F.relu, "hswish": F.hardswish, "silu": F.silu, "": lambda x: x}


def round_to(value: float, tile: int = 8) -> int:
    """The multiple of `tile` nearest to `value`, at least one tile and never 10 % below `value`."""
    rounded = max(tile, int(value + tile / 2) // tile * tile)
    return rounded + tile if rounded < 0.9 * value else rounded


class Network(nn.Module):
    """A space's network: built at `arch`, `net(x, smaller)` runs any arch that fits inside it.

    `net(x, arch, noise)` regularises this one pass; only recipes that ask for it pass a Noise.
    """

    arch: Any


@dataclass(frozen=True)
class Noise:
    """Dropout and drop-connect of one forward pass: an argument, as the architecture is, so that no
    other pass can inherit it. Both keep the expectation."""

    dropout: float  # share of the classifier's input features
    drop_connect: float  # share of images that skip the last block; less before, linearly
    generator: torch.Generator

    def features(self, x: Tensor) -> Tensor:
        return self._kept(x, self.dropout, x.shape)

    def branch(self, y: Tensor, depth: float) -> Tensor:
        """A block's residual branch [N, ...]; `depth` is its place, up to 1 for the last."""
        shape = torch.Size((len(y), *(1 for _ in y.shape[1:])))
        return self._kept(y, self.drop_connect * depth, shape)

    def _kept(self, x: Tensor, rate: float, shape: torch.Size) -> Tensor:
        if rate == 0:
            return x
        # drawn where the generator is, so that a seed means the same on every device
        drawn = torch.rand(shape, generator=self.generator, device=self.generator.device)
        return x * ((drawn >= rate) / (1 - rate)).to(x)


class Middle(NamedTuple):
    """Channels that only live inside a block: their order is free, if all these tensors follow."""

    tensors: tuple[tuple[Tensor, int], ...]  # each with its dimension that runs over the channels
    reader: Tensor  # [out, channels, ...]: whoever reads them says how much each counts


class Residual(nn.Module, ABC):
    """A block that can say which of its channels may be reordered (`nas.once_for_all`)."""

    @abstractmethod
    def middles(self) -> list[Middle]: ...


N = TypeVar("N", bound=nn.Module)


def channels_last(net: N) -> N:
    """Weights in the layout that convolutions on CPUs are up to 4x faster in (depthwise)."""
    return net.to(memory_format=torch.channels_last)  # type: ignore[call-overload]


class Conv2d(nn.Conv2d):
    """A convolution of `out` filters over however many channels `x` has; pads by kernel // 2."""

    def __init__(self, c_in: int, c_out: int, kernel: int = 1, stride: int = 1) -> None:
        super().__init__(c_in, c_out, kernel, stride, kernel // 2, bias=False)

    def forward(self, x: Tensor, out: int | None = None) -> Tensor:
        out = out or self.out_channels
        if (out, x.shape[1]) == (self.out_channels, self.in_channels):
            return super().forward(x)
        weight = self.weight[:out, : x.shape[1]]
        return F.conv2d(x, weight, None, self.stride, self.padding)


class DepthwiseConv2d(nn.Conv2d):
    """One filter per channel; a smaller kernel is the centre of the next larger one, put through
    `transforms[kernel]` [k*k, k*k] if there is such a matrix (shared by the channels)."""

    def __init__(self, channels: int, kernel: int, stride: int = 1) -> None:
        super().__init__(
            channels, channels, kernel, stride, kernel // 2, groups=channels, bias=False
        )
        self.transforms = nn.ParameterDict()

    def forward(self, x: Tensor, kernel: int | None = None) -> Tensor:
        channels, kernel = x.shape[1], kernel or self.kernel_size[0]
        if (channels, kernel) == (self.in_channels, self.kernel_size[0]):
            return super().forward(x)
        weight = self.filters(channels, kernel)
        return F.conv2d(x, weight, None, self.stride, kernel // 2, groups=channels)

    def filters(self, channels: int, kernel: int) -> Tensor:
        """The weight [channels, 1, kernel, kernel] that a smaller layer uses."""
        weight = self.weight[:channels]
        for size in self._sizes(kernel):
            weight = leading(weight, torch.Size((channels, 1, size, size)))
            if str(size) in self.transforms:
                weight = (weight.flatten(1) @ self.transforms[str(size)].t()).view_as(weight)
        return weight

    def _sizes(self, kernel: int) -> Iterable[int]:
        """One after the other where there are transforms, else at once."""
        largest = self.kernel_size[0]
        return range(largest - 2, kernel - 1, -2) if self.transforms else (kernel,)


class BatchNorm2d(nn.BatchNorm2d):
    """Batch norm over the channels that `x` has.

    Running statistics are those of the full width only and mean nothing for a slice: a sliced call
    in training uses the batch's own and updates nothing. `recalibrate` an extracted network before
    quoting its accuracy.
    """

    def forward(self, x: Tensor) -> Tensor:
        c = x.shape[1]
        if c == self.num_features:
            return super().forward(x)
        mean = var = None
        if not self.training:
            assert self.running_mean is not None and self.running_var is not None
            mean, var = self.running_mean[:c], self.running_var[:c]
        weight, bias = self.weight[:c], self.bias[:c]
        return F.batch_norm(x, mean, var, weight, bias, self.training, 0.0, self.eps)

    def per_channel(self) -> tuple[tuple[Tensor, int], ...]:
        """Its tensors for a `Middle`."""
        assert self.running_mean is not None and self.running_var is not None
        tensors = (self.weight, self.bias, self.running_mean, self.running_var)
        return tuple((tensor, 0) for tensor in tensors)


class Linear(nn.Linear):
    """A classifier over however many features `x` has."""

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[1] == self.in_features:
            return super().forward(x)
        return F.linear(x, self.weight[:, : x.shape[1]], self.bias)


class SqueezeExcite(nn.Module):
    """Channel gates from a two-layer bottleneck of a quarter of the channels (MobileNetV3)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.reduce = nn.Conv2d(channels, self.bottleneck(channels), 1)
        self.expand = nn.Conv2d(self.bottleneck(channels), channels, 1)

    @staticmethod
    def bottleneck(channels: int) -> int:
        return round_to(channels / 4)

    def forward(self, x: Tensor) -> Tensor:
        c, mid = x.shape[1], self.bottleneck(x.shape[1])
        assert self.reduce.bias is not None and self.expand.bias is not None
        gate = x.mean((2, 3), keepdim=True)
        gate = F.relu(F.conv2d(gate, self.reduce.weight[:mid, :c], self.reduce.bias[:mid]))
        gate = F.conv2d(gate, self.expand.weight[:c, :mid], self.expand.bias[:c])
        return x * F.hardsigmoid(gate)


def leading(tensor: Tensor, shape: torch.Size) -> Tensor:
    """The leading slice of `tensor`; kernels (dimensions 2 and 3 of four) are cropped centrally."""
    for dim, size in enumerate(shape):
        start = (tensor.shape[dim] - size) // 2 if len(shape) == 4 and dim >= 2 else 0
        tensor = tensor.narrow(dim, start, size)
    return tensor


@torch.no_grad()
def extract(supernet: nn.Module, small: N) -> N:
    """Fill `small` (built at the wanted architecture) with its slice of `supernet`; return it.

    Afterwards `small(x)` equals `supernet(x, arch)` to float rounding, in train and eval mode.
    Kernel transforms are applied once, here: `small` has none.
    """
    source = supernet.state_dict()
    for name, tensor in small.state_dict().items():
        tensor.copy_(leading(source[name], tensor.shape))
    for name, layer in small.named_modules():
        if isinstance(layer, DepthwiseConv2d):
            large = supernet.get_submodule(name)
            assert isinstance(large, DepthwiseConv2d)
            layer.weight.copy_(large.filters(layer.in_channels, layer.kernel_size[0]))
    return small.train(supernet.training)


@torch.no_grad()
def recalibrate(net: N, batches: Iterable[Tensor]) -> N:
    """Replace the batch-norm statistics by those of `batches` (normalised, not augmented).

    The running variance becomes the mean of the per-batch unbiased variances (torch's cumulative
    mode): the drift of the means between batches is not in it, so shuffle the images first.
    """
    norms = [module for module in net.modules() if isinstance(module, nn.BatchNorm2d)]
    net.eval()
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None
        norm.train()
    for batch in batches:
        net(batch)
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
    return net.eval()


def resize(x: Tensor, size: int) -> Tensor:
    """Images [N, C, H, W] at another resolution: bilinear, antialiased; `x` itself if equal."""
    if x.shape[-1] == size:
        return x
    return F.interpolate(x, (size, size), mode="bilinear", antialias=True, align_corners=False)
