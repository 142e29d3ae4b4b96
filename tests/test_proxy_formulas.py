"""Every proxy against its definition: closed forms, conservation laws, finite differences."""

from __future__ import annotations

import math

import nets
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.func import functional_call

from nas import proxies
from nas.passes import Batch, gradient, measure, opened
from nas.predictors import _az_nas, az_trainability, meco, near, swap, synflow
from nas.record import Recorder


def score(name, net, batch):
    return measure(net, batch, {name: proxies.load(name)})[name].value


def reason(name, net, batch):
    return measure(net, batch, {name: proxies.load(name)})[name].reason


def plain_conv():
    """Feed-forward, without biases or norms."""
    layers = [nn.Conv2d(3, 6, 3, bias=False), nn.ReLU(), nn.Conv2d(6, 5, 3, bias=False), nn.ReLU()]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(80, 4, bias=False))


def losses_gradient(net, batch, weights):
    loss = F.cross_entropy(functional_call(net, weights, (batch.inputs,)), batch.labels)
    return torch.autograd.grad(loss, list(weights.values()))


def linear_of(batch, classes=4, bias=True):
    torch.manual_seed(1)
    return nn.Sequential(nn.Flatten(), nn.Linear(batch.inputs[0].numel(), classes, bias=bias))


# ---- gradients -----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", nets.KINDS)
def test_snip_is_the_gradient_of_a_mask_of_ones(kind):
    net, batch = nets.make(kind).train(), nets.batch()
    for module in net.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        if isinstance(module, nn.MultiheadAttention):
            module.dropout = 0.0
    matrices = {name: p for name, p in net.named_parameters() if p.dim() > 1}
    masks = {name: torch.ones_like(p, requires_grad=True) for name, p in matrices.items()}
    masked = {name: p.detach() * masks[name] for name, p in matrices.items()}
    loss = F.cross_entropy(functional_call(net, masked, (batch.inputs,)), batch.labels)
    found = torch.autograd.grad(loss, list(masks.values()))
    snip, plain = score("snip", net, batch), score("plain", net, batch)
    assert snip == pytest.approx(sum(g.abs().sum().item() for g in found), rel=1e-3)
    assert plain == pytest.approx(sum(g.sum().item() for g in found), abs=1e-3 * snip)
    assert abs(plain) <= snip


def test_grad_norm_is_a_sum_of_norms():
    net, batch = plain_conv(), nets.batch()
    weights = {name: p.detach().requires_grad_() for name, p in net.named_parameters()}
    expected = sum(g.norm().item() for g in losses_gradient(net, batch, weights))
    assert score("grad_norm", net, batch) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("n", [1, 5])
def test_fisher_of_a_linear_layer_in_closed_form(n):
    batch = nets.batch(n, size=2)
    net = linear_of(batch)
    a = net(batch.inputs).detach()
    slope = (a.softmax(1) - F.one_hot(batch.labels, 4)) / n
    expected = 12 * (0.5 * (a * slope) ** 2).mean(0).sum().item()
    assert score("fisher", net, batch) == pytest.approx(expected, rel=1e-5)


def test_fisher_of_a_convolution_sums_over_places_first():
    batch = nets.batch(4)
    torch.manual_seed(2)
    net = nn.Sequential(nn.Conv2d(3, 4, 3, groups=1), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    a = net[0](batch.inputs).detach()
    slope = (a.mean((2, 3)).softmax(1) - F.one_hot(batch.labels, 4)) / 4
    per_sample = a.mean((2, 3)) * slope  # the mean of a times the same slope everywhere
    expected = 27 * (0.5 * per_sample**2).mean(0).sum().item()
    assert score("fisher", net, batch) == pytest.approx(expected, rel=1e-4)


def test_fisher_sees_the_projections_inside_attention():
    net = nets.Transformer().eval()
    with Recorder() as record:
        net(nets.batch().inputs)
    # patches, per block four of attention and two of the feed-forward, the head
    assert len(record.layers) == 1 + 2 * 6 + 1
    assert all(len(layer.output) == 16 for layer in record.layers)


def test_grasp_against_finite_differences_of_the_gradient():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Flatten(), nn.Linear(12, 5), nn.Tanh(), nn.Linear(5, 4)).double()
    inputs = nets.batch(8, size=2).inputs.double()
    batch = Batch(inputs, torch.arange(8) % 4)
    weights = {n: p.detach().requires_grad_() for n, p in net.named_parameters() if p.dim() > 1}
    g = losses_gradient(net, batch, weights)
    step, ends = 1e-5, []
    for sign in (1, -1):
        moved = {
            name: (w + sign * step * slope).detach().requires_grad_()
            for (name, w), slope in zip(weights.items(), g, strict=True)
        }
        ends.append(losses_gradient(net, batch, moved))
    expected = -sum(
        (w * (a - b)).sum().item() / (2 * step)
        for w, a, b in zip(weights.values(), *ends, strict=True)
    )
    assert score("grasp", net, batch) == pytest.approx(expected, rel=1e-5)


