"""The example that serves a bundle: it imports nothing of ours and is right all the same."""

import ast
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
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


def test_it_imports_nothing_of_ours():
    imported = set()
    for node in ast.walk(ast.parse(EXAMPLE.read_text())):
        if isinstance(node, ast.Import):
            imported |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            imported.add(str(node.module))
    assert imported == {"json", "sys", "time", "pathlib", "numpy", "onnxruntime"}
