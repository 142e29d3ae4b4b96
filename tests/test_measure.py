"""hw_profiles.measure on a clock that moves only when a measured call moves it."""

import gc
import os
import random
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import psutil
import pytest

from hw_profiles import protocol
from hw_profiles.measure import Plan, interleaved, measure_ops
from hw_profiles.op import Tape
from hw_profiles.protocol import Instruments


class Clock:
    """Seconds that pass only inside calls made with `takes`."""

    def __init__(self):
        self.now = 0.0
        self.order = []

    def __call__(self):
        return self.now

    def takes(self, name, milliseconds):
        """A call that takes so long; `milliseconds` may be a function of the time so far."""

        def call():
            self.order.append(name)
            cost = milliseconds(self.now) if callable(milliseconds) else milliseconds
            self.now += cost / 1e3

        return call


def timed(clock, calls, seed=0, plan=None, reference=1.0):
    return interleaved(
        calls,
        rng=np.random.default_rng(seed),
        plan=plan or Plan(),
        reference=clock.takes("reference", reference),
        clock=clock,
    )


def jitter(seed, low, high):
    rng = np.random.default_rng(seed)
    return lambda now: rng.uniform(low, high)


def test_durations_are_recovered_in_the_order_of_the_callables():
    clock = Clock()
    timings = timed(clock, [clock.takes("a", 3.0), clock.takes("b", 0.5), clock.takes("c", 7.0)])
    assert [t.median_ms for t in timings] == pytest.approx([3.0, 0.5, 7.0], rel=1e-6)
    assert all(t.n == 20 and t.spread_ms < 1e-6 and t.noisy == "" for t in timings)


def test_interruptions_are_in_the_p95_and_not_in_the_median():
    clock = Clock()
    rng = np.random.default_rng(0)
    interrupted = clock.takes("a", lambda now: 2.0 + 50.0 * (rng.random() < 0.15))
    (timing,) = timed(clock, [interrupted])
    assert timing.median_ms == pytest.approx(2.0)
    assert timing.p95_ms == pytest.approx(52.0)


def test_order_is_shuffled_and_the_same_for_the_same_seed():
    orders = []
    for seed in (1, 1, 2):
        clock = Clock()
        timed(clock, [clock.takes(name, 1.0) for name in "abcd"], seed=seed)
        orders.append(clock.order)
    assert orders[0] == orders[1] != orders[2]
    # a round: the reference twice, then four turns of three calls and the reference twice
    rounds = np.array(orders[0][-22 * 20 :]).reshape(20, 22)
    assert (rounds[:, [0, 1]] == "reference").all()
    turns = rounds[:, 2:].reshape(20, 4, 5)
    assert (turns[:, :, 3:] == "reference").all()
    assert all(sorted(names) == ["a", "b", "c", "d"] for names in turns[:, :, 0].tolist())
    assert len({tuple(names) for names in turns[:, :, 0].tolist()}) > 10


def test_an_unsteady_candidate_is_measured_longer_than_a_steady_one():
    clock = Clock()
    steady, unsteady = timed(
        clock, [clock.takes("a", 1.0), clock.takes("b", jitter(3, 1.0, 2.0))], plan=Plan(inner=1)
    )
    assert steady.n == 20 < unsteady.n <= 2000
    assert unsteady.median_ms == pytest.approx(1.5, rel=0.1)


def test_what_stays_uncertain_says_so():
    clock = Clock()
    plan = Plan(inner=1, precision=0.001, max_rounds=40)
    (timing,) = timed(clock, [clock.takes("a", jitter(3, 1.0, 2.0))], plan=plan)
    assert timing.n == 40
    assert "the median is known to" in timing.noisy


@pytest.mark.parametrize("quiet", [0.5, 0.2, 0.1])
def test_turns_beside_a_slow_reference_do_not_count(quiet):
    """Something else runs most of the time, in stretches, and makes everything 1.6 times slower."""
    clock, loads = Clock(), np.random.default_rng(0).random(100_000) > quiet

    def disturbed(now):
        return 1.6 if loads[int(now / 0.023)] else 1.0

    (timing,) = timed(clock, [clock.takes("a", disturbed)], reference=disturbed)
    assert timing.median_ms == pytest.approx(1.0)
    assert timing.n >= 20
    assert timing.noisy == ""
    assert clock.order.count("a") > 3 * 20 / quiet / 2  # the disturbed turns were taken too


def test_a_known_pace_unmasks_a_session_that_is_disturbed_throughout():
    clock = Clock()
    plan = Plan(time_limit_s=0.5)
    session = protocol.session(
        [clock.takes("a", 1.6)],
        rng=random.Random(0),
        plan=plan,
        reference=clock.takes("reference", 1.6),
        instruments=Instruments(clock=clock, pace_ms=1.0),
    )
    assert "only 0 quiet rounds of 20" in session.timings[0].noisy
    assert session.quiet == 0.0
    assert session.pace_ms == 1.0


