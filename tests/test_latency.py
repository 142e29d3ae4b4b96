from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hw_profiles import device as devices
from hw_profiles import families, latency
from hw_profiles.device import Device
from hw_profiles.latency import SOURCES, Interval, LatencyTable, Measurement, Terms
from hw_profiles.models.calibrate import MIN_NETWORKS, Design, Ridge, fit, solve
from hw_profiles.op import Op, Tape
from nas.errors import NasctlError

DATA = Path(os.environ.get("NASCTL_DATA", "/nonexistent"))
TRUE = {  # overhead, ms per GMAC, ms per MB of the synthetic additive device
    "conv": (0.05, 20.0, 0.3),
    "dwconv": (0.02, 90.0, 0.5),
    "join": (0.01, 0.0, 0.9),
}


def bare(name: str = "board", **known) -> Device:
    return Device(
        name=name,
        summary="synthetic",
        kind="cpu",
        runtime="none",
        precision="fp32",
        sources=("synthetic",),
        **known,
    )


def network(widths, size, depthwise, residuals) -> list[Op]:
    tape = Tape(3, size)
    x = tape.conv(tape.input, int(widths[0]), kernel=3, stride=2, norm=True, act="relu")
    for at, width in enumerate(widths):
        x = tape.conv(x, int(width), kernel=1 + 2 * (at % 2), norm=True)
        if at < depthwise:
            x = tape.conv(x, x.c, kernel=3 + 2 * (at % 2), groups=x.c, norm=True)
        for _ in range(residuals if at == 0 else 0):
            x = tape.add(x, x)
    tape.linear(tape.gap(x), 10)
    return tape.ops


def networks(n: int, seed: int = 0) -> list[list[Op]]:
    rng = np.random.default_rng(seed)
    return [
        network(
            8 * rng.integers(1, 16, size=rng.integers(2, 7)),
            int(rng.choice([16, 32, 48])),
            int(rng.integers(0, 6)),
            int(rng.integers(0, 5)),
        )
        for _ in range(n)
    ]


def additive(ops: list[Op]) -> float:
    """The synthetic device; linear and pool are in every network once and cost 0.4 ms together."""
    total = 0.4
    for op in ops:
        overhead, compute, memory = TRUE.get(op.kind if op.kind != "add" else "join", (0, 0, 0))
        total += overhead + op.macs * 1e-9 * compute + op.bytes() * 1e-6 * memory
    return total


@pytest.fixture(scope="module")
def fitted() -> LatencyTable:
    samples = [(ops, additive(ops)) for ops in networks(60)]
    return fit(samples, bare(), space="mine", source_text="synthetic")


def test_additive_device_is_recovered():
    nets = networks(200)
    design = Design.of(nets, bare())
    times = np.array([additive(ops) for ops in nets])
    none = Ridge(constant=1e-12, term=1e-12, bytes=1e-12, act=1e-12)
    constant, terms = solve(design, times, none)
    for family, expected in TRUE.items():
        assert terms[family] == pytest.approx(expected, rel=0.1, abs=0.002), family
    held_out = networks(50, seed=1)
    for ops in held_out:
        rows = Design.of([ops], bare()).features[0]
        predicted = constant + sum(
            rows[at] @ terms[family] for at, family in enumerate(families.FAMILIES)
        )
        assert predicted == pytest.approx(additive(ops), rel=0.01)


def test_sixty_networks_are_enough_for_an_additive_device(fitted):
    errors = [
        abs(fitted.estimate(ops, "mine").value_ms / additive(ops) - 1)
        for ops in networks(50, seed=2)
    ]
    assert np.mean(errors) < 0.03 and max(errors) < 0.15
    same = fitted.intervals["same"]
    assert same.low < 1 < same.high and same.n == 60
    assert 0.8 <= same.coverage <= 1


def test_noise_widens_the_interval_and_is_covered():
    rng = np.random.default_rng(3)
    nets = networks(300, seed=4)
    noise = np.exp(rng.normal(0, 0.1, size=len(nets)))
    samples = [(ops, additive(ops) * factor) for ops, factor in zip(nets, noise, strict=True)]
    same = fit(samples, bare(), space="mine", source_text="x").intervals["same"]
    assert same.low == pytest.approx(np.exp(-0.164), abs=0.04)
    assert same.high == pytest.approx(np.exp(0.164), abs=0.05)
    assert same.coverage == pytest.approx(0.9, abs=0.04)


