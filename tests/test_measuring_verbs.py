"""`nasctl profile` and `nasctl bench` for real: killed and continued, and on a board over ssh."""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from cli import bench
from hw_profiles.graph import onnx_graph
from hw_profiles.latency import LatencyTable
from hw_profiles.op import Tape
from hw_profiles.protocol import Timing
from nas.errors import BudgetMissed
from tests.test_boards import write_model

PROFILE = ("profile", "--space", "resnet", "--size", "8", "--budget", "90s", "--out", "profiles")
BOARD = ("--hw", "raspi4", "--runtime", "onnxruntime", "--on", "ssh://board")
TIMINGS = Path("profiles/cpu.timings.jsonl")


def groups(path):
    return [json.loads(line) for line in path.read_text().splitlines()[1:]]


@pytest.mark.slow
def test_a_profile_killed_while_measuring_goes_on_and_repeats_nothing(workdir):
    command = [sys.executable, "-m", "cli.main", *PROFILE]
    process = subprocess.Popen(command, stderr=subprocess.PIPE)
    deadline = time.monotonic() + 120
    while not (TIMINGS.exists() and groups(TIMINGS)):
        assert process.poll() is None, process.stderr.read().decode()
        assert time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    before = groups(TIMINGS)
    done = subprocess.run(command, capture_output=True, text=True)
    after = groups(TIMINGS)
    assert after[: len(before)] == before
    sure = [name for row in before for name, one in row["timings"].items() if not one["noisy"]]
    again = [name for row in after[len(before) :] for name in row["timings"]]
    assert not set(sure) & set(again)
    if done.returncode:  # the only excuse is a machine that others keep busy
        assert "beyond doubt" in done.stderr or "repeats itself" in done.stderr
        return
    table = LatencyTable.load(Path("profiles/cpu.table.json"))
    assert table.fitted_on == ("resnet",)
    assert 0 < table.provenance["held_out_mape"] < 25
    assert table.provenance["noise"] < 0.03


@pytest.mark.slow
def test_bench_over_ssh(nasctl, workdir, board, monkeypatch):
    monkeypatch.setattr("hw_profiles.remote.ssh.parse", lambda text: board.target)
    monkeypatch.setenv("XDG_CACHE_HOME", str(workdir / "cache"))
    write_model(workdir / "model.onnx")
    outcome = nasctl("bench", "model.onnx", *BOARD, "--duration", "4s", "--json")
    assert outcome.code == 0, outcome.err
    found = json.loads(outcome.out)
    assert 0 < found["median_ms"] <= found["p99_ms"]
    assert found["runtime"].startswith("onnxruntime ")
    assert board.found == []


@pytest.mark.slow
def test_profile_over_ssh(nasctl, workdir, board, monkeypatch):
    monkeypatch.setattr("hw_profiles.remote.ssh.parse", lambda text: board.target)
    outcome = nasctl(*PROFILE, *BOARD)
    timings = workdir / "profiles/raspi4.timings.jsonl"
    assert sum(len(row["timings"]) for row in groups(timings)) >= 20
    if outcome.code:
        assert "beyond doubt" in outcome.err or "repeats itself" in outcome.err
    else:
        table = LatencyTable.load(workdir / "profiles/raspi4.table.json")
        assert (table.device, table.runtime) == ("raspi4", "onnxruntime")
        assert table.provenance["on"] == "ssh://board"
    assert board.found == []


CARRIED = (
    "profile",
    "--hw",
    "jetson-tx2",
    "--space",
    "resnet",
    "--size",
    "8",
    "--on",
    "files:there",
)


def come_back(folder, noise=0.0):
    """Writes the times that another tool would have found: so much a network's file is large."""
    names = [path.stem for path in sorted(folder.glob("*.onnx"))]
    rng = np.random.default_rng(0)
    lines = ["name,median_ms"]
    for _ in range(3):
        for name in names:
            ms = 0.5 + (folder / f"{name}.onnx").stat().st_size / 1e5
            lines.append(f"{name},{ms * np.exp(noise * rng.standard_normal())}")
    (folder / "measured.csv").write_text("\n".join(lines) + "\n")


