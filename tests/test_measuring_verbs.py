"""`nasctl profile` and `nasctl bench` for real: killed and continued, and on a board over ssh."""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from cli import bench, gate
from hw_profiles import protocol
from hw_profiles.graph import onnx_graph
from hw_profiles.latency import LatencyTable
from hw_profiles.op import Tape
from hw_profiles.protocol import Plan, Timing
from hw_profiles.remote.over_ssh import RemoteResult
from nas.errors import NasctlError
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


def gated(new, old=1.0, budget=None, doubts=0, precisions=("fp32", "fp32")):
    """The row of a file that took `new` ms where another took `old`, in so many doubtful ones of
    all processes."""

    def timing(ms, at):
        return Timing(ms, 0.01, ms, ms, ms, 9, "busy" if at < doubts else "")

    found = [
        bench.Times([timing(new, at), timing(old, at)], [[0.9 * new], [0.9 * old]], [0.1])
        for at in range(gate.PROCESSES)
    ]
    told = {"device": "cpu", "on": "local", "runtime": "ort", "timed": "a call", "energy": None}
    row = {"model": "new.onnx", **told, "median_ms": new, "precision": precisions[0]}
    row["processes"] = gate.PROCESSES
    return row | bench._gated(found, budget, Path("old.onnx"), precisions)


@pytest.mark.parametrize(
    ("asked", "code", "said"),
    [
        ({"new": 1.0}, 0, ""),
        ({"new": 1.0, "budget": 1.5}, 0, ""),
        ({"new": 1.0, "old": 1.2}, 0, ""),
        ({"new": 1.01}, 0, ""),  # no more than a file differs from itself
        ({"new": 1.3}, 4, "took 1.3 ms, the older file 1 ms: +30.0% (+30.0% to +30.0%)"),
        ({"new": 1.3, "budget": 1.2}, 4, "took 1.3 ms (1.3 ms to 1.3 ms), the budget is 1.2 ms"),
        ({"new": 1.0, "budget": 0.95, "doubts": 3}, 4, "the budget is 950 us"),
        (
            {"new": 1.0, "budget": 0.95, "doubts": 4},
            1,
            "not decided, took 1 ms (900 us to 1 ms), the budget is 950 us; 4 of 7 processes in "
            "doubt: busy. Measure again on a quiet machine, or longer (--duration).",
        ),
    ],
)
def test_a_gate_is_closed_by_what_is_missed_and_by_what_is_not_decided(asked, code, said):
    row = gated(**asked)
    if not code:
        bench._require(row)
        return
    with pytest.raises(NasctlError) as failed:
        bench._require(row)
    assert failed.value.exit_code == code
    assert str(failed.value).startswith("new.onnx: ") and said in str(failed.value)


def test_a_gate_measures_in_several_processes(nasctl, workdir, monkeypatch):
    write_model(workdir / "model.onnx")
    limits = []

    def session(models, setting, *, rng, plan, pace):
        limits.append(plan.time_limit_s)
        each = Timing(1.0, 0.01, 1.0, 1.0, 1.0, 9)
        return protocol.Session([each] * len(models), [[1.0]] * len(models), [0.1], 0.1, 1.0, [])

    monkeypatch.setattr("hw_profiles.measure.fresh_session", session)
    for words in ([], ["--against", "model.onnx"], ["--budget", "2ms"]):
        limits.clear()
        outcome = nasctl("bench", "model.onnx", "--duration", "7s", *words, "--json")
        assert outcome.code == 0 and json.loads(outcome.out)["processes"] == len(limits)
        assert limits == ([1.0] * gate.PROCESSES if words else [7.0])


def test_the_second_of_two_files_has_no_disadvantage(nasctl, workdir, monkeypatch):
    write_model(workdir / "model.onnx")

    def session(models, setting, *, rng, plan, pace):
        both = [Timing(ms, 0.01, ms, ms, ms, 9) for ms in (1.1, 1.0)]
        return protocol.Session(both, [[1.1], [1.0]], [0.1], 0.1, 1.0, [])

    monkeypatch.setattr("hw_profiles.measure.fresh_session", session)
    outcome = nasctl("bench", "model.onnx", "--against", "model.onnx")
    assert outcome.code == 1 and "+10.0% (-9.1% to +10.0%); the processes differ" in outcome.err


def test_a_gate_on_a_board_is_a_parcel_per_process(nasctl, workdir, monkeypatch):
    write_model(workdir / "model.onnx")
    seeds = []

    def on_board(content, on, setting, plan, seed, folder):
        seeds.append(seed)
        assert list(content) == (["0", "1"] if seed % 2 else ["1", "0"])
        each = {name: Timing(1.0 + int(name), 0.01, 2.0, 2.0, 2.0, 9) for name in content}
        rounds = {name: [0.9] for name in content}
        return RemoteResult(each, rounds, [0.1, 0.1], {"runtime": "onnxruntime 1"})

    monkeypatch.setattr(bench, "on_board", on_board)
    words = ("--against", "model.onnx", "--budget", "0.9ms", "--seed", "3", "--json")
    outcome = nasctl("bench", "model.onnx", *BOARD, *words)
    assert outcome.code == 4 and "the budget is 900 us" in outcome.err
    assert seeds == list(range(3, 3 + gate.PROCESSES))
    found = json.loads(outcome.out)
    assert found["against"]["change"] == -0.5 and found["against"]["answer"] == "held"
    assert found["precision"] == found["against"]["precision"] == "as the file is"


def test_files_that_compute_in_different_precisions_are_told(capsys):
    plan, timing = Plan(), Timing(1.0, 0.01, 1.0, 1.0, 1.0, 9)
    bench._say(gated(1.0, precisions=("int8", "fp32")), timing, plan, 1)
    assert "computes in int8, the older file in fp32" in capsys.readouterr().err
    bench._say(gated(1.0), timing, plan, 1)
    assert "the older file in" not in capsys.readouterr().err


@pytest.mark.slow
def test_bench_against_a_smaller_network_closes_the_gate(nasctl, workdir):
    for name, channels in (("new.onnx", 64), ("old.onnx", 8)):
        tape = Tape(3, 32)
        tape.conv(tape.conv(tape.input, channels, kernel=3), channels, kernel=3)
        (workdir / name).write_bytes(onnx_graph(tape.ops).SerializeToString())
    words = ("bench", "new.onnx", "--against", "old.onnx", "--duration", "4s", "--json")
    outcome = nasctl(*words)
    assert outcome.code == 4 and "the older file" in outcome.err
    found = json.loads(outcome.out)
    assert found["against"]["change"] > 0.5
    assert found["against"]["median_ms"] < found["median_ms"]
    assert found["processes"] == gate.PROCESSES
    assert nasctl("bench", "old.onnx", "--budget", "1us", "--duration", "2s").code == 4
    assert nasctl("bench", "old.onnx", "--budget", "2").code == 2