def test_fit_is_deterministic_and_never_negative(fitted):
    samples = [(ops, additive(ops)) for ops in networks(60)]
    again = fit(samples, bare(), space="mine", source_text="synthetic")
    assert again == fitted
    for terms in fitted.terms.values():
        assert min(terms.overhead_ms, terms.ms_per_gmac, terms.ms_per_mb) >= 0
    assert fitted.constant_ms >= 0


def test_degenerate_designs_do_not_explode():
    """Networks of one width that differ in depth only: counts, MACs and bytes rise together."""
    nets = [network([16] * depth, 32, 0, 0) for depth in range(2, 14)]
    table = fit([(ops, additive(ops)) for ops in nets], bare(), space="s", source_text="x")
    for ops in nets:
        assert table.estimate(ops, "s").value_ms == pytest.approx(additive(ops), rel=0.05)
    wide = network([64] * 4, 32, 0, 0)
    assert 0.1 < table.estimate(wide, "s").value_ms / additive(wide) < 10


def test_rates_never_beat_the_datasheet():
    fast = bare(peak_gmacs_per_s={"fp32": 10.0}, bandwidth_gb_per_s=1.0)
    table = fit([(o, additive(o)) for o in networks(40)], fast, space="s", source_text="x")
    for terms in table.terms.values():
        assert terms.ms_per_gmac >= 100.0 and terms.ms_per_mb >= 1.0


def test_columns_add_up_to_the_estimate(fitted):
    for ops in networks(5, seed=5):
        summed = sum(fitted.columns(op) for op in ops)
        value, low, high = fitted.combine(summed, "mine")
        estimate = fitted.estimate(ops, "mine")
        assert (value, low, high) == (estimate.value_ms, estimate.low_ms, estimate.high_ms)
        assert sum(estimate.shares.values()) == pytest.approx(1)
        same = fitted.intervals["same"]
        assert (low, high) == pytest.approx((value * same.low, value * same.high))


@settings(max_examples=25, deadline=None)
@given(st.lists(st.lists(st.floats(0, 1e3), min_size=4, max_size=4), min_size=1, max_size=6))
def test_combine_vectorised_equals_one_by_one(rows):
    table = mixed()
    together = table.combine(np.array(rows), "mine")
    for at, row in enumerate(rows):
        alone = table.combine(np.array(row), "mine")
        assert [part[at] for part in together] == pytest.approx([float(part) for part in alone])


def mixed() -> LatencyTable:
    """A table in which every source has its own interval."""
    wide = {
        "measured": (0.9, 1.1),
        "same": (0.8, 1.2),
        "cross": (0.5, 2),
        "interpolated": (0.7, 1.5),
        "analytic": (0.1, 9),
    }
    return LatencyTable(
        device="board",
        runtime="none",
        precision="fp32",
        origin="made for a test",
        fitted_on=("mine",),
        fitted_kinds=("conv",),
        constant_ms=1.0,
        terms={"conv": Terms(overhead_ms=2.0), "dwconv": Terms(overhead_ms=3.0)},
        measured={Op("conv", 3, 8, 4, 4): Measurement(5.0, 0.1, 50)},
        intervals={
            name: Interval(low=low, high=high, n=9, how="test")
            for name, (low, high) in wide.items()
        },
    )


