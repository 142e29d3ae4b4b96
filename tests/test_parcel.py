"""Bundles and the runner, without a connection: what is sent, what survives, what is refused."""

from __future__ import annotations

import ast
import hashlib
import json
import math
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from hw_profiles.fingerprint import fingerprint
from hw_profiles.graph import onnx_graph
from hw_profiles.measure import reference_model
from hw_profiles.op import Tape
from hw_profiles.protocol import Plan
from hw_profiles.remote import over_ssh, runner, ssh
from hw_profiles.remote.parcel import Parcel, code
from hw_profiles.runtimes import Session, names
from nas.errors import NasctlError, UsageError

QUICK = Plan(rounds=2, max_rounds=2)
#: later than Python 3.8: parameters of dataclass and zip, and what modules and strings have
KEYWORDS = {"slots", "kw_only", "strict"}
ATTRIBUTES = {"functools.cache", "removeprefix", "removesuffix"}


def network(channels):
    tape = Tape(channels, 8)
    tape.conv(tape.input, channels, kernel=3)
    return onnx_graph(tape.ops).SerializeToString()


@pytest.fixture(scope="module")
def three():
    models = {name: network(size) for name, size in (("a", 2), ("b", 4), ("c", 8))}
    return Parcel(models, reference_model(), QUICK, group=1)


def unpacked(parcel, folder):
    for name, content in {**parcel.code, **parcel.data, "manifest.json": parcel.manifest}.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    (folder / runner.RESULTS).touch()
    return folder


@pytest.fixture(scope="module")
def whole(three, tmp_path_factory):
    """The results of a whole run."""
    folder = unpacked(three, tmp_path_factory.mktemp("whole"))
    assert runner.measure(folder) == 0
    return (folder / runner.RESULTS).read_bytes()


def records_in(folder):
    return runner.from_lines((folder / runner.RESULTS).read_bytes())


def kinds(folder):
    return [one["kind"] for one in records_in(folder)]


# ---- what is sent --------------------------------------------------------------------------------


def test_the_code_that_is_sent_is_what_the_runner_imports(three):
    assert {"nas/errors.py", "hw_profiles/protocol.py", "hw_profiles/runtimes/onnxruntime.py"} <= {
        *three.code
    }
    assert not {"hw_profiles/measure.py", "hw_profiles/remote/over_ssh.py", "nas/space.py"} & {
        *three.code
    }


def test_the_code_that_is_sent_runs_alone_without_torch_or_onnx(three, tmp_path):
    unpacked(three, tmp_path)
    program = (
        "import sys; sys.modules.update(dict.fromkeys(('torch', 'onnx', 'pydantic')));"  # barred
        "import pathlib, hw_profiles.remote.runner as r;"
        "print(r.measure(pathlib.Path('.'), r.group), r.__file__)"
    )
    run = subprocess.run(
        [sys.executable, "-c", program], cwd=tmp_path, env={}, capture_output=True, text=True
    )
    assert run.stdout.strip() == f"0 {tmp_path}/hw_profiles/remote/runner.py", run.stderr
    assert kinds(tmp_path) == ["session", "group", "group", "group", "done"]


def python_3_8():
    """One that runs; a version switcher's shim may be there without it."""
    places = [
        shutil.which("python3.8") or "",
        *Path.home().glob(".pyenv/versions/3.8.*/bin/python"),
    ]
    for place in filter(None, places):
        if subprocess.run([place, "--version"], capture_output=True).returncode == 0:
            return place
    return None


class Evaluated(ast.NodeTransformer):
    """Leaves out what is for type checkers only."""

    def visit_If(self, node):
        return None if ast.unparse(node.test) == "TYPE_CHECKING" else self.generic_visit(node)


