"""hw_profiles.profile: measured networks survive anything; a table comes with its errors."""

import math

import numpy as np
import pytest

from hw_profiles import chains, profile
from hw_profiles.device import Device
from hw_profiles.measure import GROUP
from hw_profiles.profile import Group, Plan, Timings, digest
from hw_profiles.protocol import Timing
from nas.errors import NasctlError

DEVICE = Device(
    name="toy", summary="", kind="cpu", runtime="onnxruntime", precision="fp32", sources=("test",)
)
HEADER = {"device": "toy", "runtime": "onnxruntime", "batch": 1}
NETWORKS = chains.sample(np.random.default_rng(0), 3 * GROUP + 10)


def cost(ops):
    return 0.05 + sum(2e-3 + op.macs * 4e-8 + op.bytes() * 2e-8 for op in ops)


class Machine:
    """Measures by formula and remembers what it was asked for."""

    def __init__(self, *, dies_after=None, noisy=(), noise=0.005, value=cost):
        self.asked, self.dies_after, self.noisy = [], dies_after, set(noisy)
        self.noise, self.value, self.rng = noise, value, np.random.default_rng(0)

    def __call__(self, networks):
        if self.dies_after is not None and len(self.asked) >= self.dies_after:
            raise KeyboardInterrupt
        self.asked += networks
        timings = [
            Timing(ms := self.value(ops), 0, ms, ms, ms, 12, "busy" if ops in self.noisy else "")
            for ops in map(tuple, networks)
        ]
        return Group(timings, (0.1 * self.rng.normal(1, self.noise, 12)).tolist())


def test_a_profile_that_was_killed_measures_nothing_twice(tmp_path):
    path = tmp_path / "t.jsonl"
    first = Machine(dies_after=GROUP)
    with pytest.raises(KeyboardInterrupt):
        Timings(path, HEADER).measure(NETWORKS, first)
    second = Machine()
    again = Timings(path, HEADER)
    again.measure(NETWORKS, second)
    assert len(first.asked) == GROUP
    assert len(second.asked) == len(NETWORKS) - GROUP
    assert not set(map(digest, first.asked)) & set(map(digest, second.asked))
    assert [ms for _, ms in again.samples(NETWORKS)] == pytest.approx(list(map(cost, NETWORKS)))


def test_a_file_cut_at_any_byte_loses_at_most_the_last_group(tmp_path):
    path = tmp_path / "t.jsonl"
    Timings(path, HEADER).measure(NETWORKS[:50], Machine())  # three processes: 17, 17 and 16
    whole = path.read_bytes()
    ends = [at + 1 for at, byte in enumerate(whole) if byte == ord("\n")]
    assert len(ends) == 4
    for cut in range(ends[0], len(whole), 97):
        path.write_bytes(whole[:cut])
        found = Timings(path, HEADER)
        assert len(found.found) == 17 * sum(end <= cut for end in ends[1:])
        assert path.read_bytes() == whole[: max(end for end in ends if end <= cut)]


def test_timings_of_another_profile_are_refused(tmp_path):
    path = tmp_path / "t.jsonl"
    Timings(path, HEADER)
    with pytest.raises(NasctlError, match="batch 1 there, 8 here"):
        Timings(path, {**HEADER, "batch": 8})


@pytest.mark.parametrize("damage", [b"nonsense\n", b'{"header": 1}\n', b'{"a": 1}\n'])
def test_a_damaged_file_is_one_clear_line(tmp_path, damage):
    path = tmp_path / "t.jsonl"
    path.write_bytes(damage)
    with pytest.raises(NasctlError, match="damaged file of timings|another profile"):
        Timings(path, HEADER)


@pytest.mark.parametrize("value", [math.nan, -1.0, 0.0, math.inf])
def test_impossible_timings_are_refused_and_not_kept(tmp_path, value):
    path = tmp_path / "t.jsonl"
    with pytest.raises(NasctlError, match="measured"):
        Timings(path, HEADER).measure(NETWORKS[:3], Machine(value=lambda ops: value))
    assert Timings(path, HEADER).found == {}


def test_a_doubtful_timing_is_measured_again_after_the_new_ones_and_never_fitted(tmp_path):
    timings = Timings(tmp_path / "t.jsonl", HEADER)
    busy = [tuple(NETWORKS[1]), tuple(NETWORKS[3])]
    timings.measure(NETWORKS[:5], Machine(noisy=busy))
    assert [ops for ops, _ in timings.samples(NETWORKS)] == [NETWORKS[at] for at in (0, 2, 4)]
    assert timings.missing(NETWORKS[:6]) == [NETWORKS[5], NETWORKS[1], NETWORKS[3]]
    timings.measure(NETWORKS[:6], Machine())
    assert timings.missing(NETWORKS[:6]) == []


def test_it_stops_between_groups_when_there_is_no_time_left(tmp_path):
    machine = Machine()
    timings = Timings(tmp_path / "t.jsonl", HEADER)
    timings.measure(NETWORKS, machine, enough=lambda: len(machine.asked) > 0)
    assert len(machine.asked) == GROUP


def test_any_prefix_of_the_order_has_its_share_of_every_set():
    plan = Plan("s", NETWORKS[:40], NETWORKS[40:80], NETWORKS[80:100])
    half = plan.order()[:50]
    counts = [sum(ops in half for ops in part) for part in (plan.mine, plan.chains, plan.held_out)]
    assert counts == [20, 20, 10]


def profiled(tmp_path, machine):
    plan = Plan("", [], NETWORKS[20:], NETWORKS[:20])
    timings = Timings(tmp_path / "t.jsonl", HEADER)
    timings.measure(plan.order(), machine)
    return profile.table(timings, plan, DEVICE, {"created": "today"})


def test_the_errors_are_those_on_networks_that_were_held_out(tmp_path):
    table, errors = profiled(tmp_path, Machine())
    assert errors.n == 20
    assert errors.mape < 3
    assert errors.within_10 == 100
    assert table.provenance["held_out_mape"] == errors.mape
    assert table.provenance["created"] == "today"
    assert table.provenance["noise"] < 0.02
    # and on networks that behave otherwise they are large: the figure is no formality
    held_out = {tuple(ops) for ops in NETWORKS[:20]}
    other = Machine(value=lambda ops: cost(ops) * (1.5 if ops in held_out else 1))
    _, errors = profiled(tmp_path / "other", other)
    assert errors.mape == pytest.approx(100 / 3, abs=2)
    assert errors.within_10 == 0


def test_no_table_from_a_machine_that_does_not_repeat_itself(tmp_path):
    with pytest.raises(NasctlError, match=r"repeats itself to .* above the 3.0%"):
        profiled(tmp_path, Machine(noise=0.2))


def test_no_table_from_doubtful_timings(tmp_path):
    noisy = [tuple(ops) for ops in NETWORKS[5:]]
    with pytest.raises(NasctlError, match=r"networks were measured beyond doubt, \d+ others"):
        profiled(tmp_path, Machine(noisy=noisy))
