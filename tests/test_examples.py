"""The examples: they import nothing of ours and are right all the same."""

import ast
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from bundles import digits, small

EXAMPLE = Path(__file__).parents[1] / "examples" / "serve_bundle.py"


def test_a_bundle_is_served_without_our_code(tmp_path):
    small(tmp_path / "b")
    task = digits()
    np.save(tmp_path / "images.npy", task.val.images[:100].numpy())
    done = subprocess.run(
        [sys.executable, str(EXAMPLE), str(tmp_path / "b"), str(tmp_path / "images.npy")],
        capture_output=True,
        text=True,
        check=True,
        cwd=tmp_path,
        env={"PATH": "", "PYTHONSAFEPATH": "1"},
    )
    found = json.loads(done.stdout)
    truth = [task.classes[label] for label in task.val.labels[:100].tolist()]
    assert np.mean(np.array(found["labels"]) == truth) > 0.8
    assert 0 < found["median_ms"] <= found["p95_ms"]


@pytest.mark.parametrize(
    ("name", "libraries"),
    [
        ("serve_bundle", {"pathlib", "numpy", "onnxruntime"}),
        ("measure_latency", {"numpy", "onnxruntime"}),
        ("serve_tensorrt", {"pathlib", "numpy", "tensorrt", "torch"}),
    ],
)
def test_they_import_nothing_of_ours(name, libraries):
    imported = set()
    for node in ast.walk(ast.parse(EXAMPLE.with_name(f"{name}.py").read_text())):
        if isinstance(node, ast.Import):
            imported |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            imported.add(str(node.module))
    assert imported == {"json", "sys", "time"} | libraries


def test_a_file_is_timed_without_our_code(tmp_path):
    small(tmp_path / "b")
    script = EXAMPLE.with_name("measure_latency.py")
    done = subprocess.run(
        [sys.executable, str(script), str(tmp_path / "b" / "model.onnx"), "20"],
        capture_output=True,
        text=True,
        check=True,
        cwd=tmp_path,
        env={"PATH": "", "PYTHONSAFEPATH": "1"},
    )
    found = json.loads(done.stdout)
    assert 0 < found["median_ms"] <= found["p95_ms"]