def test_each_part_keeps_its_source_and_its_interval():
    table = mixed()
    known, fitted, unseen = (
        Op("conv", 3, 8, 4, 4),
        Op("conv", 3, 9, 4, 4),
        Op("dwconv", 8, 8, 4, 4, groups=8),
    )
    assert table.columns(known).tolist() == [5, 0, 0, 0]
    assert table.columns(fitted).tolist() == [0, 2, 0, 0]
    assert table.columns(unseen).tolist() == [0, 0, 0, 3]
    estimate = table.estimate([known, fitted, unseen], "mine")
    assert estimate.value_ms == pytest.approx(11)  # with the constant
    assert estimate.low_ms == pytest.approx(5 * 0.9 + 3 * 0.8 + 3 * 0.1)
    assert estimate.high_ms == pytest.approx(5 * 1.1 + 3 * 1.2 + 3 * 9)
    assert estimate.source == "analytic"  # the weakest that contributes
    assert estimate.shares == pytest.approx(
        {"measured": 5 / 11, "calibrated": 3 / 11, "analytic": 3 / 11}
    )
    assert table.estimate([known, fitted], "mine").source == "calibrated"
    elsewhere = table.estimate([fitted], "other")
    assert (elsewhere.low_ms, elsewhere.high_ms) == pytest.approx((1.5, 6))


def test_unknown_operator_is_an_error_and_never_zero(fitted):
    with pytest.raises(NasctlError, match="unknown operator 'swirl'; allowed: "):
        fitted.columns(Op("swirl", 8, 8, 4, 4))
    with pytest.raises(NasctlError, match="no latency for operator 'add'"):
        mixed().columns(Op("add", 8, 8, 4, 4))
    unseen = fitted.columns(Op("mul", 8, 8, 4, 4))
    assert unseen[SOURCES.index("analytic")] > 0


@pytest.mark.parametrize("bad", [0.0, -1.0, float("nan"), float("inf")])
def test_fit_refuses_impossible_times(bad):
    samples = [(ops, additive(ops)) for ops in networks(20)]
    with pytest.raises(NasctlError, match="must be positive"):
        fit([*samples[:-1], (samples[-1][0], bad)], bare(), space="s", source_text="x")


def test_fit_refuses_too_few_networks_and_unknown_operators():
    ops = networks(1)[0]
    with pytest.raises(NasctlError, match=f"1 different.*at least {MIN_NETWORKS}"):
        fit([(ops, 1.0)] * 50, bare(), space="s", source_text="x")
    odd = [([Op("swirl", at, at, 1, 1)], 1.0) for at in range(1, 20)]
    with pytest.raises(NasctlError, match="unknown operator 'swirl'"):
        fit(odd, bare(), space="s", source_text="x")


def test_json_round_trip_is_exact_and_leaves_no_temporary_file(fitted, tmp_path):
    for at, table in enumerate((fitted, mixed())):
        path = tmp_path / f"{at}.table.json"
        table.save(path)
        assert LatencyTable.load(path) == table
    assert sorted(path.name for path in tmp_path.iterdir()) == ["0.table.json", "1.table.json"]


def test_damaged_tables_are_one_clear_error(tmp_path):
    path = tmp_path / "board.table.json"
    mixed().save(path)
    whole = path.read_text()
    for cut in range(0, len(whole) - 2, 97):
        path.write_text(whole[:cut])
        with pytest.raises(NasctlError, match="board.table.json: damaged latency table: "):
            LatencyTable.load(path)
    stored = json.loads(whole)
    for change in (
        {"unit": "s"},
        {"constant_ms": -1},
        {"measured": [{"op": {"kind": "conv"}, "time": {}}]},
        {"intervals": {}},
        {"precision": "fp17"},
        {"extra": 1},
    ):
        path.write_text(json.dumps(stored | change))
        with pytest.raises(NasctlError, match="damaged latency table"):
            LatencyTable.load(path)
    path.write_bytes(b"\xff")
    with pytest.raises(NasctlError, match="damaged latency table"):
        LatencyTable.load(path)
    with pytest.raises(NasctlError, match="cannot read the latency table"):
        LatencyTable.load(tmp_path / "none.json")


def test_interval_bounds_are_ordered():
    with pytest.raises(ValueError, match="is above"):
        Interval(low=2, high=1, n=3, how="x")


def test_roofline_is_the_slower_of_compute_and_memory():
    board = bare(peak_gmacs_per_s={"fp32": 1.0}, bandwidth_gb_per_s=1.0)
    table = latency.analytic(board)
    for op in (Op("conv", 64, 64, 32, 32, 3), Op("act", 64, 64, 32, 32)):
        expected = max(op.macs * 1e-6, op.bytes() * 1e-6)  # ms at 1 GMAC/s and 1 GB/s
        assert table.columns(op)[SOURCES.index("analytic")] == pytest.approx(expected)
    assert table.estimate([Op("conv", 3, 8, 8, 8)], "any").source == "analytic"


