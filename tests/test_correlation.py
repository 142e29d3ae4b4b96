from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from nas import correlation

RNG = np.random.default_rng(0)


@given(st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9)), min_size=3, max_size=30))
def test_spearman_is_scipys_and_zero_for_constants(pairs):
    a, b = np.array(pairs, float).T
    found = float(correlation.spearman(a, b))
    if np.ptp(a) == 0 or np.ptp(b) == 0:
        assert found == 0
    else:
        assert found == pytest.approx(stats.spearmanr(a, b).statistic, abs=1e-12)


def test_an_interval_covers_the_truth_as_often_as_it_says():
    """Of a normal pair with correlation .6, whose rank correlation is .582."""
    truth, covered = 6 / np.pi * np.arcsin(0.3), 0
    for seed in range(50):
        x, y = np.random.default_rng(seed).multivariate_normal((0, 0), [[1, 0.6], [0.6, 1]], 60).T
        found = correlation.interval(x, y)
        covered += found.low <= truth <= found.high
    assert 43 <= covered <= 50


def test_gain_is_over_the_best_of_the_others_and_paired():
    truth = RNG.normal(size=100)
    good, fair = truth + 0.5 * RNG.normal(size=100), truth + 1.0 * RNG.normal(size=100)
    noise = RNG.normal(size=100)
    more = correlation.gain(good, np.stack([fair, noise]), truth)
    assert more.low > 0
    less = correlation.gain(noise, np.stack([fair, noise]), truth)
    assert less.high < 0
    # what is in both cancels: a monotone copy has no gain, and no doubt about it
    assert correlation.gain(good**3, good[None], truth) == correlation.Interval(0, 0, 0)


def test_missing_values_are_left_out_and_few_networks_say_nothing():
    a = RNG.normal(size=20)
    b = a.copy()
    b[:5] = np.nan
    assert correlation.interval(a, b).value == 1
    b[:12] = np.inf
    for found in (correlation.interval(a, b), correlation.gain(b, a[None], a)):
        assert np.isnan([found.value, found.low, found.high]).all()
