from __future__ import annotations

import pytest
import torch

from hw_profiles import op
from nas.elastic import extract
from nas.errors import UsageError
from nas.search_spaces import bert, vit
from nas.search_spaces.bert import GRIDS, Arch, Frame, Grid, Space, kept, within

NAMES = ("layers", "hidden", "heads", "halves")


@pytest.mark.parametrize(
    ("name", "layers", "hidden", "heads", "halves", "macs_g", "params_m"),
    [
        ("small", 11, 352, 10, 8, 2.90, 31.9),  # AutoDistil-Agnostic
        ("base", 12, 544, 9, 6, 4.88, 53.6),  # ProxyB
        ("small", 11, 352, 8, 8, 2.60, 29.9),  # ProxyS
        ("tiny", 7, 160, 10, 7, 0.67, 9.1),  # ProxyT
    ],
)
def test_costs_are_those_of_the_papers_students_in_real_tensors(
    name, layers, hidden, heads, halves, macs_g, params_m
):
    """Not the paper's own figures, 2.13, 4.40, 2.02 and 0.27 G: its formula shrinks heads."""
    space = Space(size=128, grid=GRIDS[name])
    options = dict(zip(NAMES, (layers, hidden, heads, halves), strict=True))
    genes = [gene.options.index(options[gene.name]) for gene in space.genes]
    ops = space.ops(space.decode(genes))
    assert op.macs(ops) / 1e9 == pytest.approx(macs_g, abs=0.006)
    pooler = hidden * (hidden + 1)  # which the released networks have
    assert (op.params(ops) + pooler) / 1e6 == pytest.approx(params_m, abs=0.06)


@pytest.mark.parametrize("name", GRIDS)
def test_each_of_the_papers_sub_spaces_has_256_members(name):
    assert Space(grid=GRIDS[name]).count() == 256


def test_layers_are_taken_alternately():
    assert kept(12, 12) == tuple(range(12))
    assert kept(9, 12) == (0, 1, 2, 4, 5, 6, 8, 9, 10)
    assert kept(4, 7) == (0, 1, 3, 5)
    assert kept(1, 6) == (0,)


def test_sub_spaces_lie_inside_any_teacher():
    found = within(6, 384, 12, 1536)
    assert found["base"] == Grid((5, 6), (288, 320, 352), (9, 10, 11, 12), (5, 6, 7, 8))
    assert found["small"] == Grid((4, 5), (192, 224, 256), (7, 8, 9, 10), (5, 6, 7, 8))
    assert found["tiny"] == Grid((3, 4), (128, 160), (7, 8, 9, 10), (4, 5, 6, 7))
    for layers, hidden, heads in ((12, 768, 12), (2, 64, 2), (1, 32, 1), (24, 1024, 16)):
        for mlp in (hidden, 2 * hidden, 4 * hidden):
            for grid in within(layers, hidden, heads, mlp).values():
                assert grid.layers[-1] <= layers and grid.heads[-1] <= heads
                assert grid.hidden[-1] <= hidden and not any(wide % 32 for wide in grid.hidden)
                assert grid.hidden[-1] * grid.halves[-1] <= 2 * mlp
    assert within(2, 24, 2, 96)["base"].hidden == (24,)


def test_widths_of_ones_own_stay_as_they_are():
    grid = Grid((1,), (100, 156, 160), (1,), (2,))
    assert Space(size=8, grid=grid).genes[1].options == (100, 156, 160)
    assert Space(size=8, grid=grid, width=0.5).genes[1].options == (48, 80)


@pytest.mark.parametrize(
    ("grid", "where"),
    [
        (((), (32,), (1,), (2,)), "layers"),
        (((1,), (64, 32), (1,), (2,)), "hidden"),
        (((1,), (32,), (0,), (2,)), "heads"),
        (((1,), (33,), (1,), (3,)), "halves"),
    ],
)
def test_impossible_grids_are_refused(grid, where):
    with pytest.raises(UsageError, match=where):
        Grid(*grid)


def test_sequences_fit_the_positions():
    with pytest.raises(UsageError, match="513 tokens, but positions for 512"):
        Space(size=513)


def small(seed=0):
    torch.manual_seed(seed)
    space = Space(size=8, frame=Frame(vocabulary=30, positions=16, head=4), grid=GRID)
    return space, space.supernet().double()


GRID = Grid((2, 3), (16, 32), (2, 3), (2, 4))
TOKENS = torch.tensor([[1, 5, 7, 2, 0, 0, 0, 0], [1, 3, 4, 5, 6, 7, 8, 2]])


def test_queries_keys_and_values_of_fewer_heads_are_prefixes_weights_and_biases():
    """With identical inputs (one layer deep), what two heads compute is what three begin with."""
    space, net = small()
    for parameter in net.parameters():
        parameter.data.normal_(0, 0.3)
    wide, narrow = (Arch((0,), 32, heads, 64) for heads in (3, 2))
    three, two = (net.look(TOKENS, arch).attention[0] for arch in (wide, narrow))
    for many, few in zip(three, two, strict=True):
        assert few.shape[2] == 8 and many.shape[2] == 12
        torch.testing.assert_close(many[..., :8], few, rtol=1e-12, atol=1e-12)
    cut = extract(net, space.build(narrow).double())
    for name in ("query", "key", "value"):
        large = getattr(net.layers["0"].attention, name)
        part = getattr(cut.layers["0"].attention, name)
        assert torch.equal(part.weight, large.weight[:8]) and torch.equal(part.bias, large.bias[:8])


def test_padding_changes_nothing():
    _, net = small()
    alone, padded = net(TOKENS[:1, :4]), net(TOKENS[:1])
    torch.testing.assert_close(alone, padded, rtol=0, atol=1e-12)


def test_extraction_copies_layers_by_their_number():
    space, net = small()
    arch = space.decode([0, 1, 1, 1])
    assert arch.layers == (0, 1)
    cut = extract(net, space.build(arch).double())
    assert set(cut.layers) == {"0", "1"}
    torch.testing.assert_close(cut(TOKENS), net(TOKENS, arch), rtol=0, atol=1e-12)


def test_a_vit_of_large_images_is_autoformers():
    space = vit.Space(size=224, classes=1000)
    assert space.genes[0].options == (192, 216, 240)
    smallest, largest = (space.decode(row) for row in (space.smallest, space.largest))
    assert len(largest.heads) == 14 and largest.mlps[0] == 960 and smallest.mlps[0] == 672
    # the paper's tiny space: 4 to 9 million parameters
    ends = [op.params(space.ops(arch)) / 1e6 for arch in (smallest, largest)]
    assert 4 < ends[0] < ends[1] < 11


def test_noise_reaches_a_text_network():
    _, net = small()
    noise = bert.Noise(0.5, 0.5, torch.Generator().manual_seed(0))
    assert not torch.equal(net(TOKENS, net.arch, noise), net(TOKENS))
