"""The runner, in a folder as on a board, without a connection: what survives, what is refused."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from types import SimpleNamespace

import parcels
import pytest
from parcels import kinds, records_in, unpacked

from hw_profiles.fingerprint import fingerprint
from hw_profiles.remote import runner
from hw_profiles.runtimes import Session
from nas.errors import NasctlError


@pytest.fixture(scope="module")
def three():
    return parcels.three()


@pytest.fixture(scope="module")
def whole(three, tmp_path_factory):
    """The results of a whole run."""
    folder = unpacked(three, tmp_path_factory.mktemp("whole"))
    assert runner.measure(folder) == 0
    return (folder / runner.RESULTS).read_bytes()


def test_finished_groups_are_not_measured_again(three, whole, tmp_path):
    folder = unpacked(three, tmp_path)
    (folder / runner.RESULTS).write_bytes(whole)
    assert runner.measure(folder) == 0
    assert (folder / runner.RESULTS).read_bytes() == whole  # nothing to do, nothing written
    first_two = b"".join(whole.splitlines(keepends=True)[:3])
    (folder / runner.RESULTS).write_bytes(first_two)
    assert runner.measure(folder) == 0
    assert kinds(folder) == ["session", "group", "group", "session", "group", "done"]
    assert (folder / runner.RESULTS).read_bytes().startswith(first_two)


@pytest.mark.parametrize("cut", [1, 200])
def test_a_torn_last_line_costs_its_group_only(three, whole, tmp_path, cut):
    folder = unpacked(three, tmp_path)
    *before, last_group, _ = whole.splitlines(keepends=True)
    (folder / runner.RESULTS).write_bytes(b"".join(before) + last_group[:-cut])
    assert runner.measure(folder) == 0
    names = [one["names"] for one in records_in(folder) if one["kind"] == "group"]
    assert sorted(names) == [["a"], ["b"], ["c"]]


def test_every_changed_byte_of_a_line_is_noticed():
    record = {"kind": "group", "names": ["a"], "reference_ms": [0.123, 1e-7], "x": None}
    line = runner.to_line(record)
    assert runner.from_lines(line) == [record]
    for at in range(len(line) - 1):
        changed = line[:at] + bytes([line[at] ^ 1]) + line[at + 1 :]
        # JSON has spellings that mean the same: 1e-7 and 1E-7, say
        assert all(found == record for found in runner.from_lines(changed))
    assert runner.from_lines(b"\xff\n[]\n3\n\n" + line) == [record]


def test_every_group_is_measured_in_a_process_of_its_own(three, tmp_path, monkeypatch):
    folder = unpacked(three, tmp_path)
    monkeypatch.setattr(runner, "load_module", lambda name: pytest.fail("it was loaded here"))
    assert runner.measure(folder) == 0
    assert kinds(folder) == ["session", "group", "group", "group", "done"]


def test_a_model_that_does_not_load_is_named_and_the_others_kept(three, tmp_path):
    bad = json.loads(three.manifest)["groups"][2][0]["name"]
    parcel = replace(three, models={**three.models, bad: b"no model"})
    folder = unpacked(parcel, tmp_path)
    assert runner.measure(folder) == runner.REFUSED
    assert kinds(folder) == ["session", "group", "group", "failed"]
    assert records_in(folder)[-1]["why"].startswith(f"model '{bad}': ONNX Runtime cannot load it")


def test_a_runtime_with_files_of_its_own_builds_them_and_its_own_clock_counts(
    three, tmp_path, monkeypatch
):
    def build(model, path, *, threads, precision):
        with (tmp_path / "built").open("a") as file:  # by one process or another
            file.write(f"{model.name} {threads} {precision}\n")
        path.write_bytes(b"engine")
        return path

    def load(path, *, threads, precision):
        assert path.read_bytes() == b"engine"
        return Session(None, str(path), {"x": ("batch", 3)}, ("y",))

    pretended = SimpleNamespace(
        SUFFIX=".engine",
        version=lambda: "7",
        build=build,
        load=load,
        timed=lambda session, feeds: lambda: 0.002 if feeds["x"].shape == (1, 3) else 1.0,
    )
    monkeypatch.setattr(runner, "load_module", lambda name: pretended)
    folder = unpacked(replace(three, threads=2), tmp_path)
    assert runner.measure(folder, runner.group) == 0
    built = (tmp_path / "built").read_text().splitlines()
    assert len(built) == 4
    assert built[0] == "reference.onnx 2 None"
    session, *groups, _ = records_in(folder)
    assert session["fingerprint"]["runtime"] == "onnxruntime 7"
    medians = [one["timings"][0]["median_ms"] for one in groups]
    assert medians == pytest.approx([2.0, 2.0, 2.0], rel=0.05)


def test_a_demanded_precision_takes_the_onnx_package_on_the_board(three, tmp_path, monkeypatch):
    folder = unpacked(replace(three, precision="fp32"), tmp_path)
    monkeypatch.setitem(sys.modules, "onnx", None)
    assert runner.measure(folder, runner.group) == runner.REFUSED
    why = records_in(folder)[-1]["why"]
    assert why.startswith("the reference: what the model computes in cannot be told without")
    assert "pip install onnx" in why


def test_files_are_held_against_their_checksums(three, tmp_path):
    folder = unpacked(three, tmp_path)
    runner.verify(folder, three.identity)
    for name in ("models/00001.onnx", "hw_profiles/protocol.py", "manifest.json"):
        content = (folder / name).read_bytes()
        (folder / name).write_bytes(content.replace(b"e", b"f", 1))
        with pytest.raises(NasctlError, match=f"{name} is not what was sent"):
            runner.verify(folder, three.identity)
        (folder / name).write_bytes(content)
    (folder / "reference.onnx").unlink()
    with pytest.raises(NasctlError, match="reference.onnx is not what was sent"):
        runner.verify(folder, three.identity)


def test_the_fingerprint_of_a_board(tmp_path):
    for path, text in {
        "proc/device-tree/model": "Raspberry Pi 4 Model B Rev 1.1\0",
        "proc/cpuinfo": "processor\t: 0\nCPU part\t: 0xd08\nprocessor\t: 1\nCPU part\t: 0xd08\n",
        "proc/meminfo": "MemTotal:        3884360 kB\nMemFree:          100 kB\n",
    }.items():
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text(text)
    found = fingerprint("onnxruntime 1.0", tmp_path)
    assert found["board"] == "Raspberry Pi 4 Model B Rev 1.1"
    assert (found["processor"], found["memory_mb"], found["l4t"]) == ("0xd08", 3793, "?")
    nothing = fingerprint("onnxruntime 1.0", tmp_path / "none")
    assert (nothing["board"], nothing["processor"], nothing["memory_mb"]) == ("?", "?", 0)
