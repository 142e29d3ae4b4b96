from __future__ import annotations

import copy

import onnxruntime
import pytest
import torch
import torch.nn.functional as F
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from torch import nn

from compress import units
from compress.graph import Graph, forward
from compress.history import History, Step
from nas.errors import NasctlError
from nas.outputs import tensors
from tests.graphs import BLOCKS, Detector, Vit, chain, conv, settled

IMAGES = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def with_zeros(net, step):
    """The network with the outputs of one layer (and of its norm) at zero, written for plain
    convolution, norm, activation blocks whose activation maps 0 to 0."""
    net = copy.deepcopy(net)
    root = net.get_submodule(step.root)
    block = net.get_submodule(step.root.rpartition(".")[0])
    root.weight.data[list(step.indices)] = 0
    block[1].weight.data[list(step.indices)] = 0
    block[1].bias.data[list(step.indices)] = 0
    return net


def pruned_by_half(net, inputs):
    """Every unit without every other place; the steps that did it."""
    history = History()
    for unit in units.find(net, inputs).units:
        places = range(0, unit.places, 2)
        history = history.then(Step(unit.root, units.places(unit, places)))
    return history.replay(net, inputs), history


@pytest.mark.parametrize("root", ["stem.0", "blocks.0.a.0", "blocks.1.a.0"])
def test_pruned_equals_zeroed_on_norm_and_convolution(root):
    net = chain("plain", "residual")
    step = Step(root, (0, 3, 5))
    pruned = History((step,)).replay(net, IMAGES)
    assert pruned.get_submodule(root).out_channels == net.get_submodule(root).out_channels - 3
    for found, masked in zip(
        tensors(pruned(IMAGES)), tensors(with_zeros(net, step)(IMAGES)), strict=True
    ):
        torch.testing.assert_close(found, masked, atol=1e-5, rtol=0)


def test_pruned_differs_from_zeroed_where_a_layer_norm_takes_statistics():
    torch.manual_seed(0)
    net = Vit().eval()
    images = torch.randn(2, 3, 16, 16)
    (root,) = [u.root for u in units.find(net, images).units if "norm" in u.members]
    graph = Graph(copy.deepcopy(net), images)
    with units.masked(graph.net, graph.members(root, (0, 5))):
        zeroed = graph.net(images)[0]
    graph.prune_(root, (0, 5))
    assert (graph.net(images)[0] - zeroed).abs().max() > 1e-3


def test_a_detector_with_splits_joins_and_heads_is_pruned_everywhere_but_at_its_outputs():
    net = settled(Detector(c=8))
    images = torch.randn(1, 3, 32, 32)
    found = units.find(net, images)
    assert {left.root for left in found.left_alone} == {
        "box.0.1",
        "box.1.1",
        "cls.0.1",
        "cls.1.1",
        "scene",
    }
    assert all("outputs of the network" in left.reason for left in found.left_alone)
    split = next(unit for unit in found.units if unit.root == "c2f1.cv1.0")
    assert split.parts == 2 and "c2f1.m.0.cv2.0" in split.members


def test_heads_of_attention_lose_the_same_places():
    net = Vit().eval()
    images = torch.randn(1, 3, 16, 16)
    found = {unit.root: unit for unit in units.find(net, images).units}
    assert found["layers.0.attention.qkv"].parts == 12  # queries, keys and values of four heads
    pruned, _ = pruned_by_half(net, images)
    attention = pruned.layers[0].attention
    assert attention.qkv.out_features == 48 and attention.proj.in_features == 16
    assert pruned.positions.shape == (1, 17, 16) and pruned.patches.out_channels == 16


@settings(max_examples=3, deadline=None, derandomize=True, phases=[Phase.generate])
@given(st.lists(st.sampled_from(BLOCKS), min_size=1, max_size=3), st.integers(0, 9))
def test_random_networks_run_and_equal_their_masked_original(kinds, seed):
    net = chain(*kinds, seed=seed)
    found = units.find(net, IMAGES)
    assert {left.root for left in found.left_alone} <= {"label", "map"}
    for unit in found.units:
        gone = units.places(unit, [1])
        graph = Graph(copy.deepcopy(net), IMAGES)
        with units.masked(graph.net, graph.members(unit.root, gone)):
            masked = tensors(graph.net(IMAGES))
        graph.prune_(unit.root, gone)
        for ours, theirs in zip(tensors(graph.net(IMAGES)), masked, strict=True):
            torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-4)
    pruned, history = pruned_by_half(net, IMAGES)
    assert [t.shape for t in tensors(pruned(IMAGES))] == [t.shape for t in tensors(net(IMAGES))]
    assert len(history.steps) == len(found.units)


def test_a_history_rebuilds_the_same_network_bit_by_bit():
    net = chain("split", "attention")
    pruned, history = pruned_by_half(net, IMAGES)
    again = History.from_json(history.to_json()).replay(chain("split", "attention"), IMAGES)
    assert again.state_dict().keys() == pruned.state_dict().keys()
    for name, tensor in again.state_dict().items():
        assert torch.equal(tensor, pruned.state_dict()[name]), name