def newer_than_3_8(code):
    """What Python 3.8 would stumble over at run time; annotations are never evaluated."""
    tree = ast.parse(code, feature_version=(3, 8))
    abc = {
        alias.name
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and node.module == "collections.abc"
        for alias in node.names
    }
    for node in ast.walk(Evaluated().visit(tree)):
        if isinstance(node, ast.keyword) and node.arg in KEYWORDS:
            yield node.arg
        if isinstance(node, ast.Attribute):
            yield from {node.attr, ast.unparse(node)} & ATTRIBUTES
        if isinstance(node, ast.AugAssign) and isinstance(node.op, ast.BitOr):
            yield "|="  # of dicts, perhaps
        values = ast.walk(node.value) if isinstance(node, ast.Assign) else ()
        for value in values:
            if isinstance(value, ast.Subscript) and isinstance(value.value, ast.Name):
                yield from {value.value.id} & {*abc, "dict", "list", "set", "tuple", "type"}


@pytest.mark.parametrize("runtime", names())
def test_the_code_that_is_sent_uses_nothing_newer_than_python_3_8(runtime):
    files = code("hw_profiles.remote.engines", f"hw_profiles.runtimes.{runtime}")
    assert "hw_profiles/remote/runner.py" in files
    assert {name: [*newer_than_3_8(text)] for name, text in files.items()} == {
        name: [] for name in files
    }


def test_what_is_newer_than_python_3_8_is_noticed():
    sample = (
        "from collections.abc import Callable\nA = Callable[[], list[int]]\nf(slots=True)\n"
        "a |= {1: 2}\nfunctools.cache(s.removeprefix('a'))"
    )
    assert sorted(newer_than_3_8(sample)) == [
        *("Callable", "functools.cache", "list", "removeprefix", "slots", "|=")
    ]
    with pytest.raises(SyntaxError):
        [*newer_than_3_8("with (open(x) as y, open(z) as w): pass\nmatch x:\n  case _: pass")]


def test_the_code_that_is_sent_imports_in_python_3_8(tmp_path):
    """With stand-ins for libraries; what imports torch as it starts is left out, because our torch
    has none for 3.8."""
    python = python_3_8()
    if python is None:
        pytest.skip("no Python 3.8 on this machine")
    files = code("hw_profiles.remote.engines", *(f"hw_profiles.runtimes.{one}" for one in names()))
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(text)
    modules = [name[:-3].replace("/", ".") for name in files if "__init__" not in name]
    modules = [name for name in modules if not name.endswith(("._torch_graph", "._aoti"))]
    libraries = ("numpy", "onnx", "google", "google.protobuf", "google.protobuf.message")
    program = (
        "import sys; from unittest.mock import MagicMock;"
        f"sys.modules.update((name, MagicMock()) for name in {libraries});"
    ) + "; ".join(f"import {name}" for name in modules)
    subprocess.run([python, "-c", program], cwd=tmp_path, check=True)


def test_whatever_decides_the_results_decides_the_identity(three):
    changes = [
        {"threads": 2},
        {"cores": (0,)},
        {"group": 2},
        {"seed": 1},
        {"precision": "fp32"},
        {"plan": replace(QUICK, rounds=3)},
        {"reference": network(3)},
        {"models": {**three.models, "a": network(3)}},
    ]
    identities = {replace(three, **change).identity for change in changes}
    assert len(identities | {three.identity}) == len(changes) + 1
    assert replace(three).identity == three.identity
    assert hashlib.sha256(three.manifest).hexdigest() == three.identity


def test_groups_share_the_time_limit_and_hold_every_model_once(three):
    parcel = replace(three, group=2, plan=replace(QUICK, time_limit_s=10))
    manifest = json.loads(parcel.manifest)
    assert manifest["plan"]["time_limit_s"] == 5
    assert [len(group) for group in manifest["groups"]] == [2, 1]
    assert {one["name"] for group in manifest["groups"] for one in group} == {"a", "b", "c"}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"models": {}}, "nothing to measure"),
        ({"threads": 0}, "must be 1 or more"),
        ({"group": 0}, "must be 1 or more"),
        ({"runtime": "tflite"}, "unknown runtime 'tflite'"),
        ({"precision": "fp16"}, "onnxruntime offers no fp16; allowed: fp32, int8"),
    ],
)
def test_bundles_that_no_board_can_measure(three, change, said):
    with pytest.raises(NasctlError, match=said):
        replace(three, **change)


