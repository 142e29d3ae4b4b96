"""hw_profiles.clocks on made-up /sys trees of the platforms it knows."""

from __future__ import annotations

import os

import pytest

from hw_profiles import clocks
from hw_profiles.clocks import Clocks


@pytest.fixture
def board(tmp_path):
    """`board(path=text)` writes files below a root folder of its own, and returns the root."""

    def write(files):
        for path, text in files.items():
            (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / path).write_text(text)
        return tmp_path

    return write


CORE = f"sys/devices/system/cpu/cpu{min(os.sched_getaffinity(0))}"


def test_a_machine_that_tells_nothing_is_unknown_everywhere(board):
    reading = clocks.read(board({}))
    assert reading == Clocks()
    assert str(reading) == "cpu ? MHz, gpu ? MHz, ? C, mode ?, throttled ?"


def test_a_processor_with_cpufreq_and_throttle_counters(board):
    root = board(
        {
            f"{CORE}/cpufreq/scaling_cur_freq": "2419200\n",
            f"{CORE}/cpufreq/scaling_governor": "performance\n",
            f"{CORE}/thermal_throttle/core_throttle_count": "3\n",
            f"{CORE}/thermal_throttle/package_throttle_count": "4\n",
            "sys/class/thermal/thermal_zone0/temp": "41000\n",
            "sys/class/thermal/thermal_zone1/temp": "56500\n",
            "sys/class/thermal/thermal_zone2/temp": "-256000\n",  # a sensor that is off
        }
    )
    assert clocks.read(root) == Clocks(
        cpu_mhz=2419.2, temperature_c=56.5, throttle_count=7, mode="governor performance"
    )


@pytest.mark.parametrize("name", ["17000000.ga10b", "17000000.gpu", "57000000.gpu"])
def test_a_jetson(board, name):
    root = board(
        {
            f"sys/class/devfreq/{name}/cur_freq": "624750000\n",
            "sys/class/devfreq/31b0000.emc/cur_freq": "2133000000\n",
            "var/lib/nvpmodel/status": "pmode:0002\n",
        }
    )
    reading = clocks.read(root)
    assert (reading.gpu_mhz, reading.mode) == (624.75, "nvpmodel pmode:0002")


@pytest.mark.parametrize(
    ("word", "said"),
    [("0\n", ""), ("50000\n", ""), ("50005\n", "under-voltage, throttled"), ("garbage", None)],
)
def test_a_raspberry_pi_says_what_holds_it_down_now(board, word, said):
    root = board({"sys/devices/platform/soc/soc:firmware/get_throttled": word})
    assert clocks.read(root).throttled == said


@pytest.mark.parametrize(
    ("line", "gpu_mhz", "temperature_c", "throttled"),
    [
        ("1980, 41, 0x0000000000000000", 1980.0, 41.0, ""),
        ("345, 33, 0x0000000000000001", 345.0, 33.0, ""),  # idle is not throttled
        ("1200, 88, 0x0000000000000024", 1200.0, 88.0, "power cap, software thermal slowdown"),
        ("[N/A], 41, [N/A]", None, 41.0, None),
        ("No devices were found", None, None, None),
        (None, None, None, None),
    ],
)
def test_an_nvidia_card(board, line, gpu_mhz, temperature_c, throttled):
    reading = clocks.read_nvidia(board({}), query=lambda: line)
    assert (reading.gpu_mhz, reading.temperature_c) == (gpu_mhz, temperature_c)
    assert reading.throttled == throttled


def test_a_jetsons_own_files_count_where_nvidia_smi_knows_nothing(board):
    root = board({"sys/class/devfreq/17000000.gpu/cur_freq": "624750000\n"})
    assert clocks.read_nvidia(root, query=lambda: "[N/A], [N/A], [N/A]").gpu_mhz == 624.75


def test_without_a_driver_there_is_no_card(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert clocks.nvidia_smi() is None
    tool = tmp_path / "nvidia-smi"
    tool.write_text("#!/bin/sh\necho '1980, 41, 0x0'\n")
    tool.chmod(0o755)
    assert clocks.nvidia_smi() == "1980, 41, 0x0"
    tool.write_text("#!/bin/sh\necho 'no driver' >&2\nexit 9\n")
    assert clocks.nvidia_smi() is None
