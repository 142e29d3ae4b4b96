from __future__ import annotations

import os
from pathlib import Path

import pytest

from benchmarks import networks
from hw_profiles.op import macs, params

DATA = Path(os.environ.get("NASCTL_DATA", "/nonexistent"))
LIVE = "|nor_conv_3x3~0|+|nor_conv_1x1~0|nor_conv_3x3~1|+|none~0|skip_connect~1|nor_conv_1x1~2|"
real = pytest.mark.skipif(
    not (DATA / "hwnasbench").is_dir(), reason="NASCTL_DATA has no hwnasbench tables"
)


def test_nasbench201_parameters_of_a_published_network():
    """0.615386 M is what the public metric tables say of two 3x3 and two 1x1 per cell."""
    assert params(networks.nb201_ops(LIVE, classes=10)) == 615386
    assert params(networks.nb201_ops(LIVE, classes=100)) == 615386 + 90 * 65


def test_dead_edges_do_not_count():
    """Node 2 is read by nobody here, so what feeds it carries nothing."""
    shape = "|nor_conv_1x1~0|+|{}~0|none~1|+|none~0|skip_connect~1|none~2|"
    variants = [networks.nb201_ops(shape.format(op), 10) for op in ("none", "nor_conv_3x3")]
    assert variants[0] == variants[1]
    assert [op.reads for op in variants[0]] == [op.reads for op in variants[1]]
    alive = "|nor_conv_1x1~0|+|nor_conv_3x3~0|none~1|+|none~0|skip_connect~1|skip_connect~2|"
    assert len(networks.nb201_ops(alive, 10)) > len(variants[0])


def test_an_edge_out_of_a_node_that_nothing_reaches_is_dead():
    fed_by_nothing = "|none~0|+|none~0|nor_conv_3x3~1|+|skip_connect~0|none~1|nor_conv_3x3~2|"
    plain = "|none~0|+|none~0|none~1|+|skip_connect~0|none~1|none~2|"
    assert networks.nb201_ops(fed_by_nothing, 10) == networks.nb201_ops(plain, 10)


def test_what_pytorch_runs_includes_what_carries_nothing():
    ran, useful = networks.nb201_executed(LIVE, 10), networks.nb201_ops(LIVE, 10)
    extra = [op for op in ran if op.kind == "mul"]
    assert len(extra) == 15  # one `none` in each of the cells
    assert macs(ran) == macs(useful)
    assert sum(op.kind == "add" for op in ran) == 2 + 15 * 3  # every edge is added
    dead = "|nor_conv_3x3~0|+|none~0|none~1|+|none~0|none~1|none~2|"
    assert sum(op.kernel == 3 and op.c_in == 64 for op in networks.nb201_executed(dead, 10)) == 6
    assert all(read < at for at, op in enumerate(ran) for read in op.reads)


def test_dead_network_and_wrong_edge_order_are_refused():
    with pytest.raises(ValueError, match="dead network"):
        networks.nb201_ops("|none~0|+|none~0|none~1|+|none~0|skip_connect~1|skip_connect~2|", 10)
    with pytest.raises(ValueError, match="edges out of order"):
        networks.nb201_edges(LIVE.replace("nor_conv_1x1~0|nor_conv_3x3~1", "a~1|b~0"))


def test_fbnet_blocks():
    skips = networks.fbnet_ops([networks.FBNET_SKIP] * 22)
    assert not [op for op in skips if op.kind in ("dwconv", "add")]
    full = networks.fbnet_ops([3] * 22)
    assert sum(op.kind == "dwconv" for op in full) == 22
    assert sum(op.kind == "add" for op in full) == 16  # 22 layers, 6 change shape
    assert full[-1].c_in == 1504 and full[-3].h == 4
    assert networks.fbnet_ops([1] * 22)[1].groups == 2
    with pytest.raises(ValueError):
        networks.fbnet_ops([3] * 21)


def test_ofa_largest_network_at_width_one():
    """7.66 M parameters is what Once-for-All's own largest MobileNetV3 w1.0 has."""
    ops = networks.ofa_ops([7] * 20, [6] * 20, [4] * 5, 224, width=1.0)
    assert params(ops) == pytest.approx(7.66e6, rel=0.005)
    assert sum(op.kind == "mul" for op in ops) == 12  # squeeze-excite in three stages of four
    smaller = networks.ofa_ops([3] * 20, [3] * 20, [2] * 5, 128, width=1.0)
    assert macs(smaller) < macs(ops) / 8
    assert networks.ofa_ops([7] * 20, [6] * 20, [4] * 5, 224)[0].c_out == 24  # 16 x 1.2, by 8


@real
def test_table_alignment_and_counts():
    import pyarrow.parquet as parquet

    table = parquet.read_table(DATA / "hwnasbench/nb201_hw.parquet").to_pydict()
    first = {"edgegpu": 5.8074, "raspi4": 10.4820, "edgetpu": 0.95718, "eyeriss": 3.64562}
    for device, value in first.items():
        assert table[f"cifar10_{device}_latency_ms"][0] == pytest.approx(value, rel=1e-4)
    live = [networks.nb201_live(arch) for arch in table["arch_str"]]
    assert live.count(None) == 341
    edges = [networks.nb201_edges(arch) for arch in table["arch_str"]]
    assert sum(a == b for a, b in zip(live, edges, strict=True)) == 9444


@real
def test_block_sums_equal_the_published_ones():
    """raspi4's FBNet column is the sum of blocks, so rebuilding it checks index and layer order."""
    import pyarrow.parquet as parquet

    from benchmarks.latency_data import block_sums

    rows = parquet.read_table(DATA / "help_latency/fbnet_latency.parquet").slice(0, 50).to_pydict()
    choices = list(zip(*(rows[f"op_{at:02d}"] for at in range(22)), strict=True))
    assert block_sums(DATA / "hwnasbench", choices)["raspi4"] == pytest.approx(
        rows["raspi4_ms"], rel=1e-5
    )