# ---- the runner ----------------------------------------------------------------------------------


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


# ---- what comes back -----------------------------------------------------------------------------

TIMING = {"median_ms": 1.0, "spread_ms": 0.1, "p90_ms": 1.1, "p95_ms": 1.2, "p99_ms": 1.3, "n": 20}
JOB = over_ssh._Job(ssh.Target("board"), Parcel({"a": b""}, b""), Path("state"))


def group_record(timing):
    return {
        "kind": "group",
        "names": ["a"],
        "timings": [{**timing, "noisy": ""}],
        "rounds_ms": [[1.0]],
        "reference_ms": [1.0, 1.1],
    }


@pytest.mark.parametrize("bad", [math.nan, -1.0, 0.0, math.inf, "1", None, True])
@pytest.mark.parametrize("field", ["median_ms", "p99_ms", "n"])
def test_impossible_timings_are_refused(field, bad):
    line = runner.to_line(group_record({**TIMING, field: bad}))
    with pytest.raises(NasctlError, match="ssh://board: it reports .* for 'a'"):
        JOB.result(runner.from_lines(line))


def test_results_that_our_runner_did_not_write_are_refused():
    session = {"kind": "session", "fingerprint": {}}
    short = {**group_record(TIMING), "timings": []}
    nameless = {key: value for key, value in group_record(TIMING).items() if key != "names"}
    for records in ([session, short], [session, nameless], [group_record(TIMING)]):
        with pytest.raises(NasctlError, match="ssh://board: its results are not what our runner"):
            JOB.result(records)


def test_of_two_results_the_later_counts():
    session = {"kind": "session", "fingerprint": {"board": "?"}}
    later = group_record({**TIMING, "median_ms": 1.05})
    result = JOB.result([session, group_record(TIMING), session, later, {"kind": "done"}])
    assert result.timings["a"].median_ms == 1.05
    assert result.fingerprint == {"board": "?"}
    assert result.noise == pytest.approx(1.4826 * 0.05 / 1.05)


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


# ---- addresses -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "host", "user", "port"),
    [
        ("ssh://pi@raspi.local:2222", "raspi.local", "pi", 2222),
        ("ssh://jetson", "jetson", "", None),
        ("ssh://nvidia@10.0.0.7/", "10.0.0.7", "nvidia", None),
        ("ssh://me@[fe80::1]:22", "fe80::1", "me", 22),
    ],
)
def test_addresses(text, host, user, port):
    target = ssh.parse(text)
    assert (target.host, target.user, target.port) == (host, user, port)
    assert str(target) == text.rstrip("/")
    assert ssh.parse(str(target)) == target


@pytest.mark.parametrize(
    "text",
    [
        "ssh://",
        "pi@raspi",
        "ssh://-oProxyCommand=touch x",
        "ssh://-l@host",
        "ssh://host;reboot",
        "ssh://a@b@c",
        "ssh://host:0",
        "ssh://host:65536",
        "ssh://host:22/tmp",
        "ssh://user:password@host",
        "ssh://ho st",
        "ssh://host\n",
    ],
)
def test_addresses_that_are_refused(text):
    with pytest.raises(UsageError, match=r"--on: .* allowed: local, ssh://\[user@\]host\[:port\]"):
        ssh.parse(text)


def test_words_are_quoted_for_the_shell_there_and_host_keys_are_checked():
    words = ssh.command(ssh.parse("ssh://me@host:7"), ["echo", "a b", "$(reboot)"])
    assert words[words.index("--") + 1 :] == ["host", "echo 'a b' '$(reboot)'"]
    assert "StrictHostKeyChecking=yes" in words
    assert "BatchMode=yes" in words
