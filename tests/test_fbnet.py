"""The FBNet space against its authors' networks and against other people's tables of it."""

from __future__ import annotations

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from benchmarks import contract, fbnet_blocks, networks
from hw_profiles import op
from nas import space as spaces
from nas.errors import NasctlError
from nas.search_spaces import fbnet

#: networks as their authors print them, a layer per word, with the published counts in millions
PUBLISHED = {
    "A": (
        "skip | k3_e3 k3_e1 skip skip | k5_e6 k3_e3 k5_e1 k3_e3 | k5_e6 k5_e3 k5_e1_g2 k5_e6 |"
        "k3_e6 k5_e1_g2 k5_e3 k3_e1_g2 | k5_e6 k5_e6 k5_e3 k5_e6 | k5_e6",
        (244.5, 4.3, 1504),
    ),
    "B": (
        "k3_e1 | k3_e6 k5_e1 k3_e1 k3_e1 | k5_e6 k5_e3 k3_e6 k5_e6 | k5_e6 k5_e6 skip k5_e3 |"
        "k5_e6 k3_e1 k5_e1 k5_e3 | k5_e6 k5_e1 k5_e6 k5_e6 | k3_e6",
        (291.1, 4.8, 1984),
    ),
    "C": (
        "k3_e1 | k3_e6 skip k3_e1 k3_e1 | k5_e6 k5_e3 k5_e6 k3_e6 | k5_e6 k5_e3 k5_e6 k5_e6 |"
        "k5_e6 k5_e6 k5_e6 k5_e3 | k5_e6 k5_e6 k5_e6 k5_e6 | k3_e6",
        (378.2, 5.5, 1984),
    ),
}


@pytest.fixture(scope="module")
def small():
    return spaces.load("fbnet", classes=100, size=32)


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_networks_have_the_published_counts(name):
    space = spaces.load("fbnet", classes=1000, size=224)
    text, (macs, params, last) = PUBLISHED[name]
    space.last = last
    ops = space.ops(space.decode(space.from_names(text.replace("|", " ").split())))
    kept = [each for at, each in enumerate(ops) if not widens_nothing(ops, at)]
    assert len(kept) < len(ops)
    assert op.macs(kept) / 1e6 == pytest.approx(macs, abs=0.1)
    assert op.params(kept) / 1e6 == pytest.approx(params, abs=0.1)


def widens_nothing(ops, at):
    """The first 1x1 convolution of a block that does not expand: the paper's block has it, the
    authors' released networks, whose counts are printed, do not."""
    after = [each for each in ops[at + 1 :] if each.kind != "concat"][:1]
    return ops[at].kind == "conv" and [(a.kind, a.c_in) for a in after] == [
        ("dwconv", ops[at].c_in)
    ]


def test_the_space_has_nine_to_the_twenty_second_networks(small):
    assert small.count() == 9**22


def test_numbers_are_those_of_hw_nas_bench(small):
    rng = np.random.default_rng(0)
    for indices in rng.integers(0, 9, (20, 22)).tolist():
        genes = small.from_indices(indices)
        assert small.op_index(genes) == indices
        # op lists of this family were written a second time for tables of other people's networks
        assert small.ops(small.decode(genes)) == networks.fbnet_ops(indices)


def test_what_is_no_fbnet_is_refused(small):
    with pytest.raises(NasctlError, match="no FBNet: k3_e1"):
        small.from_names(["k3_e1"] * 21)
    with pytest.raises(NasctlError, match="22 names of k3_e1"):
        small.from_names(["k7_e1"] * 22)


def test_the_table_of_blocks_gives_the_published_latencies(small):
    folder = contract.data("help_latency")
    if folder is None or contract.data("hwnasbench") is None:
        pytest.skip("NASCTL_DATA/help_latency or hwnasbench is absent")
    rows = pq.read_table(folder / "fbnet_latency.parquet").slice(0, 100).to_pylist()
    genes = [small.from_indices([row[f"op_{at:02d}"] for at in range(22)]) for row in rows]
    found = fbnet_blocks.block_latency(small, "raspi4").of(np.array(genes))
    np.testing.assert_allclose(found, [row["raspi4_ms"] for row in rows], rtol=1e-6)
    # the simulated accelerator's has an entry for every block too
    assert fbnet_blocks.block_latency(small, "eyeriss").of(np.array(genes)).min() > 2.788


def test_blocks_of_a_device_that_nobody_measured_are_refused(small):
    if contract.data("hwnasbench") is None:
        pytest.skip("NASCTL_DATA/hwnasbench is absent")
    with pytest.raises(NasctlError, match="no blocks of toaster; allowed: raspi4"):
        fbnet_blocks.block_latency(small, "toaster")


def test_a_shuffle_hands_every_group_channels_of_all_groups():
    x = torch.arange(8.0).view(1, 8, 1, 1)
    assert fbnet._shuffled(x, 2).flatten().tolist() == [0, 4, 1, 5, 2, 6, 3, 7]


def test_a_skip_is_an_identity_or_a_convolution(small):
    skips = small.decode(small.from_names(["skip"] * 22))
    net = small.build(skips)
    weighty = [at for at, layer in enumerate(net.layers) if len(layer.candidates)]
    assert weighty == [1, 5, 9, 13, 17, 21]


def test_the_supernet_asks_a_blend_for_every_layer_and_only_then(small):
    space = spaces.load("fbnet", channels=1, classes=3, size=8, width=0.25)
    net, x = space.supernet().eval(), torch.randn(2, 1, 8, 8)
    row = space.sample(np.random.default_rng(0), 1)[0]
    seen = []

    def chosen(gene, x, candidates):
        seen.append((gene, len(candidates)))
        return candidates[row[gene]](x)

    with torch.no_grad():
        assert torch.equal(net(x, blend=chosen), net(x, space.decode(row)))
    assert seen == [(at, 9) for at in range(22)]
