"""The NAS-Bench-201 space against its authors' numbering, text, counts and trainings."""

from __future__ import annotations

import numpy as np
import pyarrow.parquet as pq
import pytest

from benchmarks import contract
from hw_profiles import op
from nas import space as spaces
from nas.errors import NasctlError
from nas.search_spaces import nasbench201 as nb

#: the ids of operators in the published tables of metrics, as positions in OPS
TABLE_IDS = (nb.OPS.index("skip_connect"), 0, *map(nb.OPS.index, ("nor_conv_3x3", "nor_conv_1x1")))


LIVE = [("dataset", "==", "cifar10")]


@pytest.fixture(scope="module")
def every():
    """Genes of all networks in the benchmark's order [15625, 6]."""
    return np.array([nb.genes_at(number) for number in range(15_625)])


@pytest.fixture(scope="module")
def space():
    return spaces.load("nasbench201")


def accuracies():
    folder = contract.data("nb201_accuracy")
    if folder is None:
        pytest.skip("NASCTL_DATA/nb201_accuracy is absent")
    return pq.read_table(folder / "nb201_accuracy.parquet").to_pydict()


def test_numbers_texts_and_genes_are_one(every):
    assert len(np.unique(every, axis=0)) == 15_625
    for number in range(0, 15_625, 83):
        text = nb.to_string(every[number])
        assert nb.from_string(text).tolist() == every[number].tolist()
        assert nb.index_of(every[number]) == number


def test_the_numbering_is_the_authors():
    first = "|avg_pool_3x3~0|+|nor_conv_1x1~0|skip_connect~1|"
    first += "+|nor_conv_1x1~0|skip_connect~1|skip_connect~2|"
    assert nb.to_string(nb.genes_at(0)) == first
    table = accuracies()
    for number, text in zip(table["arch_index"], table["arch_str"], strict=True):
        assert nb.to_string(nb.genes_at(number)) == text


def test_edges_are_in_the_order_of_the_tables_of_metrics():
    """Text and tables list edges differently; mixing them up still parses."""
    table = accuracies()
    edges = np.stack([table[f"op_{a}_{b}"] for a, b in nb.EDGES], 1)
    ids = np.array([*TABLE_IDS, nb.OPS.index("avg_pool_3x3")])
    for row, number in zip(ids[edges], table["arch_index"], strict=True):
        assert nb.index_of(row) == number


@pytest.mark.parametrize(
    "text", ["", "|none~0|", "|conv~0|+|none~0|none~1|+|none~0|none~1|none~2|"]
)
def test_what_is_no_cell_is_refused(text):
    with pytest.raises(NasctlError, match="no NAS-Bench-201 cell"):
        nb.from_string(text)


def test_parameters_of_a_published_cell(space):
    """The tuple (0, 2, 3, 2, 3, 1) of the published tables has 0.615386 M."""
    genes = np.array([TABLE_IDS[code] for code in (0, 2, 3, 2, 3, 1)])
    arch = space.decode(genes)
    assert op.params(space.ops(arch)) == 615_386
    assert sum(p.numel() for p in space.build(arch).parameters()) == 615_386
    assert space.costs(genes[None])[0, 1] == 615_386


def carries(genes):
    """Does any path of operators lead from the cell's input to its output? [N]"""
    edge = {pair: genes[:, at] > 0 for at, pair in enumerate(nb.EDGES)}
    two = edge[0, 2] | (edge[0, 1] & edge[1, 2])
    return edge[0, 3] | (edge[0, 1] & edge[1, 3]) | (two & edge[2, 3])


def test_networks_without_a_path_never_learned_anything(every):
    dead = ~carries(every)
    assert dead.sum() == 341
    table = accuracies()
    test = np.array(table["cifar10_hp200_test_acc"])[np.argsort(table["arch_index"])]
    assert ((test < 10.0001) == dead).all()


def test_counts_are_the_published_ones(every, space):
    folder = contract.data("nb201_zerocost")
    if folder is None:
        pytest.skip("NASCTL_DATA/nb201_zerocost is absent")
    rows = pq.read_table(folder / "nb201_zerocost.parquet", filters=LIVE).to_pylist()
    rows = [row for row in rows if (row["params"] or 0) > 0]
    assert len(rows) == 9_445
    macs, params = space.costs(every[[row["arch_index"] for row in rows]]).T
    np.testing.assert_allclose(params / 1e6, [row["params"] for row in rows], atol=1e-6)
    # theirs count batch norms and poolings too
    more = np.array([row["flops"] for row in rows]) - macs / 1e6
    assert more.min() > 0 and more.max() < 8


def test_the_supernet_holds_both_convolutions_of_every_edge(space):
    net = space.supernet()
    names = {name.split(".norm")[0] for name, _ in net.named_parameters() if "blocks.0." in name}
    assert sum("nor_conv_3x3" in name for name in names if name.endswith("conv.weight")) == 6
    assert sum("nor_conv_1x1" in name for name in names if name.endswith("conv.weight")) == 6
    alone = space.build(space.decode(space.smallest))
    assert not [name for name, _ in alone.named_parameters() if "edges" in name]


def test_the_network_of_3x3_convolutions_alone_costs_what_is_published():
    """220.12 M and 1.531546 M parameters; the published count has pooling, of which it has none."""
    space = nb.Space()
    ops = space.ops(space.decode(space.largest))
    assert (op.macs(ops), op.params(ops)) == (220_119_680, 1_531_546)