def test_a_relative_lends_overheads_and_scaled_rates():
    orin, tx2 = devices.load("jetson"), devices.load("jetson-tx2")
    known, lent = latency.table(tx2), latency.table(orin)
    assert lent.terms["conv"].overhead_ms == known.terms["conv"].overhead_ms
    ratio = tx2.peak_gmacs_per_s["fp32"] / orin.peak_gmacs_per_s["fp16"]
    assert lent.terms["conv"].ms_per_gmac == pytest.approx(known.terms["conv"].ms_per_gmac * ratio)
    estimate = lent.estimate(networks(1)[0], "nasbench201")
    assert estimate.source == "analytic" and estimate.shares == {"analytic": pytest.approx(1)}
    assert "never measured" in lent.origin


def test_a_loan_between_runtimes_or_without_rates_is_refused():
    rated = {"peak_gmacs_per_s": {"fp32": 1.0}, "bandwidth_gb_per_s": 1.0}
    with pytest.raises(NasctlError, match="lent within one runtime only"):
        latency.analytic(bare(relative="jetson-tx2", **rated))
    with pytest.raises(NasctlError, match="no peak and bandwidth to scale board to board"):
        latency.rate_ratios(bare(**rated), bare())


@pytest.mark.parametrize("name", devices.names())
def test_every_shipped_device_has_a_table_or_says_why_not(name):
    device = devices.load(name)
    if device.local:
        with pytest.raises(NasctlError, match="before it is measured"):
            latency.table(device)
        return
    table = latency.table(device)
    assert (table.device, table.runtime, table.precision) == (
        device.name,
        device.runtime,
        device.precision,
    )
    estimate = table.estimate(networks(1)[0], "never heard of")
    assert 0 < estimate.low_ms < estimate.value_ms < estimate.high_ms
    if table.fitted_on:
        assert table.licence and table.includes and "HW-NAS-Bench" in table.origin
        assert table.intervals["same"].coverage > 0.85
    else:
        assert table.origin.startswith("analytic") and estimate.source == "analytic"


def test_own_table_wins_and_a_wrong_one_is_refused(tmp_path, monkeypatch, fitted):
    monkeypatch.setenv(devices.ENV, str(tmp_path))
    raspi4 = devices.load("raspi4")
    path = tmp_path / "raspi4.table.json"
    own = fitted.model_copy(update={"device": "raspi4", "runtime": "tflite"})
    own.save(path)
    assert latency.table(raspi4).origin == "synthetic"
    for wrong in ({"device": "board"}, {"runtime": "onnxruntime"}, {"batch": 8}):
        own.model_copy(update=wrong).save(path)
        with pytest.raises(NasctlError, match="is for .*, not for raspi4 tflite fp32, batch 1"):
            latency.table(raspi4)


@pytest.mark.skipif(
    not (DATA / "hwnasbench").is_dir(), reason="NASCTL_DATA has no hwnasbench tables"
)
def test_real_jetson_tx2_within_the_error_that_the_table_states():
    import pyarrow.parquet as parquet

    from benchmarks import networks as families

    rows = parquet.read_table(DATA / "hwnasbench/nb201_hw.parquet").to_pydict()
    whole = [
        at
        for at, arch in enumerate(rows["arch_str"])
        if families.nb201_live(arch) == families.nb201_edges(arch)
    ]
    table = latency.table(devices.load("jetson-tx2"))
    estimates, ratios = [], []
    for at in whole[::40]:
        ops = families.nb201_ops(rows["arch_str"][at], classes=100)
        estimates.append(table.estimate(ops, "nasbench201"))
        ratios.append(rows["cifar100_edgegpu_latency_ms"][at] / estimates[-1].value_ms)
    assert np.mean(np.abs(1 / np.array(ratios) - 1)) < 0.09
    assert {estimate.source for estimate in estimates} == {"calibrated"}
    same = table.intervals["same"]
    inside = np.mean([same.low <= ratio <= same.high for ratio in ratios])
    assert inside == pytest.approx(0.9, abs=0.06)
