"""What is sent to a board: the code, which runs there alone, and what makes a parcel another."""

from __future__ import annotations

import ast
import hashlib
import json
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import parcels
import pytest
from parcels import QUICK, kinds, network, unpacked

from hw_profiles.remote.parcel import code
from hw_profiles.runtimes import names
from nas.errors import NasctlError

#: later than Python 3.8: parameters of dataclass and zip, and what modules and strings have
KEYWORDS = {"slots", "kw_only", "strict"}
ATTRIBUTES = {"functools.cache", "removeprefix", "removesuffix"}


@pytest.fixture(scope="module")
def three():
    return parcels.three()


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
