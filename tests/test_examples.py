"""The examples: they import nothing of ours and are right all the same."""

import ast
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from bundles import digits, small
from onnx import TensorProto, helper, numpy_helper

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


def timed(model):
    return subprocess.run(
        [sys.executable, str(EXAMPLE.with_name("measure_latency.py")), str(model), "20"],
        capture_output=True,
        text=True,
        cwd=model.parent,
        env={"PATH": "", "PYTHONSAFEPATH": "1"},
    )


def test_a_file_is_timed_without_our_code(tmp_path):
    done = timed(small(tmp_path / "b").model)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert 0 < found["median_ms"] <= found["p95_ms"]


@pytest.mark.parametrize(
    ("kind", "sizes", "code", "said"),
    [
        (TensorProto.INT64, {"length": 7}, 0, "median_ms"),
        (TensorProto.INT64, {}, 1, "Reshape"),  # at 1: what the file states was read above
        (TensorProto.STRING, {"length": 7}, 1, "input ids is a tensor(string); taken are tensor("),
    ],
)
def test_it_is_timed_in_its_types_and_at_its_sizes(tmp_path, kind, sizes, code, said):
    """A file that runs at a length of 7 only."""
    ids = helper.make_tensor_value_info("ids", kind, ["batch", "length"])
    rows = helper.make_tensor_value_info("rows", kind, [1, 7])
    shape = numpy_helper.from_array(np.array([1, 7]), "shape")
    node = helper.make_node("Reshape", ["ids", "shape"], ["rows"])
    opset = [helper.make_opsetid("", 18)]
    graph = helper.make_graph([node], "g", [ids], [rows], [shape])
    model = helper.make_model(graph, opset_imports=opset, ir_version=9)
    helper.set_model_props(model, {"free_sizes": json.dumps(sizes)})
    (tmp_path / "m.onnx").write_bytes(model.SerializeToString())
    done = timed(tmp_path / "m.onnx")
    assert done.returncode == code and said in done.stdout + done.stderr
