"""The contract of a training-free proxy, held by every file that `nas.proxies.names()` lists."""

from __future__ import annotations

import copy
import math
import sys

import nets
import numpy as np
import pytest
import torch
from torch import nn

from nas import proxies
from nas import space as spaces
from nas.errors import NasctlError, UsageError
from nas.passes import Batch, Missing, measure
from nas.search_spaces import nasbench201

COUNTS = {"params", "macs", "az_complexity"}
#: what has no value for a kind of network, and why
WITHOUT = {
    "gated": {"naswot": "most of its activations", "swap": "most of its activations"},
    "transformer": {"naswot": "no ReLU", "swap": "no ReLU", "zen": "hidden by layer_norm"},
}
every_proxy = pytest.mark.parametrize("name", proxies.names())
every_kind = pytest.mark.parametrize("kind", nets.KINDS)


def values(names=None):
    return {name: proxies.load(name) for name in names or proxies.names()}


def module_of(name):
    return sys.modules[proxies.load(name).__module__]


def same(a, b):
    return a == b or (math.isnan(a) and math.isnan(b))


def state(net):
    tensors = {**dict(net.named_parameters()), **dict(net.named_buffers())}
    modules = list(net.modules())
    return (
        {name: tensor.detach().clone() for name, tensor in tensors.items()},
        {name: (id(p), p.requires_grad, p.grad) for name, p in net.named_parameters()},
        [module.training for module in modules],
        [(dict(m._forward_hooks), dict(m._forward_pre_hooks), set(vars(m))) for m in modules],
        torch.get_rng_state().tolist(),
    )


def assert_same_state(before, after):
    assert before[0].keys() == after[0].keys()
    for name, tensor in before[0].items():
        assert torch.equal(tensor, after[0][name]), name
    assert before[1:] == after[1:]


# ---- the contract --------------------------------------------------------------------------------


@every_kind
def test_every_proxy_has_a_value_for_every_kind_of_block(kind):
    expected = WITHOUT.get(kind, {})
    for name, score in measure(nets.make(kind), nets.batch(), values()).items():
        if name in expected:
            assert math.isnan(score.value) and expected[name] in score.reason, name
        else:
            assert math.isfinite(score.value) and score.reason == "", (name, score.reason)
        assert score.seconds >= 0


@every_kind
def test_alone_is_the_same_number_as_beside_all_others(kind):
    together = measure(nets.make(kind), nets.batch(), values())
    backwards = measure(nets.make(kind), nets.batch(), dict(reversed(values().items())))
    for name, score in together.items():
        alone = module_of(name).score(nets.make(kind), nets.batch())
        assert same(alone, score.value) and same(backwards[name].value, score.value), name


@every_proxy
@every_kind
def test_the_network_is_as_it_was(kind, name):
    net = nets.make(kind)
    net.train()
    next(net.children()).eval()
    parameters = list(net.parameters())
    parameters[0].requires_grad_(False)
    parameters[1].grad = torch.ones_like(parameters[1])
    net.register_forward_hook(lambda module, args, out: None)
    before = state(net)
    module_of(name).score(net, nets.batch())
    assert_same_state(before, state(net))


