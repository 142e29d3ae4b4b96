"""`nasctl profile` and `nasctl bench` for real: killed and continued, and on a board over ssh."""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from hw_profiles.latency import LatencyTable
from tests import sshd
from tests.test_boards import write_model

pytestmark = pytest.mark.slow
PROFILE = ("profile", "--space", "resnet", "--size", "8", "--budget", "90s", "--out", "profiles")
BOARD = ("--hw", "raspi4", "--runtime", "onnxruntime", "--on", "ssh://board")
TIMINGS = Path("profiles/cpu.timings.jsonl")


def groups(path):
    return [json.loads(line) for line in path.read_text().splitlines()[1:]]


def test_a_profile_killed_while_measuring_goes_on_and_repeats_nothing(workdir):
    command = [sys.executable, "-m", "cli.main", *PROFILE]
    process = subprocess.Popen(command, stderr=subprocess.PIPE)
    deadline = time.monotonic() + 120
    while not (TIMINGS.exists() and groups(TIMINGS)):
        assert process.poll() is None, process.stderr.read().decode()
        assert time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
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


@pytest.fixture(scope="module")
def board(tmp_path_factory):
    with sshd.board(tmp_path_factory.mktemp("sshd")) as board:
        yield board


def test_bench_over_ssh(nasctl, workdir, board, monkeypatch):
    monkeypatch.setattr("hw_profiles.ssh.parse", lambda text: board.target)
    monkeypatch.setenv("XDG_CACHE_HOME", str(workdir / "cache"))
    write_model(workdir / "model.onnx")
    outcome = nasctl("bench", "model.onnx", *BOARD, "--duration", "4s", "--json")
    assert outcome.code == 0, outcome.err
    found = json.loads(outcome.out)
    assert 0 < found["median_ms"] <= found["p99_ms"]
    assert found["runtime"].startswith("onnxruntime ")
    assert board.found == []


def test_profile_over_ssh(nasctl, workdir, board, monkeypatch):
    monkeypatch.setattr("hw_profiles.ssh.parse", lambda text: board.target)
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