def test_a_reference_that_never_settles_is_reported():
    clock = Clock()

    def ever_slower(now):
        return 1.0 + now * 5

    plan = Plan(time_limit_s=0.5)
    (timing,) = timed(clock, [clock.takes("a", 1.0)], plan=plan, reference=ever_slower)
    assert "the reference moved" in timing.noisy
    assert "quiet rounds of 20" in timing.noisy


def test_a_machine_that_stays_busy_yields_all_rounds_and_a_warning():
    clock = Clock()
    loads = {}

    def by_block(now):  # a new load every 60 ms, which is one block, never twice the same
        return loads.setdefault(int(now / 0.06), 1.0 + 0.1 * len(loads))

    plan = Plan(rounds=20, time_limit_s=0.6)
    (timing,) = timed(clock, [clock.takes("a", 1.0)], plan=plan, reference=by_block)
    assert timing.n >= 20
    assert "quiet rounds of 20" in timing.noisy
    assert timing.median_ms == pytest.approx(1.0)


def test_the_time_limit_ends_it_after_a_whole_round():
    clock = Clock()
    plan = Plan(time_limit_s=0.05)
    timings = timed(clock, [clock.takes(name, 100.0) for name in "ab"], plan=plan)
    assert [t.n for t in timings] == [1, 1]
    assert all("only 1 quiet rounds of 20" in t.noisy for t in timings)


def test_warm_up_lasts_until_calls_settle():
    clock = Clock()
    calls = iter([50.0, 40.0, 30.0, 20.0, 10.0])
    slow_start = clock.takes("a", lambda now: next(calls, 1.0))
    (timing,) = timed(clock, [slow_start])
    assert timing.median_ms == timing.p95_ms == timing.p99_ms == pytest.approx(1.0)


def test_progress_grows_to_one():
    clock, shares = Clock(), []
    interleaved(
        [clock.takes("a", 1.0), clock.takes("b", jitter(1, 1, 3))],
        rng=np.random.default_rng(0),
        reference=clock.takes("reference", 1.0),
        clock=clock,
        progress=shares.append,
    )
    assert shares == sorted(shares)
    assert len(shares) > 20
    assert shares[-1] == 1.0


def test_no_garbage_is_collected_while_timing_and_the_collector_comes_back():
    clock, states = Clock(), []
    timed(clock, [lambda: (states.append(gc.isenabled()), clock.takes("a", 1.0)())])
    assert not any(states)
    assert gc.isenabled()

    def fails():
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        timed(clock, [fails])
    assert gc.isenabled()


def test_nothing_to_measure():
    assert timed(Clock(), []) == []
    assert measure_ops([], rng=np.random.default_rng(0)) == []


def test_op_lists_are_run_for_real_and_a_far_bigger_one_takes_longer():
    networks = []
    for channels in (4, 96, 8):
        tape = Tape(channels, 16)
        tape.conv(tape.input, channels, kernel=3)
        networks.append(tape.ops)
    shares = []
    timings = measure_ops(
        networks,
        rng=np.random.default_rng(0),
        plan=Plan(rounds=4, max_rounds=4),
        progress=shares.append,
    )
    assert len(timings) == 3
    assert shares[-1] == 1.0
    # about 140 times the MACs: no machine is noisy enough to hide that
    assert timings[1].median_ms > max(timings[0].median_ms, timings[2].median_ms) > 0


ENDLESS = """
import numpy as np
from hw_profiles.measure import Plan, fresh_session
from hw_profiles.op import Tape

if __name__ == "__main__":
    tape = Tape(3, 8)
    tape.conv(tape.input, 8)
    for_ever = Plan(rounds=10**9, time_limit_s=1e9)
    fresh_session([tape.ops], rng=np.random.default_rng(0), plan=for_ever)
"""


@pytest.mark.slow
def test_a_killed_measurement_leaves_no_process(tmp_path):
    (tmp_path / "endless.py").write_text(ENDLESS)
    environment = {**os.environ, "PYTHONPATH": str(Path(protocol.__file__).parents[1])}
    parent = subprocess.Popen([sys.executable, str(tmp_path / "endless.py")], env=environment)
    try:
        started, until = psutil.Process(parent.pid), time.monotonic() + 60
        workers: list[psutil.Process] = []
        while not any(worker.cpu_times().user > 0.5 for worker in workers):
            assert parent.poll() is None and time.monotonic() < until
            time.sleep(0.2)
            workers = started.children(recursive=True)
    finally:
        parent.kill()
        parent.wait()
    gone, alive = psutil.wait_procs(workers, timeout=30)
    assert gone and not alive
