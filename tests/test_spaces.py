"""The contract of a search space, held by every space that `nas.space.names()` lists."""

from __future__ import annotations

import copy
import json
import math
from contextlib import contextmanager
from functools import cache

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from hw_profiles import op
from hw_profiles.op import INPUT
from nas import elastic, transformer
from nas import space as spaces
from nas.elastic import extract, leading
from nas.search_spaces import bert
from nas.space import SearchSpace

IMAGES = {"rgb": {"channels": 3, "size": 32}, "grey": {"channels": 1, "size": 8}}
EVERY = [(name, images) for name in spaces.names() for images in IMAGES]
FREE = (
    "depth",
    "mid",
    "kernel",
    "fuse",
    "block",
)  # what a zero-initialised last norm hides at initialisation

every_space = pytest.mark.parametrize(("name", "images"), EVERY)
on_grey = pytest.mark.parametrize("name", spaces.names())
#: of sizes: a space of operators has a supernet of its own, and networks that carry nothing
ELASTIC = [n for n in spaces.names() if type(spaces.load(n)).supernet is SearchSpace.supernet]
#: trained without a teacher's weights, which decide about how a network begins
FROM_SCRATCH = [name for name in ELASTIC if name != "bert"]


@cache
def load(name, images="grey"):
    if name == "bert":  # all rows of a table are alike: a few will do
        return bert.Space(classes=4, frame=bert.Frame(vocabulary=50), **IMAGES[images])
    return spaces.load(name, classes=4, **IMAGES[images])


def rows(space, n, seed=0):
    """The smallest, the largest and random ones."""
    return np.stack([space.smallest, space.largest, *space.sample(np.random.default_rng(seed), n)])


def inputs(space, arch, batch=4, seed=0):
    generator = torch.Generator().manual_seed(seed)
    if space.reads == "text":  # numbers of tokens; some places hold the padding
        return torch.randint(0, 9, (batch, space.size), generator=generator)
    shape = (batch, space.channels, arch.resolution, arch.resolution)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def supernet(space, *, shaken=True):
    """In double precision, so that only real differences show; `shaken` norms are no identities."""
    return copy.deepcopy(_supernet(space, shaken))


@cache
def _supernet(space, shaken):
    torch.manual_seed(0)
    net = space.supernet().double()
    for module in net.modules():
        if shaken and isinstance(module, nn.BatchNorm2d):
            for tensor in (module.weight.data, module.running_var):
                tensor.uniform_(0.5, 1.5)
            for tensor in (module.bias.data, module.running_mean):
                tensor.normal_(0, 0.3)
        if shaken and isinstance(module, transformer.Project) and not module.weight.any():
            module.weight.data.normal_(0, 0.1)
    return net


@every_space
def test_options_ascend_and_names_are_unique(name, images):
    space = load(name, images)
    for gene in space.genes:
        assert list(gene.options) == sorted(set(gene.options)), gene.name
    assert len(space.index) == len(space.genes)


@every_space
def test_decoding_depends_on_canonical_genes_alone(name, images):
    space = load(name, images)
    raw = np.random.default_rng(0).integers(0, space.sizes, (200, len(space.genes)))
    canonical = space.canonical(raw)
    assert (space.canonical(canonical) == canonical).all()
    archs = [space.decode(row) for row in canonical]
    assert archs == [space.decode(row) for row in raw]
    assert len(set(archs)) == len(np.unique(canonical, axis=0))


@every_space
def test_every_op_names_a_declared_slot(name, images):
    space = load(name, images)
    for row in rows(space, 20):
        assert {o.slot for o in space.ops(space.decode(row))} <= set(space.slots)


@every_space
def test_fold_is_the_plain_sum_over_ops(name, images):
    space = load(name, images)
    genes = rows(space, 40)
    plain = [space.ops(space.decode(row)) for row in genes]
    assert space.costs(genes).tolist() == [[op.macs(ops), op.params(ops)] for ops in plain]


@every_space
def test_peak_memory_from_tables_is_the_walk_over_the_ops(name, images):
    space = load(name, images)
    genes = rows(space, 40)
    walked = [op.peak_activation_bytes(space.ops(space.decode(row)), 1) for row in genes]
    assert space.peak_elements(genes).tolist() == walked
    assert len(set(walked)) > 1


@every_space
def test_costs_are_what_torch_counts(name, images):
    space = load(name, images)
    for row in rows(space, 1):
        arch = space.decode(row)
        net, ops = space.build(arch).eval(), space.ops(arch)
        assert op.params(ops) == sum(p.numel() for p in net.parameters())
        with counted() as counter, torch.no_grad():
            net(single(inputs(space, arch, batch=1)))
        assert 2 * op.macs(ops) == counter.get_total_flops()


