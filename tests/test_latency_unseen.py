"""What benchmarks/latency_unseen.py judges by, where the answer can be counted by hand."""

from __future__ import annotations

import numpy as np
import pytest

from benchmarks.latency_data import Family, batch_of, board_of
from benchmarks.latency_unseen import Draw, Set, additive_columns, picked, strangers, unlike
from hw_profiles.op import Op

ACCURACY = np.arange(100.0)  # slower networks are better, one point per place
TRUE = 1 + np.arange(100.0)


def test_true_latencies_lose_nothing():
    assert picked(TRUE, TRUE, ACCURACY) == (100, 0)


def test_pessimism_loses_accuracy_and_keeps_budgets():
    hit, regret = picked(2 * TRUE, TRUE, ACCURACY)
    assert hit == 100
    # half of each budget's rank is given away: 5.5, 13, 25.5, 38 and 45.5 places, whole ones
    assert regret == pytest.approx(25.5, abs=0.6)


def test_optimism_misses_budgets_and_is_repaired_without_loss():
    assert picked(0.5 * TRUE, TRUE, ACCURACY) == (0, 0)


def test_with_nothing_predicted_inside_the_fastest_looking_are_tried():
    hit, regret = picked(1000 + TRUE, TRUE, ACCURACY)
    assert hit == 100
    assert regret == pytest.approx(np.mean([9, 24, 49, 74, 89]), abs=1)


def test_settings_of_one_board():
    assert board_of("titanx_32") == board_of("titanx_1") == "titanx"
    assert [batch_of(name) for name in ("titanx_32", "gold_6226", "raspi4")] == [32, 1, 1]
    assert board_of("gold_6226") != board_of("gold_6240")
    assert strangers(("a_1", "a_32", "b"), "a_1") == ("b",)


def family(times):
    """Networks that differ in how often each of two operators is there."""
    ops = [Op("conv", 8, 8, 4, 4), Op("conv", 8, 8, 4, 4, 3)]
    counts = np.random.default_rng(0).integers(1, 9, size=(80, 2))
    networks = tuple((ops[0],) * a + (ops[1],) * b for a, b in counts)
    return Family("toy", networks, {name: make(counts) for name, make in times.items()})


def test_sums_are_told_from_measurements():
    rng = np.random.default_rng(1)
    found = family(
        {
            "sum": lambda counts: 0.1 + counts @ [1.0, 3.0],
            "noisy": lambda counts: (counts @ [1.0, 3.0]) * np.exp(0.02 * rng.standard_normal(80)),
            "fused": lambda counts: counts.max(axis=1) + 0.5 * counts[:, 0],
        }
    )
    assert additive_columns(found) == ("sum",)


def test_least_alike_halves_are_found():
    rng = np.random.default_rng(0)
    base = {kind: rng.standard_normal(200) for kind in "gc"}
    times = {
        f"{kind}pu{at}_{batch}": np.exp(base[kind] + 0.1 * rng.standard_normal(200))
        for kind in "gc"
        for at in "xyz"
        for batch in (1, 32)
    }
    data = Set(Family("toy", (), times), np.zeros((200, 1)), tuple(times), ())
    one, other, correlation = unlike(Draw(data, 0, 50))
    assert {name[0] for name in one} != {name[0] for name in other}
    assert len({name[0] for name in one}) == len({name[0] for name in other}) == 1
    assert abs(correlation) < 0.3