def test_zico_by_hand():
    batch = nets.batch(6, size=2)
    net = linear_of(batch, bias=False)
    halves = [
        losses_gradient(
            net,
            Batch(batch.inputs[part], batch.labels[part]),
            {"1.weight": net[1].weight.detach().requires_grad_()},
        )[0]
        for part in (slice(0, 3), slice(3, 6))
    ]
    a, b = (half.numpy().astype(float) for half in halves)
    expected = math.log((((abs(a) + abs(b)) / 2) / (abs(a - b) / 2)).sum())
    assert score("zico", net, batch) == pytest.approx(expected, rel=1e-4)


def test_ntk_of_a_linear_network_is_the_condition_of_its_inputs():
    batch = nets.batch(6, size=2)
    net = linear_of(batch, bias=False)
    x = batch.inputs.flatten(1).double()
    spectrum = torch.linalg.eigvalsh(x @ x.T)
    expected = -math.log(spectrum[-1] / spectrum[0])
    assert score("ntk", net, batch) == pytest.approx(expected, rel=1e-4)


# ---- synflow -------------------------------------------------------------------------------------


def test_synflow_is_conserved_from_layer_to_layer():
    net = plain_conv().double()
    weights = [p.detach().abs().requires_grad_() for p in net.parameters()]
    names = [name for name, _ in net.named_parameters()]
    x = torch.ones(1, 3, 8, 8, dtype=torch.float64)
    flow = functional_call(net, dict(zip(names, weights, strict=True)), (x,)).sum()
    per_layer = [(w * g).sum().item() for w, g in zip(weights, gradient(flow, weights))]  # noqa: B905
    assert per_layer == pytest.approx([flow.item()] * 3, rel=1e-9)
    expected = math.log(3 * flow.item())
    assert score("synflow", net.float(), nets.batch()) == pytest.approx(expected, rel=1e-6)


@settings(max_examples=10, deadline=None)
@given(layer=st.sampled_from([0, 2, 5]), factor=st.floats(-8, 8).filter(lambda c: abs(c) > 0.1))
def test_synflow_follows_a_factor_and_ignores_signs(layer, factor):
    net = nets.make("conv") if layer < 0 else plain_conv()
    before = score("synflow", net, nets.batch())
    with torch.no_grad():
        net[layer].weight.mul_(factor)
    after = score("synflow", net, nets.batch())
    assert after == pytest.approx(before + math.log(abs(factor)), abs=1e-5)


def test_synflow_ignores_norms_and_survives_what_float32_does_not():
    net = plain_conv()
    normed = nn.Sequential(net[0], nn.BatchNorm2d(6), *net[1:])
    assert score("synflow", normed, nets.batch()) == score("synflow", net, nets.batch())
    wide = nn.Sequential(*(nn.Conv2d(64, 64, 1, bias=False) for _ in range(40)), *nets.head(64))
    for layer in wide[:40]:
        nn.init.ones_(layer.weight)
    found = score("synflow", wide, nets.batch(2, channels=64, size=2))
    assert found > math.log(torch.finfo(torch.float32).max)


# ---- the input's gradient ------------------------------------------------------------------------


