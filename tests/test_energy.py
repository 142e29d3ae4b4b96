"""hw_profiles.energy: fits, intervals, what is refused."""

from __future__ import annotations

import numpy as np
import pytest

from hw_profiles import chains, device, energy, op
from nas.errors import NasctlError


@pytest.fixture(scope="module")
def networks():
    return chains.sample(np.random.default_rng(0), 80)


@pytest.fixture(scope="module")
def board():
    return device.load("jetson-tx2")


def joules(ops, rng):
    """A device that takes 5 mJ a call, 0.1 an operator and 40 a GMAC, and repeats to 2 %."""
    return (5 + 0.1 * len(ops) + 40 * op.macs(ops) * 1e-9) * np.exp(0.02 * rng.standard_normal())


def test_what_a_device_takes_is_found(networks, board):
    rng = np.random.default_rng(1)
    samples = [(ops, joules(ops, rng)) for ops in networks]
    table = energy.fit(samples[:60], board, space="a", origin="made up", licence="")
    estimates = [table.estimate(ops, "a") for ops, _ in samples[60:]]
    off = [abs(one.value_mj / mj - 1) for one, (_, mj) in zip(estimates, samples[60:], strict=True)]
    assert np.mean(off) < 0.04
    inside = [
        one.low_mj <= mj <= one.high_mj
        for one, (_, mj) in zip(estimates, samples[60:], strict=True)
    ]
    assert np.mean(inside) > 0.7
    # another space: nobody knows, so wider
    one = table.estimate(networks[0], "b")
    assert one.high_mj / one.low_mj > estimates[0].high_mj / estimates[0].low_mj


def test_a_table_survives_its_file(networks, board, tmp_path, monkeypatch):
    samples = [(ops, joules(ops, np.random.default_rng(1))) for ops in networks]
    table = energy.fit(samples, board, space="a", origin="made up", licence="none")
    path = tmp_path / "jetson-tx2.energy.json"
    table.save(path)
    assert energy.EnergyTable.load(path) == table
    monkeypatch.setenv("NASCTL_PROFILES", str(tmp_path))
    assert energy.stored(board) == table  # the user's own wins over the shipped one
    # of another precision it says nothing, and that is an error only for who asks for it
    half = board.model_copy(update={"precision": "fp16"})
    assert energy.stored(half) is None
    with pytest.raises(NasctlError, match="jetson-tx2 in fp16"):
        energy.required(half)
    path.write_text(path.read_text()[:-40])
    with pytest.raises(NasctlError, match="unreadable energy table"):
        energy.stored(board)


def test_the_shipped_table_says_where_it_is_from(board):
    table = energy.required(board)
    assert "HW-NAS-Bench" in table.origin
    assert table.same.coverage == pytest.approx(0.9, abs=0.01)


def test_kinds_that_no_measured_network_had_are_analytic(board):
    table = energy.required(board)
    measured = op.Op("conv", 16, 16, 8, 8, 3)
    borrowed = op.Op("dwconv", 16, 16, 8, 8, 3, groups=16)
    assert table.estimate([measured], "nasbench201").source == "calibrated"
    assert table.estimate([measured, borrowed], "nasbench201").source == "analytic"


def test_no_energy_is_invented():
    with pytest.raises(NasctlError, match="jetson-tx2"):
        energy.required(device.load("raspi4"))


@pytest.mark.parametrize("wrong", [0.0, -1.0, float("nan"), float("inf")])
def test_impossible_energies(networks, board, wrong):
    samples = [(ops, 1.0) for ops in networks[:11]] + [(networks[11], wrong)]
    with pytest.raises(NasctlError, match="all positive"):
        energy.fit(samples, board, space="a", origin="", licence="")