def test_a_board_that_only_files_reach(nasctl, workdir):
    first = nasctl(*CARRIED, "--budget", "1s", "--out", "profiles")
    assert first.code == 0 and "./measure.sh" in first.err
    assert len(list((workdir / "there").glob("*.onnx"))) == 61  # three times 20, and the reference
    assert not (workdir / "profiles").exists()
    come_back(workdir / "there", noise=0.003)
    second = nasctl(*CARRIED, "--budget", "1s", "--out", "profiles", "--json")
    assert second.code == 0, second.err
    table = LatencyTable.load(workdir / "profiles/jetson-tx2.table.json")
    assert table.fitted_on == ("resnet",) and table.provenance["on"] == "files:there"
    assert json.loads(second.out)["errors"]["n"] == 20


@pytest.mark.slow
def test_few_networks_and_another_devices_table(nasctl, workdir):
    command = (*CARRIED, "--from", "raspi4", "--networks", "10", "--out", "profiles")
    assert nasctl(*command).code == 0
    assert len(list((workdir / "there").glob("*.onnx"))) == 21  # ten, ten held out, the reference
    come_back(workdir / "there", noise=0.003)
    done = nasctl(*command)
    assert done.code == 0, done.err
    table = LatencyTable.load(workdir / "profiles/jetson-tx2.table.json")
    assert table.origin.startswith("few-shot, with the tables of raspi4: 10 networks of resnet")
    assert table.provenance["held_out_n"] == 10


def test_times_that_do_not_repeat_make_no_table(nasctl, workdir):
    nasctl(*CARRIED, "--budget", "1s", "--out", "profiles")
    come_back(workdir / "there", noise=0.5)
    done = nasctl(*CARRIED, "--budget", "1s", "--out", "profiles")
    assert done.code == 1 and "beyond doubt" in done.err


def test_help_takes_the_space_it_is_for(nasctl, workdir):
    done = nasctl("profile", "--hw", "jetson-tx2", "--on", "files:there", "--from", "raspi4")
    assert done.code == 2 and "--space" in done.err
    done = nasctl("profile", "--hw", "jetson-tx2", "--on", "files:")
    assert done.code == 2 and "files:FOLDER" in done.err


# ---- bench as a gate -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("new", "old", "budget", "said"),
    [
        (1.0, None, None, None),
        (1.0, None, 1.5, None),
        (1.6, None, 1.5, "took 1.6 ms, the budget is 1.5 ms"),
        (1.0, 1.2, None, None),
        (1.01, 1.0, None, None),  # no more than a file differs from itself
        (1.3, 1.0, None, "took 1.3 ms, the older file 1 ms"),
        (1.3, 1.0, 1.2, "the budget is 1.2 ms"),
    ],
)
def test_a_gate_is_closed_by_budget_and_by_a_faster_older_file(new, old, budget, said):
    def timing(ms):
        return Timing(ms, 0.01, ms, ms, ms, 9)

    older = None if old is None else timing(old)
    if said is None:
        bench._require(timing(new), older, budget, "new.onnx")
        return
    with pytest.raises(BudgetMissed, match=f"^new.onnx: .*{said}"):
        bench._require(timing(new), older, budget, "new.onnx")


@pytest.mark.slow
def test_bench_against_a_smaller_network_closes_the_gate(nasctl, workdir):
    for name, channels in (("new.onnx", 64), ("old.onnx", 8)):
        tape = Tape(3, 32)
        tape.conv(tape.conv(tape.input, channels, kernel=3), channels, kernel=3)
        (workdir / name).write_bytes(onnx_graph(tape.ops).SerializeToString())
    gate = ("bench", "new.onnx", "--against", "old.onnx", "--duration", "4s", "--json")
    outcome = nasctl(*gate)
    assert outcome.code == 4 and "the older file" in outcome.err
    found = json.loads(outcome.out)
    assert found["against"]["change"] > 0.5
    assert found["against"]["median_ms"] < found["median_ms"]
    assert nasctl("bench", "old.onnx", "--budget", "1us", "--duration", "2s").code == 4
    assert nasctl("bench", "old.onnx", "--budget", "2").code == 2