def single(x):
    """In single precision, if it is numbers and not tokens."""
    return x.float() if x.is_floating_point() else x


@contextmanager
def counted():
    """torch's counter, with attention written out: it does not know the fused kernel."""
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        yield counter


def assert_extraction_agrees(space, n, dtype, tolerance):
    net = supernet(space).to(dtype)
    for row in rows(space, n):
        arch = space.decode(row)
        small, x = space.build(arch).to(dtype), inputs(space, arch)
        x = x.to(dtype) if x.is_floating_point() else x
        for training in (False, True):  # anew for each: a training step moves the statistics
            extract(net.train(training), small)
            with torch.no_grad():
                difference = (net(x, arch) - small(x)).abs().max()
            assert difference < tolerance, arch


@on_grey
def test_extracted_networks_compute_what_the_supernet_computes(name):
    # the slow test takes 50 of each; the next test shows smaller differences of more networks
    assert_extraction_agrees(load(name), 1, torch.float32, 1e-5)


@on_grey
def test_extraction_is_exact_to_the_precision_of_the_numbers(name):
    assert_extraction_agrees(load(name), 5, torch.float64, 1e-12)


@pytest.mark.slow
@on_grey
def test_extracted_networks_agree_on_larger_colour_images(name):
    assert_extraction_agrees(load(name, "rgb"), 50, torch.float32, 1e-5)


@on_grey
def test_no_gradient_outside_the_slice(name):
    space, net = load(name), supernet(load(name)).train()
    for row in rows(space, 3):
        arch = space.decode(row)
        shapes = {key: p.shape for key, p in space.build(arch).named_parameters()}
        net.zero_grad(set_to_none=True)
        net(inputs(space, arch), arch).square().sum().backward()
        for key, parameter in net.named_parameters():
            gradient = parameter.grad
            if key in shapes and (gradient is not None or name in ELASTIC):
                assert name not in ELASTIC or leading(gradient, shapes[key]).any(), key
                leading(gradient, shapes[key]).zero_()
            assert gradient is None or not gradient.any(), key


@pytest.mark.parametrize("name", FROM_SCRATCH)
def test_depth_middle_and_kernel_make_no_difference_at_initialisation(name):
    space, net = load(name), supernet(load(name), shaken=False).train()
    free = [gene.name.rsplit(".")[-1] in FREE for gene in space.genes]
    assert any(free)
    genes = np.where(free, space.sample(np.random.default_rng(0), 6), space.largest)
    outputs = [net(inputs(space, a), a) for a in map(space.decode, space.canonical(genes))]
    for output in outputs[1:]:
        torch.testing.assert_close(output, outputs[0], rtol=0, atol=1e-12)


@on_grey
def test_no_pass_leaves_anything_behind_for_the_next(name):
    space, net = load(name), supernet(load(name)).train()
    a, b = (space.decode(row) for row in rows(space, 0))
    noise = elastic.Noise(0.5, 0.5, torch.Generator().manual_seed(0))
    first = net(inputs(space, a), a)
    noisy = net(inputs(space, b), b, noise)
    assert not torch.equal(noisy, net(inputs(space, b), b))
    assert torch.equal(net(inputs(space, a), a), first)


@on_grey
def test_blocks_list_every_tensor_that_follows_their_middle_channels(name):
    """Any order of the middle channels is the same network, seen through each list by itself."""
    space, net = load(name), supernet(load(name))
    arch = space.decode(space.largest)
    before = net.eval()(inputs(space, arch))
    generator, moved = torch.Generator().manual_seed(0), 0
    for block in net.modules():
        for middle in block.middles() if isinstance(block, elastic.Residual) else []:
            order = torch.randperm(middle.reader.shape[1], generator=generator)
            moved += 1
            for tensor, dim in middle.tensors:
                tensor.data.copy_(tensor.data.index_select(dim, order))
    assert moved
    torch.testing.assert_close(net(inputs(space, arch)), before, rtol=0, atol=1e-10)


def plain_squeeze_excite(self, x):
    gate = torch.relu(self.reduce(x.mean((2, 3), keepdim=True)))
    return x * nn.functional.hardsigmoid(self.expand(gate))


@every_space
@pytest.mark.parametrize("training", [False, True])
def test_the_largest_is_the_plain_torch_network_bit_for_bit(name, images, training, monkeypatch):
    space = load(name, images)
    net = supernet(space).float().train(training)
    arch = space.decode(space.largest)
    x = single(inputs(space, arch))
    found = net(x, arch)
    convolutional = (elastic.Conv2d, elastic.DepthwiseConv2d, elastic.BatchNorm2d)
    tokens = (transformer.Project, transformer.LayerNorm, transformer.Table)
    for layer in (*convolutional, *tokens, elastic.Linear):
        plain = layer.__base__.forward
        monkeypatch.setattr(layer, "forward", lambda self, x, *_, plain=plain: plain(self, x))
    monkeypatch.setattr(elastic.SqueezeExcite, "forward", plain_squeeze_excite)
    assert torch.equal(net(x, arch), found)


