"""hw_profiles.power on pretended files of the kernel, with a pretended clock."""

from __future__ import annotations

import pytest

from hw_profiles import power
from nas.errors import NasctlError


class Machine:
    """Files of the kernel, and a clock that only moves when something is done."""

    def __init__(self, root):
        self.root, self.now = root, 0.0

    def write(self, path, text):
        file = self.root / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(f"{text}\n")

    def clock(self):
        return self.now


class Rapl(Machine):
    """One or two packages whose counters advance by so many watts."""

    def __init__(self, root, start_uj=0.0, range_uj=10**12):
        super().__init__(root)
        self.uj, self.range_uj = start_uj, range_uj
        self.write("sys/class/powercap/intel-rapl:0/name", "package-0")
        self.write("sys/class/powercap/intel-rapl:0/max_energy_range_uj", range_uj)
        self.spend(0, 0)

    def spend(self, seconds, watts):
        self.now += seconds
        self.uj = (self.uj + 1e6 * watts * seconds) % self.range_uj
        self.write("sys/class/powercap/intel-rapl:0/energy_uj", round(self.uj))


@pytest.mark.parametrize("start_uj", [0.0, 29e6])  # the second one wraps around while it works
def test_rapl_counts_work_and_rest_apart(tmp_path, start_uj):
    machine = Rapl(tmp_path, start_uj, range_uj=30 * 10**6)
    found = power.sensor("cpu", tmp_path)
    energy = power.per_call(
        lambda: machine.spend(0.010, 25.0),
        found,
        seconds=1.0,
        clock=machine.clock,
        sleep=lambda seconds: machine.spend(seconds, 5.0),
    )
    assert energy.mj == pytest.approx(250.0, rel=1e-3)  # 25 W for 10 ms
    assert energy.idle_mj == pytest.approx(50.0, rel=1e-3)
    assert energy.calls == pytest.approx(100, abs=1)
    assert "RAPL" in energy.sensor


def test_watts_of_a_jetson_are_integrated(tmp_path):
    machine = Machine(tmp_path)
    chip = "sys/class/hwmon/hwmon3"
    machine.write(f"{chip}/name", "ina3221")
    machine.write(f"{chip}/in1_label", "VDD_IN")
    machine.write(f"{chip}/in1_input", 5000)

    def spend(seconds, watts):
        machine.now += seconds
        machine.write(f"{chip}/curr1_input", watts * 1000 / 5)

    spend(0, 4.0)
    found = power.sensor("cpu", tmp_path)
    assert found.name == "INA3221, VDD_IN"
    energy = power.per_call(
        lambda: spend(0.005, 12.0),
        found,
        seconds=2.0,
        clock=machine.clock,
        sleep=lambda seconds: spend(seconds, 4.0),
    )
    assert energy.mj == pytest.approx(60.0, rel=0.02)
    assert energy.idle_mj == pytest.approx(20.0, rel=0.05)


def test_a_slow_reading_is_not_taken_for_work():
    """nvidia-smi takes 50 ms; a call here 1 ms."""
    clock = [0.0]

    def spend(seconds):
        clock[0] += seconds

    working = [False]

    def read():
        spend(0.05)
        return 300.0 if working[0] else 60.0

    def call():
        working[0] = True
        spend(0.001)

    def rest(seconds):
        working[0] = False
        spend(seconds)

    found = power.Sensor("slow", read, counts=False)
    energy = power.per_call(call, found, seconds=3.0, clock=lambda: clock[0], sleep=rest)
    assert energy.mj == pytest.approx(300.0, rel=0.05)
    assert energy.idle_mj == pytest.approx(60.0, rel=0.1)


def test_a_processors_counter_says_nothing_of_a_card(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    Rapl(tmp_path)
    assert power.sensor("cpu", tmp_path) is not None
    assert power.sensor("gpu", tmp_path) is None


def test_no_sensor(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert power.sensor("cpu", tmp_path) is None


def test_a_counter_that_only_root_may_read_is_no_sensor(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    Rapl(tmp_path)
    (tmp_path / "sys/class/powercap/intel-rapl:0/energy_uj").unlink()
    assert power.sensor("cpu", tmp_path) is None


def test_a_sensor_that_stops_answering_is_an_error(tmp_path):
    machine = Rapl(tmp_path)
    found = power.sensor("cpu", tmp_path)

    def call():
        machine.now += 0.6
        (tmp_path / "sys/class/powercap/intel-rapl:0/energy_uj").unlink()

    with pytest.raises(NasctlError, match="does not answer"):
        power.per_call(
            call,
            found,
            seconds=0.6,
            clock=machine.clock,
            sleep=lambda seconds: machine.spend(seconds, 1.0),
        )
