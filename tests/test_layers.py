"""Who may import whom, and what may not be imported before it is needed."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
OURS = {"nas", "hw_profiles", "compress", "deploy", "cli", "benchmarks", "tests"}
MAY = {
    "hw_profiles": {"hw_profiles"},
    "nas": {"nas", "hw_profiles"},
    "compress": {"compress", "nas", "hw_profiles"},
    "deploy": {"deploy", "nas", "compress", "hw_profiles"},
    "cli": {"cli", "nas", "compress", "deploy", "hw_profiles"},
    # benchmarks use the product as anybody does; nothing uses them
    "benchmarks": {"benchmarks", "cli", "nas", "compress", "deploy", "hw_profiles"},
}
FILES = [path for package in MAY for path in sorted((ROOT / package).rglob("*.py"))]
HEAVY = ("torch", "numpy", "pydantic", "optuna", "sklearn", "scipy", "onnx", "onnxruntime")


def imported(path):
    """Modules named by the imports of a file, `from a import b` as a.b."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative import"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_file_imports_only_what_its_layer_may(path):
    package = path.relative_to(ROOT).parts[0]
    ours = {name for name in imported(path) if name.split(".")[0] in OURS}
    errors = {name for name in ours if name.startswith("nas.errors")}
    assert {name.split(".")[0] for name in ours - errors} <= MAY[package]


def test_the_errors_import_nothing_of_ours():
    assert not {name.split(".")[0] for name in imported(ROOT / "nas" / "errors.py")} & OURS


def loaded_by(code, among):
    program = f"import sys\n{code}\nprint(*sorted({set(among)!r} & set(sys.modules)))"
    run = [sys.executable, "-c", program]
    return subprocess.run(run, capture_output=True, text=True, check=True).stdout.splitlines()[-1]


def test_help_imports_nothing_heavy():
    assert loaded_by("from cli.main import run\nassert run(['--help']) == 0", HEAVY) == ""
    # a verb's own help may load pydantic, because typer does
    rest = [name for name in HEAVY if name != "pydantic"]
    assert loaded_by("from cli.main import run\nrun(['search', '--help'])", rest) == ""


def test_a_mistyped_name_is_told_without_torch():
    words = "['search', '--hw', 'jetson', '--space', 'resnt']"
    assert loaded_by(f"from cli.main import run\nassert run({words}) == 2", ["torch"]) == ""


LIGHT = ["cli.main", "nas.space", "nas.search", "nas.study", "nas.pareto", "nas.run", "nas.errors"]
LIGHT += [
    f"hw_profiles.{path.stem}"
    for path in sorted((ROOT / "hw_profiles").glob("*.py"))
    if path.stem not in ("__init__", "measure")
]
LIGHT += ["hw_profiles.models.calibrate"]  # what fits latency tables


def test_the_light_modules_import_without_torch():
    assert loaded_by("\n".join(f"import {name}" for name in LIGHT), ["torch"]) == ""
