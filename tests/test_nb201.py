"""The table that `benchmarks.strategies` searches."""

from __future__ import annotations

import numpy as np
import pyarrow.parquet as pq
import pytest

from benchmarks import contract, nb201, strategies
from nas.search_spaces import nasbench201


@pytest.fixture(scope="module")
def folders():
    found = contract.data("nb201_accuracy"), contract.data("hwnasbench")
    if None in found:
        pytest.skip("NASCTL_DATA/nb201_accuracy or NASCTL_DATA/hwnasbench is absent")
    return found


@pytest.fixture(scope="module")
def table(folders):
    return nb201.load(*folders, "edgegpu")


def test_every_row_is_where_its_own_text_says(folders, table):
    """By the architecture's string in both files, which the loader does not read."""
    nets = pq.read_table(folders[0] / "nb201_accuracy.parquet").to_pylist()[::97]
    measured = pq.read_table(folders[1] / "nb201_hw.parquet").to_pylist()[::97]
    for net, hardware in zip(nets, measured, strict=True):
        assert net["arch_str"] == hardware["arch_str"]
        nodes = [node.strip("|").split("|") for node in net["arch_str"].split("+")]
        edge = {(int(e[-1]), at + 1): e[:-2] for at, node in enumerate(nodes) for e in node}
        genes = tuple(nasbench201.OPS.index(edge[pair]) for pair in nasbench201.EDGES)
        assert table.validation[genes] == net["cifar10_hp200_val_acc"] / 100
        assert table.test[genes] == net["cifar10_hp200_test_acc"] / 100
        assert table.latency_ms[genes] == hardware["cifar10_edgegpu_latency_ms"]


def test_its_extremes_are_the_published_ones(table):
    assert table.test.max() == pytest.approx(0.943733, abs=1e-6)
    assert table.validation.max() == pytest.approx(0.9157, abs=1e-6)
    assert table.latency_ms.size == 15_625


def test_a_search_reads_validation_and_never_test(table):
    blind = nb201.Table(table.validation, np.full_like(table.test, np.nan), table.latency_ms)
    found = [strategies.searched(each.problem(5.0, seed=1), "nsga2", 64) for each in (table, blind)]
    assert found[0] == found[1] and len(found[0]) == 64
    assert max(c.high_ms for c in found[0]) <= 5.0


def test_holm_by_hand():
    assert strategies.holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert strategies.holm([0.9, 0.8]) == [1.0, 1.0]
