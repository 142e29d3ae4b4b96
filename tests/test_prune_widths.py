from __future__ import annotations

import math

import pytest

from compress.job import GRID, Settings
from compress.schedule import Schedule, solve
from compress.units import Unit
from compress.widths import offered, rising, rounded
from nas.errors import UsageError

# ---- the schedule of thresholds ------------------------------------------------------------------


@pytest.mark.parametrize(
    ("n", "first", "total", "factor"),
    [
        (51, 0.06, 6, 0.97739),
        (30, 0.06, 6, 1.00175),
        (31, 0.06, 6, 0.99944),
        (75, 0.06, 6, 0.97057),
    ],
)
def test_lambda_is_what_was_worked_out(n, first, total, factor):
    found = solve(first, total, n)
    assert found == pytest.approx(factor, abs=5e-6)
    product = math.prod(1 + first * found**i for i in range(n))
    assert product == pytest.approx(total, rel=1e-9)


def test_the_last_threshold_of_yolo_is_the_published_one():
    assert 0.06 * solve(0.06, 6, 51) ** 50 == pytest.approx(0.0191, abs=5e-5)


def test_the_order_flips_where_even_shares_cross_the_whole():
    for n in range(20, 41):
        ascending = Schedule({"a": 6.0}, 0.06, n).ascending
        assert ascending == (1.06**n < 6), n


def test_thresholds_multiply_to_every_tasks_own_bound():
    bounds = {"a": 6.0, "b": 1.2, "c": 1.01}
    plan = Schedule(bounds, None, 13)
    for task, bound in bounds.items():
        product = math.prod(1 + plan.thresholds(i)[task] for i in range(13))
        assert product == pytest.approx(bound, rel=1e-6)
    assert Schedule({"a": 1.5}, None, 1).thresholds(0)["a"] == pytest.approx(0.5)


def test_a_first_threshold_above_the_whole_is_refused():
    with pytest.raises(UsageError, match="20 % for the first unit.*below the 10 %"):
        Schedule({"a": 1.1}, 0.2, 5)


# ---- widths --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("each", "ratio", "divisor", "kept"),
    [
        (64, 0.25, 16, 48),
        (32, 0.25, 16, 32),
        (12, 0.5, 8, 8),
        (6, 0.5, 8, 6),
        (64, 0.95, 8, 8),
        (20, 0.05, 8, 16),
        (16, 0.3, 1, 11),
    ],
)
def test_kept_widths_are_multiples_of_the_divisor_or_whole(each, ratio, divisor, kept):
    assert rounded(each, ratio, divisor) == kept


def test_widths_of_parts_are_rounded_part_by_part():
    four = Unit("x", 64, 4, ())
    assert offered(four, Settings(divisor=8)) == (32,)
    assert offered(Unit("x", 12, 1, ()), Settings(divisor=16)) == ()
    assert len(offered(Unit("x", 64, 1, ()), Settings(divisor=1))) == len(GRID)


def test_blocks_are_kept_whole():
    assert offered(Unit("x", 48, 1, (), block=16), Settings(divisor=8)) == (32, 16)
    assert offered(Unit("x", 48, 1, (), block=12), Settings(divisor=8)) == (24,)
    assert offered(Unit("x", 96, 2, (), block=16), Settings(divisor=8)) == (64, 32)


def test_a_width_as_slow_as_a_wider_one_is_not_offered():
    widths, saved = (56, 48, 40, 32), (-0.1, 0.2, 0.15, 0.3)
    assert rising(widths, [saved]) == {48: 0.2, 32: 0.3}


def test_a_width_that_one_session_alone_thinks_faster_is_not_offered():
    sessions = [(0.5, 0.2, 0.3), (-0.01, 0.22, 0.21), (-0.02, 0.1, 0.4)]
    assert rising((48, 32, 16), sessions) == {32: 0.2, 16: 0.3}
