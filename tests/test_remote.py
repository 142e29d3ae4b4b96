"""Measuring over ssh for real: an sshd on loopback plays the board."""

from __future__ import annotations

import math
import os
import signal
import subprocess
from dataclasses import replace

import psutil
import pytest

from hw_profiles import remote, runner, ssh
from hw_profiles.bundle import Bundle
from hw_profiles.graph import onnx_graph
from hw_profiles.measure import reference_model
from hw_profiles.op import Tape
from hw_profiles.protocol import Plan
from hw_profiles.remote import measure_models
from nas.errors import NasctlError
from tests import sshd

QUICK = Plan(rounds=4, max_rounds=4)
#: every group takes as long as it may: half a second
LONG = Plan(rounds=10**6, max_rounds=10**6, inner=1, time_limit_s=1.0)


@pytest.fixture(scope="module")
def board(tmp_path_factory):
    with sshd.board(tmp_path_factory.mktemp("sshd")) as board:
        yield board


@pytest.fixture(autouse=True)
def nothing_left(board):
    yield
    assert board.found == []


def network(channels):
    tape = Tape(channels, 16)
    tape.conv(tape.input, channels, kernel=3)
    return onnx_graph(tape.ops).SerializeToString()


def bundle(plan=QUICK, group=24, **models):
    models = models or {"small": network(4), "big": network(96)}
    return Bundle(models, reference_model(), plan, group=group)


def ssh_clients():
    return [child for child in psutil.Process().children() if child.name() == "ssh"]


def records_on(board):
    (folder,) = board.found
    return runner.from_lines((folder / runner.RESULTS).read_bytes())


def measured(records):
    return [name for one in records if one["kind"] == "group" for name in one["names"]]


def remove_folder(board):
    (folder,) = board.found
    subprocess.run(["rm", "-rf", folder], check=True)


def test_models_are_measured_and_nothing_is_left(board, tmp_path):
    shares = []
    models = {"small": network(4), "a 'b' \"c\"; $(touch x) ü": network(96)}
    result = measure_models(
        board.target,
        Bundle(models, reference_model(), QUICK, cores=(max(os.sched_getaffinity(0)),)),
        workdir=tmp_path,
        progress=shares.append,
    )
    small, big = (result.timings[name] for name in models)
    assert big.median_ms > small.median_ms > 0  # 140 times the MACs
    assert big.median_ms <= big.p90_ms <= big.p95_ms <= big.p99_ms
    assert [len(result.rounds_ms[name]) for name in models] == [4, 4]
    assert 0 <= result.noise < math.inf
    assert str(result.fingerprint["runtime"]).startswith("onnxruntime 1.")
    assert result.fingerprint["memory_mb"] > 0
    assert shares == sorted(shares)
    assert shares[-1] == 1.0
    assert result.left == ""
    assert list(tmp_path.iterdir()) == []


def test_an_unknown_host_key_is_refused(board, tmp_path):
    with pytest.raises(NasctlError, match="host key is unknown. Log in once by hand"):
        measure_models(board.with_known_hosts(""), bundle(), workdir=tmp_path)
    assert (board.folder / "other_hosts").read_text() == ""  # and not accepted on the way


def test_another_host_key_than_the_known_one_is_refused(board, tmp_path):
    known = f"[127.0.0.1]:{board.target.port} {sshd.keygen(tmp_path / 'other')}\n"
    with pytest.raises(NasctlError, match="another machine answers.*ssh-keygen -R"):
        measure_models(board.with_known_hosts(known), bundle(), workdir=tmp_path / "work")


def test_a_key_that_the_board_does_not_know_is_refused(board, tmp_path):
    sshd.keygen(tmp_path / "stranger")
    target = board.with_options(f"IdentityFile {tmp_path}/stranger")
    target.config.write_text(target.config.read_text().replace(f"{board.folder}/user_key", "none"))
    with pytest.raises(NasctlError, match="refused to let us in"):
        measure_models(target, bundle(), workdir=tmp_path / "work")


def test_nobody_listens(board, tmp_path):
    target = replace(board.target, port=sshd.free_port())
    with pytest.raises(ssh.Unreachable, match="no connection .*refused.*switched on"):
        measure_models(target, bundle(), workdir=tmp_path)


def test_a_connection_that_breaks_is_made_again(board, tmp_path, monkeypatch):
    monkeypatch.setattr(remote, "RETRY_S", (0.05,))
    killed = []

    def kill_once(share):
        if share > 0 and not killed:
            killed.extend(ssh_clients())
            killed[0].kill()

    result = measure_models(
        board.target,
        bundle(LONG, group=1),
        workdir=tmp_path,
        progress=kill_once,
        keep=True,
    )
    records = records_on(board)
    assert len(killed) == 1
    assert sorted(measured(records)) == ["big", "small"] == sorted(result.timings)
    assert [one["kind"] for one in records] == ["session", "group", "group", "done"]
    assert result.left == str(board.found[0])
    remove_folder(board)


def test_a_runner_that_is_killed_is_reported_and_its_finished_group_kept(board, tmp_path):
    def kill_runner(share):
        if 0 < share < 1:
            (folder,) = board.found
            os.kill(int((folder / runner.LOCK).read_text()), signal.SIGKILL)

    with pytest.raises(NasctlError, match=r"crashed with 1 of 2 .* said: measuring group . of 2"):
        measure_models(board.target, bundle(LONG, group=1), workdir=tmp_path, progress=kill_runner)
    assert board.found == []
    result = measure_models(board.target, bundle(LONG, group=1), workdir=tmp_path, keep=True)
    records = records_on(board)
    assert sorted(measured(records)) == ["big", "small"] == sorted(result.timings)
    assert [one["kind"] for one in records] == ["session", "group", "session", "group", "done"]
    remove_folder(board)