class Prescribed(nn.Module):
    """Whose summed logits have the given gradients [B, D] to the input."""

    def __init__(self, rows):
        super().__init__()
        self.register_buffer("rows", rows)

    def forward(self, x):
        first = (x.flatten(1) * self.rows).sum(1)
        return torch.stack([first, torch.zeros_like(first)], 1)


def hadamard(n):
    found = torch.ones(1, 1)
    while len(found) < n:
        found = torch.cat([torch.cat([found, found], 1), torch.cat([found, -found], 1)])
    return found


@pytest.mark.parametrize("b", [2, 16, 31])
def test_jacob_cov_of_uncorrelated_samples_is_about_minus_the_batch(b):
    rows = hadamard(32)[1 : b + 1]  # without the constant one
    batch = Batch(torch.randn(b, 32), torch.zeros(b, dtype=torch.long))
    expected = -b * (math.log(1 + 1e-5) + 1 / (1 + 1e-5))
    assert score("jacob_cov", Prescribed(rows), batch) == pytest.approx(expected, rel=1e-6)


def test_jacob_cov_falls_when_samples_are_alike():
    generator = torch.Generator().manual_seed(0)
    rows, common = (torch.randn(n, 64, generator=generator) for n in (8, 1))
    batch = Batch(torch.randn(8, 64), torch.zeros(8, dtype=torch.long))
    found = [score("jacob_cov", Prescribed(rows + w * common), batch) for w in (0, 1, 3, 9)]
    assert found == sorted(found, reverse=True)
    assert "constant" in reason("jacob_cov", Prescribed(torch.ones(8, 64)), batch)


def test_epe_nas_by_hand():
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(5, 16, generator=generator)
    batch = Batch(torch.randn(5, 16), torch.tensor([0, 0, 0, 1, 1]))
    blocks = np.corrcoef(rows[:3]), np.corrcoef(rows[3:])
    expected = sum(abs(np.log(np.abs(block) + 1e-5).sum()) for block in blocks)
    assert score("epe_nas", Prescribed(rows), batch) == pytest.approx(expected, rel=1e-6)


# ---- codes ---------------------------------------------------------------------------------------


def relu_of(units, seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Flatten(), nn.Linear(12, units), nn.ReLU(), nn.Linear(units, 4))


def test_naswot_by_hand_and_with_a_sample_twice():
    net, batch = relu_of(40), nets.batch(6, size=2)
    code = (net[1](net[0](batch.inputs)) > 0).numpy()
    k = np.array([[(a == b).sum() for b in code] for a in code], float)
    assert (k.diagonal() == 40).all() and (k == k.T).all()
    expected = np.linalg.slogdet(k)[1]
    assert score("naswot", net, batch) == pytest.approx(expected, rel=1e-9)
    twice = torch.cat([batch.inputs, batch.inputs[:1]])
    again = Batch(twice, torch.arange(7) % 4)
    assert "same code" in reason("naswot", net, again)


@settings(max_examples=20, deadline=None)
@given(b=st.integers(1, 70), seed=st.integers(0, 99))
def test_swap_counts_distinct_patterns(b, seed):
    code = np.random.default_rng(seed).random((b, 50)) < 0.15
    patterns = torch.unique(swap._pattern(torch.from_numpy(code)))
    assert len(patterns) == len({tuple(column) for column in code.T})


def test_swap_counts_over_all_layers():
    net, batch = relu_of(300), nets.batch(5, size=2)
    code = (net[1](net[0](batch.inputs)) > 0).numpy()
    assert score("swap", net, batch) == len({tuple(column) for column in code.T}) > 20


@pytest.mark.parametrize(
    "form",
    [
        nn.ReLU(),
        nn.ReLU(inplace=True),
        F.relu,
        torch.relu,
        torch.Tensor.relu,
        torch.relu_,
        nn.ReLU6(),
    ],
)
def test_a_relu_is_seen_however_it_is_written(form):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = relu_of(40)

        def forward(self, x):
            return self.body[3](form(self.body[1](self.body[0](x))))

    batch = nets.batch(6, size=2)
    torch.manual_seed(0)
    for name in ("naswot", "swap"):
        assert score(name, Net(), batch) == score(name, relu_of(40), batch)