@pytest.mark.parametrize("text", ["", "[1]", '[["a", [-1]]]', '[["a", ["b"]]]', "{}3"])
def test_what_is_no_history_is_said(text):
    with pytest.raises(NasctlError, match="not a history"):
        History.from_json(text)


def test_the_unpruned_network_is_left_as_it_was():
    net = chain("residual")
    net.stem[0].weight.requires_grad_(False)
    before = copy.deepcopy(net.state_dict())
    pruned, _ = pruned_by_half(net.train(), IMAGES)
    assert net.training and net.stem[0].out_channels == 16
    assert all(torch.equal(before[name], t) for name, t in net.state_dict().items())
    assert not pruned.stem[0].weight.requires_grad and pruned.blocks[0].a[0].weight.requires_grad


class SharedHead(nn.Module):
    """One head on two scales, as detectors have it."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.tower, self.head = (
            conv(3, 16),
            conv(16, 16, 3, 2),
            conv(16, 8),
            conv(8, 2),
        )

    def forward(self, x):
        fine = self.a(x)
        return [self.head(self.tower(y)) for y in (fine, self.b(fine))]


class Dense(nn.Module):
    """Every layer reads what all earlier ones gave."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(conv(3 + 8 * n, 8) for n in range(3))
        self.head = nn.Linear(27, 2)

    def forward(self, x):
        for layer in self.layers:
            x = torch.cat([x, layer(x)], 1)
        return self.head(x.mean((2, 3)))


@pytest.mark.parametrize(
    ("net", "roots"),
    [
        (SharedHead(), {"a.0", "tower.0"}),
        (Dense(), {"layers.0.0", "layers.1.0", "layers.2.0"}),
        (nn.Sequential(conv(3, 16), nn.ConvTranspose2d(16, 8, 2, 2), conv(8, 2)), {"0.0", "1"}),
        (nn.Sequential(nn.Conv2d(3, 16, 3), nn.GroupNorm(4, 16), nn.Conv2d(16, 2, 1)), {"0"}),
        (nn.Sequential(conv(3, 8), nn.MaxPool2d(4), nn.Flatten(), nn.Linear(32, 2)), {"0.0"}),
    ],
    ids=["shared head", "dense", "transposed", "group norm", "flatten"],
)
def test_other_kinds_of_networks_are_pruned_wherever_they_can_be(net, roots):
    settled(net)
    assert {unit.root for unit in units.find(net, IMAGES).units} == roots
    pruned, _ = pruned_by_half(net, IMAGES)
    assert [t.shape for t in tensors(pruned(IMAGES))] == [t.shape for t in tensors(net(IMAGES))]


class Heads(nn.Module):
    """Attention whose code knows how wide a head is, and takes as many as there are."""

    def __init__(self, wide=8, heads=3):
        super().__init__()
        self.wide, c = wide, wide * heads
        self.stem, self.head = nn.Linear(4, c), nn.Linear(c, 3)
        self.query, self.key, self.value, self.out = (nn.Linear(c, c) for _ in range(4))

    def forward(self, x):
        x = self.stem(x)
        q, k, v = (
            layer(x).view(*x.shape[:2], -1, self.wide).transpose(1, 2)
            for layer in (self.query, self.key, self.value)
        )
        mixed = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        return self.head(x + self.out(mixed))


def test_heads_of_a_fixed_width_go_whole():
    net, tokens = settled(Heads()), torch.randn(2, 5, 4)
    found = {unit.root: unit for unit in units.find(net, tokens).units}
    (heads,) = [unit for unit in found.values() if unit.block > 1]
    assert (heads.block, heads.parts, heads.places) == (8, 1, 3)
    assert {"query", "key", "value", "out"} <= {*heads.members}
    assert units.places(heads, (2, 0)) == (*range(8), *range(16, 24))
    pruned = History((Step(heads.root, units.places(heads, (1,))),)).replay(net, tokens)
    assert (pruned.query.out_features, pruned.out.in_features) == (16, 16)
    net.out.weight.data[:, 8:16] = 0
    torch.testing.assert_close(pruned(tokens), net(tokens), atol=1e-5, rtol=0)


def test_a_trial_without_whole_heads_by_accident_proves_nothing():
    net, tokens = settled(Heads(heads=10)), torch.randn(2, 5, 4)  # 30 % are three heads
    found = {unit.root: unit.block for unit in units.find(net, tokens).units}
    assert found.pop("stem") == 1 and list(found.values()) == [8]


# ---- what cannot be pruned -----------------------------------------------------------------------


class Wrapped(nn.Module):
    """A stem, an operation of the test's, and a head."""

    def __init__(self, operation, c=8, c_in=8):
        super().__init__()
        self.stem, self.next, self.head = conv(3, c), conv(c_in, 8), nn.Conv2d(8, 2, 1)
        self.operation = operation

    def forward(self, x):
        return self.head(self.next(self.operation(self.stem(x))))


def reason(net, root, inputs=IMAGES):
    (found,) = [left.reason for left in units.find(net, inputs).left_alone if left.root == root]
    return found