@every_space
def test_enlarging_one_gene_never_lowers_a_cost(name, images):
    space = load(name, images)
    genes = space.sample(np.random.default_rng(0), 300)
    for at, size in enumerate(space.sizes):
        more = genes.copy()
        more[:, at] = np.minimum(more[:, at] + 1, size - 1)
        grown = space.costs(space.canonical(more)) >= space.costs(genes)
        # operators are ordered by MACs: one with more of them may have fewer parameters
        assert (grown if name in ELASTIC else grown[:, 0]).all(), space.genes[at].name


@every_space
def test_variation_stays_in_the_space_and_follows_the_generator(name, images):
    space = load(name, images)

    def generations(seed):
        rng = np.random.default_rng(seed)
        a, b = space.sample(rng, 50), space.sample(rng, 50)
        return np.concatenate([a, space.mutate(a, rng, 0.3), space.crossover(a, b, rng)])

    found = generations(1)
    assert (found >= 0).all() and (found < space.sizes).all()
    assert (space.canonical(found) == found).all()
    assert (generations(1) == found).all()
    assert (generations(2) != found).any()
    assert not {tuple(row) for row in found[50:100]} <= {tuple(row) for row in found[:50]}


@every_space
def test_count_is_the_number_of_distinct_rows(name, images):
    space = load(name, images)
    if (n := math.prod(space.sizes.tolist())) > 200_000:
        counted = {"vit": sum(3 * 9**depth for depth in (4, 5, 6))}  # too many to list
        assert space.count() == counted.get(name, n)
        assert name in counted or not any(gene.needs for gene in space.genes)
    else:
        grid = np.stack(np.unravel_index(np.arange(n), space.sizes), 1)
        assert space.count() == len(np.unique(space.canonical(grid), axis=0))


@every_space
def test_architectures_survive_json(name, images):
    space = load(name, images)
    for row in rows(space, 20):
        arch = space.decode(row)
        fields = json.loads(json.dumps(spaces.arch_to_dict(arch)))
        again = spaces.arch_from_dict(space.arch_type, fields)
        assert again == arch and hash(again) == hash(arch)


@every_space
def test_encoding_is_one_hot_and_silent_about_inactive_genes(name, images):
    space = load(name, images)
    genes = rows(space, 50)
    code = space.encode(genes)
    assert code.shape == (len(genes), space.sizes.sum())
    blocks = np.split(code, np.cumsum(space.sizes)[:-1], axis=1)
    assert (np.stack([b.sum(1) for b in blocks], 1) == space.active(genes)).all()
    for at, block in enumerate(blocks):
        on = space.active(genes)[:, at]
        assert (block[on].argmax(1) == genes[on, at]).all()


@every_space
def test_peak_memory_is_the_worst_moment(name, images):
    space = load(name, images)
    for row in rows(space, 5):
        ops = space.ops(space.decode(row))
        size = {INPUT: inputs(space, space.decode(row), batch=1).numel()}
        size.update((at, o.elements_out) for at, o in enumerate(ops))
        readers = {t: [at for at, o in enumerate(ops) if t in o.reads] for t in size}
        moments = [
            sum(
                n
                for t, n in size.items()
                if t <= at and (t == at or max(readers[t], default=-1) >= at)
            )
            for at in range(len(ops))
        ]
        assert op.peak_activation_bytes(ops, 2) == 2 * max(moments)


@on_grey
@pytest.mark.parametrize("size", [4, 7, 28, 99])
def test_images_of_any_size_run(name, size):
    space = spaces.load(name, channels=1, classes=3, size=size, width=0.25)
    arch = space.decode(space.largest)
    net, ops = space.build(arch).eval(), space.ops(arch)
    with counted() as counter, torch.no_grad():
        assert net(single(inputs(space, arch, batch=1))).shape == (1, 3)
    assert 2 * op.macs(ops) == counter.get_total_flops()
    assert space.reads == "text" or arch.resolution <= size * 4 / 3 + 4


@on_grey
@pytest.mark.parametrize("width", [0.01, 1.5, 4.0])
def test_any_width_makes_a_valid_space(name, width):
    space = spaces.load(name, size=8, width=width)
    assert space.count() >= 1
    assert all(len(set(gene.options)) == len(gene.options) for gene in space.genes)
    assert op.params(space.ops(space.decode(space.largest))) > 0