@every_proxy
def test_a_network_that_fails_midway_is_as_it_was(name):
    class Fails(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = nets.conv()

        def forward(self, x):
            self.body(x)
            raise ValueError("no such size")

    net = Fails().eval()
    before = state(net)
    score = measure(net, nets.batch(), values([name]))[name]
    assert name == "params" or "ValueError: no such size" in score.reason
    assert_same_state(before, state(net))


@pytest.mark.parametrize("genes", [(0, 0, 0, 0, 0, 0), (4, 4, 0, 0, 0, 0), (0, 0, 0, 4, 3, 2)])
def test_a_dead_cell_has_no_scores_but_its_counts(genes):
    """No path of operators from a cell's input to its output: published scores are -1e8."""
    space = spaces.load("nasbench201", size=8, width=0.5)
    torch.manual_seed(0)
    net = space.build(space.decode(np.array(genes)))
    for name, score in measure(net, nets.batch(size=8), values()).items():
        assert (name in COUNTS) == math.isfinite(score.value), (name, score)
        assert name in COUNTS or "dead" in score.reason, (name, score)


def test_live_cells_of_every_operator_have_all_scores():
    space = spaces.load("nasbench201", size=8, width=0.5)
    for genes in ((4, 1, 2, 3, 4, 1), (1, 1, 1, 1, 1, 1)):
        torch.manual_seed(0)
        net = space.build(space.decode(np.array(genes)))
        found = measure(net, nets.batch(size=8), values())
        assert not [name for name, score in found.items() if score.reason], genes


# ---- bad input -----------------------------------------------------------------------------------


class Returns(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.body, self.function = nets.conv(), function

    def forward(self, x):
        return self.function(self.body(x))


class TwoInputs(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nets.conv()

    def forward(self, x, y):
        return self.body(x) + self.body(y)


BAD = {
    "several heads": (Returns(lambda y: (y, y)), nets.batch(), "gives a tuple"),
    "dictionary": (Returns(lambda y: {"out": y}), nets.batch(), "gives a dict"),
    "maps": (Returns(lambda y: y[:, :, None]), nets.batch(), "gives [16, 4, 1]"),
    "several inputs": (TwoInputs(), nets.batch(), "missing 1 required positional argument"),
    "labels": (nets.conv(), Batch(torch.randn(4, 3, 8, 8), torch.full((4,), 9)), "IndexError"),
    "infinite": (Returns(lambda y: y / 0), nets.batch(), "overflow"),
    "no weights": (nn.Flatten(), nets.batch(size=2), ""),
    "tokens": (nn.Embedding(9, 4), Batch(torch.ones(4, 3).long(), torch.ones(4).long()), ""),
}


@pytest.mark.parametrize("bad", BAD)
def test_what_cannot_be_scored_is_missing_with_its_reason(bad):
    net, batch, fragment = BAD[bad]
    found = measure(net, batch, values())
    for name, score in found.items():
        assert math.isfinite(score.value) != bool(score.reason), (name, score)
    assert fragment in found["grad_norm"].reason != ""


def test_batches_that_are_too_small_are_missing_not_wrong():
    for n, lack in ((1, {"jacob_cov", "epe_nas", "ntk", "zico"}), (2, {"epe_nas"})):
        found = measure(nets.Residual(), nets.batch(n), values())
        assert {name for name, score in found.items() if score.reason} >= lack, n
        assert all(math.isfinite(s.value) != bool(s.reason) for s in found.values())


def test_weights_that_overflow_are_missing():
    net = nets.conv()
    with torch.no_grad():
        net[0].weight.fill_(float("inf"))
    found = measure(net, nets.batch(), values(["snip", "l2_norm", "synflow", "naswot"]))
    assert all("overflow" in score.reason for score in found.values())


def test_a_head_of_zeros_says_so():
    net = nets.conv()
    nn.init.zeros_(net[-1].weight)
    assert "same for every sample" in measure(net, nets.batch(), values(["snip"]))["snip"].reason


def test_a_few_relus_among_others_are_no_code():
    torch.manual_seed(0)  # two ReLUs may all be off
    layers = [nn.Conv2d(3, 8, 1), nn.SiLU(), nn.Conv2d(8, 8, 1), nn.SiLU(), nn.Conv2d(8, 2, 1)]
    net = nn.Sequential(*layers, nn.ReLU(), *nets.head(2))
    assert "most of its activations" in measure(net, nets.batch(), values(["swap"]))["swap"].reason


def test_interrupts_are_no_reason():
    def value(seen):
        raise KeyboardInterrupt

    net = nets.conv().eval()
    with pytest.raises(KeyboardInterrupt):
        measure(net, nets.batch(), {"interrupted": value})
    assert not net.training


# ---- by name -------------------------------------------------------------------------------------


def test_names_are_the_proxies_and_not_the_learned_predictors():
    wanted = {"grad_norm", "snip", "plain", "grasp", "fisher", "synflow", "jacob_cov", "epe_nas"}
    wanted |= {"naswot", "zen", "l2_norm", "ntk", "zico", "meco", "swap", "near", "params", "macs"}
    wanted |= {f"az_{what}" for what in ("expressivity", "progressivity", "trainability")}
    assert set(proxies.names()) == wanted | {"az_complexity"}
    assert all(proxies.summary(name).strip() for name in proxies.names())


def test_an_unknown_proxy_names_the_nearest():
    with pytest.raises(UsageError, match="--proxies: unknown proxy 'snp'.*Did you mean snip?"):
        proxies.load("snp")


def test_a_proxy_of_ones_own_needs_a_score_only(tmp_path, monkeypatch):
    text = "def score(net, batch):\n    return float(len(list(net.parameters())))\n"
    (tmp_path / "mine.py").write_text("")
    (tmp_path / "my_proxy").mkdir()
    (tmp_path / "my_proxy" / "__init__.py").touch()
    (tmp_path / "my_proxy" / "count.py").write_text(text)
    (tmp_path / "my_proxy" / "empty.py").touch()
    monkeypatch.syspath_prepend(tmp_path)
    found = measure(nets.conv(), nets.batch(), values(["my_proxy.count", "params"]))
    assert found["my_proxy.count"].value == 8
    with pytest.raises(NasctlError, match="has no 'score'"):
        proxies.load("my_proxy.empty")
    with pytest.raises(UsageError, match="no module named 'my_other'"):
        proxies.load("my_other.proxy")


# ---- what is shared ------------------------------------------------------------------------------


def test_one_forward_pass_serves_the_gradient_family():
    calls = []
    net = nets.conv()
    net.register_forward_pre_hook(lambda module, args: calls.append(module.training))
    family = ("grad_norm", "snip", "plain", "fisher", "jacob_cov", "epe_nas", "naswot", "swap")
    found = measure(net, nets.batch(), values((*family, "grasp", "near", "meco", "l2_norm")))
    assert not [score.reason for score in found.values() if score.reason]
    assert calls == [True]


def test_a_step_that_failed_is_not_run_again():
    tries = []

    def step(seen):
        tries.append(1)
        raise Missing("nothing here")

    def value(seen):
        return seen.read(step)

    net = copy.deepcopy(nets.conv())
    found = measure(net, nets.batch(), {"a": value, "b": value})
    assert [score.reason for score in found.values()] == ["nothing here"] * 2 and tries == [1]


def test_seconds_are_those_of_a_proxy_alone():
    """Its own and those of what it reads, whoever read it first."""
    found = measure(nets.make("residual"), nets.batch(64), values(["snip", "grad_norm", "fisher"]))
    seconds = [found[name].seconds for name in ("snip", "grad_norm", "fisher")]
    assert min(seconds) > 0.4 * max(seconds)


def test_the_numbering_of_the_benchmark_has_scores_like_the_published():
    """Another implementation's values of network 4811, other images and initial weights."""
    theirs = {"synflow": 41.949, "l2_norm": 231.31, "params": 615_386, "naswot": 406.5}
    space = spaces.load("nasbench201")
    torch.manual_seed(0)
    net = space.build(space.decode(nasbench201.genes_at(4811)))
    found = measure(net, nets.batch(32, size=32), values(theirs))
    for name, value in theirs.items():
        assert found[name].value == pytest.approx(value, rel=0.005), name
