"""hw_profiles.protocol: what a session says beside its timings. (The timings: test_measure.py.)"""

from __future__ import annotations

import math
import os
import random
import statistics
import threading

import numpy as np
import pytest

from hw_profiles.clocks import Clocks
from hw_profiles.measure import require_quiet
from hw_profiles.protocol import Instruments, Plan, noise, pinned, session
from nas.errors import NasctlError


class Time:
    """A clock that only calls move, and clocks that are read from a list."""

    def __init__(self, readings=()):
        self.now = 0.0
        self.readings = iter(readings)
        self.spent = []

    def takes(self, milliseconds):
        def call():
            cost = milliseconds() if callable(milliseconds) else milliseconds
            self.spent.append(cost)
            self.now += cost / 1e3

        return call

    def session(self, calls, reference=1.0, plan=Plan()):
        return session(
            calls,
            rng=random.Random(0),
            plan=plan,
            reference=self.takes(reference),
            instruments=Instruments(lambda: self.now, lambda: next(self.readings, Clocks())),
        )


def test_percentiles_are_numpys_over_single_calls_after_warm_up():
    time, draw = Time(), random.Random(1)
    plan = Plan(inner=1, rounds=40, max_rounds=40, per_round=statistics.median)
    result = time.session([time.takes(lambda: draw.lognormvariate(0, 0.5))], plan=plan)
    (timing,), (rounds,) = result.timings, result.rounds_ms
    expected = np.percentile(rounds, [50, 90, 95, 99])
    found = [timing.median_ms, timing.p90_ms, timing.p95_ms, timing.p99_ms]
    assert found == pytest.approx(expected.tolist())
    assert timing.spread_ms == pytest.approx(np.subtract(*np.percentile(rounds, [75, 25])))
    assert timing.n == len(rounds) == 40
    assert set(np.round(rounds, 6)) <= set(np.round(time.spent, 6))


def test_the_noise_floor_is_the_spread_of_the_references_quiet_rounds():
    time = Time()
    result = time.session([time.takes(2.0)], reference=lambda: 1 + time.now / 20)  # ever slower
    assert len(result.reference_ms) == 20
    assert result.reference_ms == sorted(result.reference_ms)
    middle = statistics.median(result.reference_ms)
    off = statistics.median(abs(one - middle) for one in result.reference_ms)
    assert 0 < result.noise == pytest.approx(1.4826 * off / middle)


@pytest.mark.parametrize("seed", range(3))
def test_noise_estimates_a_relative_standard_deviation(seed):
    paces = 7.0 * np.random.default_rng(seed).normal(1, 0.02, 2000)
    assert noise(paces.tolist()) == pytest.approx(0.02, rel=0.1)
    assert noise((2 * paces).tolist()) == pytest.approx(noise(paces.tolist()))


def test_one_disturbed_block_does_not_raise_the_noise_floor_and_one_block_has_none():
    calm = [1.00, 1.01, 0.99, 1.00, 1.01]
    assert noise([*calm, 5.0]) < 0.03
    assert noise([1.0]) == noise([]) == math.inf


def test_a_machine_noisier_than_the_target_is_refused_with_the_figures():
    require_quiet(0.019, 0.02)
    with pytest.raises(NasctlError, match=r"4\.1% only, 2\.1% above the 2\.0%"):
        require_quiet(0.041, 0.02)
    for unknown in (math.inf, math.nan):
        with pytest.raises(NasctlError):
            require_quiet(unknown, 0.02)


@pytest.mark.parametrize(
    ("readings", "said"),
    [
        ([Clocks(cpu_mhz=2400.0), Clocks(cpu_mhz=1800.0)], "processor's clock moved between 1800"),
        ([Clocks(gpu_mhz=1300.0), Clocks(gpu_mhz=900.0)], "GPU's clock moved between 900 and 1300"),
        ([Clocks(throttled=""), Clocks(throttled="power cap")], "held down: power cap"),
        ([Clocks(throttle_count=3), Clocks(throttle_count=5)], "throttled 2 times"),
        ([Clocks(cpu_mhz=2400.0, throttled="", throttle_count=3), Clocks(cpu_mhz=2350.0)], ""),
        ([], ""),
    ],
)
def test_clocks_that_move_put_every_timing_in_doubt(readings, said):
    time = Time(readings)
    result = time.session([time.takes(1.0), time.takes(2.0)])
    assert result.clocks[: len(readings)] == readings
    assert all((said in one.noisy) if said else one.noisy == "" for one in result.timings)


def test_clocks_are_read_after_warm_up_every_ten_rounds_and_at_the_end():
    time = Time()
    result = time.session([time.takes(1.0)])
    assert len(result.reference_ms) == 20
    assert len(result.clocks) == 1 + 2 + 1


def test_pinning_holds_inside_for_new_threads_too_and_is_undone():
    before = os.sched_getaffinity(0)
    core = max(before)
    seen = []
    with pytest.raises(ZeroDivisionError), pinned([core]):
        thread = threading.Thread(target=lambda: seen.append(os.sched_getaffinity(0)))
        thread.start()
        thread.join()
        assert os.sched_getaffinity(0) == seen[0] == {core}
        raise ZeroDivisionError
    with pinned([]):
        assert os.sched_getaffinity(0) == before
    assert os.sched_getaffinity(0) == before


def test_a_core_that_is_not_ours_is_refused():
    with pytest.raises(NasctlError, match="may not use core 4096; allowed: "), pinned([4096]):
        raise AssertionError("not reached")


def test_a_plan_survives_json_and_an_unnamed_function_does_not():
    plan = Plan(rounds=7, per_round=statistics.median, time_limit_s=1.5)
    assert Plan.from_json(plan.to_json()) == plan
    with pytest.raises(NasctlError, match="allowed: min, median"):
        Plan(per_round=max).to_json()
