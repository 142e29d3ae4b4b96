"""Measuring over ssh for real: an sshd on loopback plays the board."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from dataclasses import replace

import psutil
import pytest
import sshd

from hw_profiles.graph import onnx_graph
from hw_profiles.measure import reference_model
from hw_profiles.op import Tape
from hw_profiles.protocol import Plan
from hw_profiles.remote import over_ssh, place, runner, ssh
from hw_profiles.remote.over_ssh import measure_models
from hw_profiles.remote.parcel import Parcel
from nas.errors import NasctlError

pytestmark = pytest.mark.usefixtures("nothing_left")

QUICK = Plan(rounds=4, max_rounds=4)
#: every group of `three` takes as long as it may: half a second
LONG = Plan(rounds=10**6, max_rounds=10**6, inner=1, time_limit_s=1.5)


def network(channels):
    tape = Tape(channels, 16)
    tape.conv(tape.input, channels, kernel=3)
    return onnx_graph(tape.ops).SerializeToString()


def parcel(plan=QUICK, **models):
    return Parcel(models or {"small": network(4)}, reference_model(), plan)


def three():
    """Three groups of one model each."""
    return Parcel({name: network(4) for name in "abc"}, reference_model(), LONG, group=1)


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
        Parcel(models, reference_model(), QUICK, cores=(max(os.sched_getaffinity(0)),)),
        workdir=tmp_path,
        progress=shares.append,
    )
    small, big = (result.timings[name] for name in models)
    assert big.median_ms > small.median_ms > 0  # 140 times the MACs
    assert big.median_ms <= big.p90_ms <= big.p95_ms <= big.p99_ms
    assert [len(result.rounds_ms[name]) for name in models] == [4, 4]
    assert result.reference_ms
    assert min(result.reference_ms) > 0
    assert str(result.fingerprint["runtime"]).startswith("onnxruntime 1.")
    assert result.fingerprint["memory_mb"] > 0
    assert shares == sorted(shares)
    assert shares[-1] == 1.0
    assert result.left == ""
    assert list(tmp_path.iterdir()) == []


def test_an_unknown_host_key_is_refused(board, tmp_path):
    with pytest.raises(NasctlError, match="host key is unknown. Log in once by hand"):
        measure_models(board.with_known_hosts(""), parcel(), workdir=tmp_path)
    assert (board.folder / "other_hosts").read_text() == ""  # and not accepted on the way


def test_another_host_key_than_the_known_one_is_refused(board, tmp_path):
    known = f"[127.0.0.1]:{board.target.port} {sshd.keygen(tmp_path / 'other')}\n"
    with pytest.raises(NasctlError, match="another machine answers.*ssh-keygen -R"):
        measure_models(board.with_known_hosts(known), parcel(), workdir=tmp_path / "work")


def test_a_key_that_the_board_does_not_know_is_refused(board, tmp_path):
    sshd.keygen(tmp_path / "stranger")
    target = board.with_options(f"IdentityFile {tmp_path}/stranger")
    target.config.write_text(target.config.read_text().replace(f"{board.folder}/user_key", "none"))
    with pytest.raises(NasctlError, match="refused to let us in"):
        measure_models(target, parcel(), workdir=tmp_path / "work")


def test_nobody_listens(board, tmp_path):
    target = replace(board.target, port=sshd.free_port())
    with pytest.raises(ssh.Unreachable, match="no connection .*refused.*switched on"):
        measure_models(target, parcel(), workdir=tmp_path)


def test_a_connection_that_breaks_is_made_again(board, tmp_path, monkeypatch):
    monkeypatch.setattr(over_ssh, "RETRY_S", (0.05,))
    killed = []

    def kill_once(share):
        if share > 0 and not killed:
            killed.extend(ssh_clients())
            killed[0].kill()

    result = measure_models(
        board.target,
        three(),
        workdir=tmp_path,
        progress=kill_once,
        keep=True,
    )
    records = records_on(board)
    assert len(killed) == 1
    assert sorted(measured(records)) == ["a", "b", "c"] == sorted(result.timings)
    assert [one["kind"] for one in records] == ["session", "group", "group", "group", "done"]
    assert result.left == str(board.found[0])
    remove_folder(board)


def test_a_runner_that_is_killed_is_reported_and_its_finished_group_kept(board, tmp_path):
    def kill_runner(share):
        if 0 < share < 1:
            (folder,) = board.found
            os.killpg(int((folder / runner.LOCK).read_text()), signal.SIGKILL)

    with pytest.raises(
        NasctlError, match=r"crashed with [12] of 3 .* said: measuring group . of 3"
    ):
        measure_models(board.target, three(), workdir=tmp_path, progress=kill_runner)
    assert board.found == []
    result = measure_models(board.target, three(), workdir=tmp_path, keep=True)
    records = records_on(board)
    assert sorted(measured(records)) == ["a", "b", "c"] == sorted(result.timings)
    # the kept ones come first, with what they were measured in
    order = [one["kind"] for one in records]
    assert order.count("session") == 2 and order[:2] == ["session", "group"]
    remove_folder(board)


@pytest.mark.slow
def test_a_board_that_stays_away_goes_on_and_is_asked_again_later(board, tmp_path, monkeypatch):
    monkeypatch.setattr(over_ssh, "RETRY_S", ())

    def kill(share):
        for client in ssh_clients() if share > 0 else []:
            client.kill()

    with pytest.raises(ssh.Unreachable, match="goes on measuring.*Run the same command again"):
        measure_models(board.target, three(), workdir=tmp_path, progress=kill)
    assert len(board.found) == 1
    result = measure_models(board.target, three(), workdir=tmp_path, keep=True)
    records = records_on(board)
    assert sorted(measured(records)) == ["a", "b", "c"] == sorted(result.timings)
    assert len([one for one in records if one["kind"] == "session"]) == 1  # it never stopped
    remove_folder(board)


@pytest.mark.slow
def test_a_lost_folder_is_made_anew_with_the_results_so_far(board, tmp_path, monkeypatch):
    monkeypatch.setattr(over_ssh, "RETRY_S", ())

    def power_cut(share):
        if share > 0:
            (folder,) = board.found
            os.killpg(int((folder / runner.LOCK).read_text()), signal.SIGKILL)
            remove_folder(board)
            for client in ssh_clients():
                client.kill()

    with pytest.raises(ssh.Unreachable):
        measure_models(board.target, three(), workdir=tmp_path, progress=power_cut)
    measure_models(board.target, three(), workdir=tmp_path, keep=True)
    assert sorted(measured(records_on(board))) == ["a", "b", "c"]
    remove_folder(board)


@pytest.mark.slow
def test_a_damaged_line_is_dropped_and_its_group_measured_again(board, tmp_path, monkeypatch):
    damaged = []

    def damage(share):
        if share > 0 and not damaged:
            (folder,) = board.found
            for path in (folder / runner.RESULTS, *tmp_path.glob(f"*/{runner.RESULTS}")):
                text = path.read_text()
                path.write_text(text.replace('"median_ms": 0.', '"median_ms": 1.'))
                damaged.append(text != path.read_text())

    result = measure_models(board.target, three(), workdir=tmp_path, progress=damage, keep=True)
    assert damaged == [True, True]
    assert sorted(result.timings) == ["a", "b", "c"]
    assert max(one.median_ms for one in result.timings.values()) < 1
    remove_folder(board)


@pytest.mark.slow
def test_an_interrupt_cleans_the_board(board, tmp_path):
    def interrupt(share):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        measure_models(board.target, parcel(LONG), workdir=tmp_path, progress=interrupt)
    assert board.found == []
    running = [
        " ".join(process.info["cmdline"] or []) for process in psutil.process_iter(["cmdline"])
    ]
    assert not any("hw_profiles.remote.runner" in line for line in running)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("python", "said"),
    [
        ("exit 1", "too old a .* on the board; it takes 3.8 or later"),
        (f'exec {sys.executable} -S "$@"', "ONNX Runtime is not installed"),
    ],
)
def test_a_python_that_cannot_measure_is_named(board, tmp_path, python, said):
    with pytest.raises(NasctlError, match=said):
        measure_models(board.with_python(python), parcel(), workdir=tmp_path)


@pytest.mark.slow
def test_a_board_that_greets_is_understood(board, tmp_path):
    greeting = board.with_python(f'echo Welcome; exec {sys.executable} "$@"')
    assert measure_models(greeting, parcel(), workdir=tmp_path).timings["small"].n == 4


@pytest.mark.slow
def test_a_board_without_python_is_named(board, tmp_path):
    target = replace(board.target, python="no-such-python")
    with pytest.raises(NasctlError, match="no no-such-python on the board"):
        measure_models(target, parcel(), workdir=tmp_path)


@pytest.mark.slow
def test_a_model_that_does_not_load_is_named(board, tmp_path):
    with pytest.raises(NasctlError, match="model 'bad': ONNX Runtime cannot load it"):
        measure_models(board.target, parcel(bad=b"no model"), workdir=tmp_path)


@pytest.mark.slow
def test_files_that_arrive_damaged_are_not_measured(board, tmp_path, monkeypatch):
    honest = place.Place.send

    def damaging(there, files, script, *more):
        changed = {
            name: content[:-1] + b"?" if name.startswith("models/") else content
            for name, content in files.items()
        }
        honest(there, changed, script, *more)

    monkeypatch.setattr(place.Place, "send", damaging)
    with pytest.raises(NasctlError, match="onnx is not what was sent .checksum mismatch"):
        measure_models(board.target, parcel(), workdir=tmp_path)


@pytest.fixture
def small_disk(board):
    """The board's disk with 400 kB in all."""
    mount = ["mount", "-t", "tmpfs", "-o", "size=400k", "none", str(board.disk)]
    if os.geteuid() or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("only root may mount a small disk")
    yield board.disk
    subprocess.run(["umount", "-l", str(board.disk)], check=True)


@pytest.mark.slow
def test_models_that_do_not_fit_the_boards_disk(board, small_disk, tmp_path):
    large = parcel(large=os.urandom(500_000))
    with pytest.raises(NasctlError, match="the board's disk is full. Make room"):
        measure_models(board.target, large, workdir=tmp_path)
    assert board.found == []


@pytest.mark.slow
def test_a_disk_that_fills_up_while_measuring(board, small_disk, tmp_path):
    def fill(share):
        if share < 1 and not (small_disk / "other").exists():
            with contextlib.suppress(OSError), (small_disk / "other").open("wb", 0) as other:
                while True:
                    other.write(bytes(512))

    with pytest.raises(NasctlError, match="the board's disk is full; the runner crashed with 0 of"):
        measure_models(board.target, parcel(LONG), workdir=tmp_path, progress=fill)
    assert board.found == [small_disk / "other"]
    (small_disk / "other").unlink()