def test_a_fixed_width_in_the_code_is_left_alone():
    net = settled(Wrapped(lambda x: x.view(-1, 8, 8, 8)))
    assert "does not run without" in reason(net, "stem.0")
    assert [unit.root for unit in units.find(net, IMAGES).units] == ["next.0"]


@pytest.mark.parametrize(
    "operation",
    [lambda x: x.detach(), lambda x: torch.from_numpy(x.detach().numpy()) * (x > 0)],
)
def test_what_hides_a_layer_from_the_graph_is_named(operation):
    net = settled(Wrapped(operation))
    assert reason(net, "stem.0").endswith("from the outputs: operation 'detach' passes no gradient")
    assert [unit.root for unit in units.find(net, IMAGES).units] == ["next.0"]


def test_softmax_over_channels_is_left_alone():
    assert "mixes its channels" in reason(settled(Wrapped(lambda x: x.softmax(1))), "stem.0")


def test_a_shuffle_of_channels_is_left_alone():
    def shuffle(x):
        return x.unflatten(1, (2, -1)).transpose(1, 2).flatten(1, 2)

    net = settled(Wrapped(shuffle))
    net.next = settled(conv(8, 8, groups=2))
    found = units.find(net, IMAGES)
    stem = [unit for unit in found.units if unit.root == "stem.0"]
    assert not stem or stem[0].parts > 1  # never one by one, which would mix the groups up


def test_layers_that_share_weights_are_left_alone():
    net = settled(Wrapped(lambda x: x))
    net.more = conv(8, 8)
    net.more[0].weight = net.next[0].weight
    net.operation = net.more
    assert "shares its weights with next.0" in reason(net, "more.0")


def test_a_transposed_convolution_of_several_groups_is_left_alone():
    net = nn.Sequential(conv(3, 16), nn.ConvTranspose2d(16, 8, 2, 2, groups=2), conv(8, 2))
    assert "transposed convolution of several groups" in reason(settled(net), "1")


def test_what_the_network_never_uses_is_said():
    net = settled(Wrapped(lambda x: x))
    net.unused = nn.Linear(3, 3)
    assert "does not reach" in reason(net, "unused")


@pytest.mark.parametrize(
    ("operation", "named"),
    [
        (lambda x: x.detach(), "detach"),
        (lambda x: torch.from_numpy(x.numpy()), "numpy"),
        (lambda x: x[:, :, : int(x.argmax()) * 10**6].view(3, 1), "view"),
        (lambda x: x.round().int().float(), "int"),
    ],
)
def test_a_network_that_cannot_be_traced_names_the_operation(operation, named):
    class Cut(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem = conv(3, 8)

        def forward(self, x):
            return operation(self.stem(x))

    with pytest.raises(NasctlError, match=named) as told:
        units.find(Cut().eval(), IMAGES)
    assert "\n" not in str(told.value)


def test_statistics_over_one_sample_are_told_in_a_line():
    net = nn.Sequential(
        nn.Conv2d(3, 8, 8), nn.BatchNorm2d(8, track_running_stats=False), nn.Conv2d(8, 2, 1)
    )
    with pytest.raises(NasctlError, match="batch_norm.*more than 1 value per channel"):
        units.find(net, IMAGES[:1])


def test_inputs_of_another_size_are_told_in_a_line():
    with pytest.raises(NasctlError, match="does not run on the example inputs: conv2d"):
        units.find(chain("plain"), torch.randn(1, 4, 8, 8))


def test_several_inputs_and_a_batch_of_one_without_norms():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.head = nn.Conv2d(3, 8, 1), nn.Conv2d(1, 8, 1), nn.Conv2d(8, 2, 1)

        def forward(self, x, y):
            return (self.head(F.relu(self.a(x) + self.b(y))),)

    inputs = (IMAGES[:1], IMAGES[:1, :1])
    pruned, _ = pruned_by_half(Two(), inputs)
    assert pruned.a.out_channels == pruned.b.out_channels == 4
    assert forward(pruned, inputs)[0].shape == (1, 2, 8, 8)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # of torch's exporter
@pytest.mark.parametrize("net", [Detector(c=8), Vit(size=32), chain(*BLOCKS)])
def test_pruned_networks_run_and_their_files_do_the_same(net, tmp_path):
    images = torch.randn(1, 3, 32, 32)
    settled(net)
    pruned, _ = pruned_by_half(net, images)
    found, whole = tensors(pruned(images)), tensors(net(images))
    assert [t.shape for t in found] == [t.shape for t in whole]
    sizes = [sum(p.numel() for p in of.parameters()) for of in (pruned, net)]
    assert sizes[0] < 0.5 * sizes[1]
    path = tmp_path / "pruned.onnx"
    torch.onnx.export(pruned, (images,), path, dynamo=True, verbose=False)
    session = onnxruntime.InferenceSession(path)
    ran = session.run(None, {session.get_inputs()[0].name: images.numpy()})
    for ours, theirs in zip(found, ran, strict=True):
        torch.testing.assert_close(ours.detach(), torch.from_numpy(theirs), atol=1e-4, rtol=1e-3)