# ---- features ------------------------------------------------------------------------------------


def test_zen_does_not_change_with_an_identity_norm():
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU()]
    layers += [nn.Conv2d(16, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU()]
    batch = nets.batch(32)
    before = score("zen", nn.Sequential(*layers, *nets.head(16)), batch)
    more = [*layers[:2], nn.BatchNorm2d(16), *layers[2:]]
    assert score("zen", nn.Sequential(*more, *nets.head(16)), batch) == pytest.approx(
        before, abs=0.01
    )
    deeper = [*layers, *layers[3:]]
    assert score("zen", nn.Sequential(*deeper, *nets.head(16)), batch) > before + 1


def test_meco_of_channels_that_repeat_and_that_do_not():
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(4, 100, generator=generator, dtype=torch.float64)
    assert meco._least(torch.cat([rows, rows[:1]])) == pytest.approx(0, abs=1e-9)
    assert meco._least(torch.linalg.qr((rows - rows.mean(1, keepdim=True)).T)[0].T) == (
        pytest.approx(1)
    )
    expected = np.linalg.eigvalsh(np.corrcoef(rows)).min()
    assert meco._least(rows) == pytest.approx(expected)
    assert meco._least(torch.cat([rows, torch.ones(1, 100)])) == 0


def test_effective_rank():
    assert near.effective_rank(torch.eye(7)) == pytest.approx(7)
    assert near.effective_rank(torch.ones(5, 3)) == pytest.approx(1)
    assert near.effective_rank(torch.zeros(5, 3)) == 0
    values = torch.tensor([3.0, 1.0]) / 4
    expected = math.exp(-(values * values.log()).sum())
    assert near.effective_rank(torch.diag(torch.tensor([3.0, 1.0]))) == pytest.approx(expected)


def test_expressivity_is_largest_for_features_of_equal_variance():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(20_000, 8, generator=generator, dtype=torch.float64)
    assert _az_nas._entropy(x) == pytest.approx(math.log(8), abs=1e-3)
    assert _az_nas._entropy(x[:, :1].expand(-1, 8)) == pytest.approx(0, abs=1e-6)


def test_trainability_is_zero_for_an_isometry_and_below_for_anything_else():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(100_000, 6, generator=generator).requires_grad_()
    q = torch.linalg.qr(torch.randn(6, 6, generator=generator))[0]
    found = [
        az_trainability._isometry(_az_nas.Block(x, x @ (c * q)), generator) for c in (1, 3, 1 / 3)
    ]
    assert found[0] == pytest.approx(0, abs=0.01)
    assert found[1:] == pytest.approx([2 - 3 - 1 / 3] * 2, abs=0.1)


def test_blocks_are_the_elements_of_lists():
    net, batch = nets.make("residual"), nets.batch()
    with opened(net, batch) as seen:
        assert len(seen.read(_az_nas.blocks)) == 3
    with opened(nets.make("transformer"), batch) as seen:
        assert len(seen.read(_az_nas.blocks)) == 2
    with opened(nets.make("conv"), batch) as seen:
        assert len(seen.read(_az_nas.blocks)) == 3  # its layers: two convolutions and the head


# ---- counts and records --------------------------------------------------------------------------


def test_multiply_adds_by_hand():
    batch = nets.batch()
    assert score("macs", nets.make("conv"), batch) == 64 * 8 * 27 + 16 * 8 * 72 + 32
    depthwise = 64 * (8 * 3 + 8 * 9 + 12 * 2 * 9) + 48
    assert score("macs", nets.make("depthwise"), batch) == depthwise
    tokens, c, wide = 16, 16, 32
    block = tokens * (4 * c * c + 2 * c * wide) + 2 * tokens * tokens * c
    transformer = tokens * c * 12 + 2 * block + 4 * c
    assert score("macs", nets.make("transformer"), batch) == transformer


def test_norms_are_taken_out_of_synflow_only():
    x = torch.randn(2, 4, 3, 3)
    with synflow.WithoutNorms():
        assert nn.BatchNorm2d(4)(x) is x and nn.GroupNorm(2, 4)(x) is x
    assert nn.BatchNorm2d(4)(x) is not x
