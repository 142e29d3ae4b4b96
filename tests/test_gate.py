"""The gate of `nasctl bench` on simulated timings: it never passes what is much slower, and hardly
ever stops what is the same."""

import numpy as np
import pytest

from cli import gate

RUNS = 2000


def simulated(slower, rng, *, offset=0.03, busy=0.0):
    """Medians of a new and an older file in each process and its doubts: the process is 5 % off
    with both, each file by `offset` of its own, and in a share `busy` of the processes other work
    slows each by some 30 %, which is said."""
    disturbed = rng.random(gate.PROCESSES) < busy
    common = 1 + 0.05 * rng.standard_normal(gate.PROCESSES)
    own = 1 + offset * rng.standard_normal((2, gate.PROCESSES))
    bursts = 1 + disturbed * rng.exponential(0.3, (2, gate.PROCESSES))
    new, old = common * own * bursts * [[1 + slower], [1]]
    return new.tolist(), old.tolist(), ["busy" if one else "" for one in disturbed]


def answers(slower, **world):
    rng = np.random.default_rng(0)
    return [gate.against(gate.slowdown(*simulated(slower, rng, **world))) for _ in range(RUNS)]


@pytest.mark.parametrize("offset", [0.01, 0.03, 0.05])
@pytest.mark.parametrize("busy", [0.0, 0.4, 0.9])
def test_a_file_is_hardly_ever_slower_than_itself(offset, busy):
    assert answers(0.0, offset=offset, busy=busy).count("missed") <= 0.01 * RUNS


@pytest.mark.parametrize("offset", [0.01, 0.03, 0.05])
@pytest.mark.parametrize("busy", [0.0, 0.4, 0.9])
def test_a_file_slower_by_30_percent_never_passes(offset, busy):
    assert "held" not in answers(0.3, offset=offset, busy=busy)


def test_a_quiet_machine_decides():
    assert answers(0.0).count("held") >= 0.98 * RUNS
    assert answers(0.3).count("missed") >= 0.98 * RUNS
    assert answers(0.0, busy=0.9).count("in doubt") >= 0.9 * RUNS


SURE, BUSY = [""] * 7, ["busy"] * 4 + [""] * 3
NEAR = [4.7, 4.8, 4.9, 4.9, 4.9, 5.1, 5.2]


@pytest.mark.parametrize(
    ("ms", "fastest", "doubts", "answer"),
    [
        (NEAR, 4.5, SURE, "held"),  # the middle one decides
        (NEAR, 4.5, BUSY, "in doubt"),
        ([4.9] * 7, 4.8, BUSY, "held"),  # other work only slows it down
        ([5.1] * 7, 4.9, SURE, "missed"),
        ([6.0] * 7, 4.9, BUSY, "in doubt"),  # as slow as that by other work, perhaps
        ([6.0] * 7, 5.1, BUSY, "missed"),
        ([4.9, *[5.1] * 6], 4.8, SURE, "in doubt"),
        ([5.1], 5.0, [""], "missed"),
        ([5.1], 5.0, ["busy"], "in doubt"),
    ],
)
def test_a_budget(ms, fastest, doubts, answer):
    assert gate.budget(gate.duration(ms, fastest, doubts), 5.0) == answer


def test_the_middle_is_in_doubt_where_half_of_the_processes_are():
    assert gate.duration([1.0] * 7, 1.0, ["busy"] * 3 + [""] * 4).noisy == ""
    assert gate.duration([1.0] * 7, 1.0, BUSY).noisy == "4 of 7 processes in doubt: busy"
