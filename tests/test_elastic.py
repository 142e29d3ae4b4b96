from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from nas import elastic
from nas.elastic import BatchNorm2d, Conv2d, DepthwiseConv2d, Linear, SqueezeExcite, leading

SETTINGS = {"rtol": 1e-5, "atol": 1e-6}


@pytest.fixture
def generator():
    return torch.Generator().manual_seed(0)


@given(st.floats(0.01, 5000), st.sampled_from([1, 4, 8, 16, 32]))
def test_round_to_gives_a_near_multiple_of_the_tile(value, tile):
    rounded = elastic.round_to(value, tile)
    assert rounded % tile == 0 and rounded >= tile
    assert rounded >= 0.9 * value
    assert rounded <= max(tile, value + tile)


@given(st.integers(1, 200), st.sampled_from([4, 8, 16]))
def test_round_to_leaves_multiples_alone(times, tile):
    assert elastic.round_to(times * tile, tile) == times * tile


def test_leading_takes_the_first_channels_and_the_centre_of_kernels(generator):
    weight = torch.randn(8, 6, 5, 5, generator=generator)
    assert torch.equal(leading(weight, torch.Size((3, 2, 3, 3))), weight[:3, :2, 1:4, 1:4])
    assert torch.equal(leading(weight, torch.Size((3, 2, 1, 1))), weight[:3, :2, 2:3, 2:3])
    matrix = torch.randn(5, 7, generator=generator)
    assert torch.equal(leading(matrix, torch.Size((5, 2))), matrix[:, :2])
    assert leading(torch.tensor(3), torch.Size(())) == 3


def test_a_narrow_convolution_is_the_leading_block_of_the_wide_one(generator):
    wide, narrow = Conv2d(8, 12, 3, 2), Conv2d(4, 6, 3, 2)
    elastic.extract(wide, narrow)
    x = torch.randn(2, 4, 7, 7, generator=generator)
    torch.testing.assert_close(wide(x, 6), narrow(x), **SETTINGS)
    assert wide(x).shape[1] == 12  # all filters, over the channels that are there


@pytest.mark.parametrize("kernel", [1, 3, 5])
def test_a_small_depthwise_kernel_is_the_centre_of_the_large(kernel, generator):
    wide = DepthwiseConv2d(8, 5, 2)
    x = torch.randn(2, 6, 9, 9, generator=generator)
    narrow = elastic.extract(wide, DepthwiseConv2d(6, kernel, 2))
    torch.testing.assert_close(wide(x, kernel), narrow(x), **SETTINGS)


def test_a_sliced_norm_in_training_uses_the_batch_and_keeps_its_statistics(generator):
    norm = BatchNorm2d(8)
    x = torch.randn(16, 4, 3, 3, generator=generator) * 3 + 2
    y = norm(x)
    torch.testing.assert_close(y.mean((0, 2, 3)), torch.zeros(4), atol=1e-5, rtol=0)
    assert torch.equal(norm.running_mean, torch.zeros(8))
    assert norm.num_batches_tracked == 0
    norm.eval()
    torch.testing.assert_close(norm(x), x / (1 + norm.eps) ** 0.5)


def test_a_classifier_reads_as_many_features_as_there_are(generator):
    head = Linear(8, 3)
    x = torch.randn(2, 5, generator=generator)
    torch.testing.assert_close(head(x), x @ head.weight[:, :5].T + head.bias, **SETTINGS)


@pytest.mark.parametrize("channels", [8, 24, 40, 64])
def test_squeeze_excite_slices_both_layers(channels, generator):
    wide = SqueezeExcite(64)
    narrow = elastic.extract(wide, SqueezeExcite(channels))
    x = torch.randn(2, channels, 4, 4, generator=generator)
    torch.testing.assert_close(wide(x), narrow(x), **SETTINGS)
    gate = narrow.expand(narrow.reduce(x.mean((2, 3), keepdim=True)).relu())
    torch.testing.assert_close(narrow(x), x * nn.functional.hardsigmoid(gate), **SETTINGS)


def test_extract_keeps_the_mode_and_leaves_the_supernet_alone():
    wide, before = BatchNorm2d(8).eval(), BatchNorm2d(8).state_dict()
    assert not elastic.extract(wide, BatchNorm2d(4)).training
    assert all(torch.equal(tensor, before[name]) for name, tensor in wide.state_dict().items())


class Chain(nn.Module):
    """Two convolutions with norms: statistics of the second depend on the first's."""

    def __init__(self):
        super().__init__()
        self.conv1, self.norm1 = Conv2d(2, 6, 3), BatchNorm2d(6)
        self.conv2, self.norm2 = Conv2d(6, 4, 3, 2), BatchNorm2d(4)

    def forward(self, x):
        return self.norm2(self.conv2(self.norm1(self.conv1(x)).relu()))


def test_recalibrated_on_one_batch_eval_equals_training_up_to_the_unbiased_factor(generator):
    net, x = Chain(), torch.randn(8, 2, 6, 6, generator=generator)
    in_training = net.train()(x).detach()
    elastic.recalibrate(net, [x])
    for norm, count in ((net.norm1, 8 * 36), (net.norm2, 8 * 9)):
        norm.running_var.mul_((count - 1) / count)
    torch.testing.assert_close(net(x), in_training, rtol=1e-4, atol=1e-5)


def test_recalibration_averages_over_batches_and_forgets_what_was_there(generator):
    norm = BatchNorm2d(2)
    norm.running_mean.fill_(100.0)
    batches = torch.randn(3, 5, 2, 4, 4, generator=generator)
    elastic.recalibrate(nn.Sequential(norm), batches)
    torch.testing.assert_close(norm.running_mean, batches.mean((1, 3, 4)).mean(0))
    torch.testing.assert_close(norm.running_var, batches.var((1, 3, 4)).mean(0))


def test_recalibration_restores_momentum_and_leaves_eval_mode(generator):
    net = Chain().train()
    net.norm2.momentum = 0.3
    elastic.recalibrate(net, [torch.randn(4, 2, 6, 6, generator=generator)])
    assert (net.norm1.momentum, net.norm2.momentum) == (0.1, 0.3)
    assert not any(module.training for module in net.modules())


def test_resize_to_the_same_size_is_the_same_tensor(generator):
    x = torch.randn(2, 3, 8, 8, generator=generator)
    assert elastic.resize(x, 8) is x
    assert elastic.resize(x, 5).shape == (2, 3, 5, 5)
    flat = torch.full((1, 1, 8, 8), 7.0)
    np.testing.assert_allclose(elastic.resize(flat, 6).numpy(), 7.0, rtol=1e-6)
