"""`nasctl build --layout`: a bundle's model as other systems want to find it."""

from __future__ import annotations

import json

import numpy as np
import onnx
import pytest
from bundles import digits, network, small
from onnx import TensorProto, helper

from deploy import layouts
from deploy import onnx as files
from deploy.layouts import triton
from hw_profiles import runtimes
from hw_profiles.runtimes import onnxruntime
from nas.errors import NasctlError


@pytest.fixture
def bundle(workdir):
    return small(workdir / "b")


def images():
    return digits().normalise(digits().val.images[:4]).numpy()


def expected(bundle):
    (found,) = onnxruntime.run(onnxruntime.load(bundle.model), {"input": images()})
    return found


def test_a_triton_repository_describes_the_file_that_is_in_it(nasctl, bundle, workdir):
    done = nasctl("build", "b", "--layout", "triton", "--out", "models", "--json")
    assert done.code == 0, done.err
    place = workdir / "models" / "model"
    assert json.loads(done.out)[0] == "models/model/config.pbtxt"
    assert (place / "config.pbtxt").read_text() == (
        'name: "model"\nbackend: "onnxruntime"\nmax_batch_size: 64\n'
        'input [ { name: "input" data_type: TYPE_FP32 dims: [ 1, 8, 8 ] } ]\n'
        'output [ { name: "logits" data_type: TYPE_FP32 dims: [ 10 ] '
        'label_filename: "labels.txt" } ]\ndynamic_batching { }\n'
    )
    assert (place / "labels.txt").read_text().split() == list(digits().classes)
    served = onnxruntime.load(place / "1" / "model.onnx")
    np.testing.assert_array_equal(onnxruntime.run(served, {"input": images()})[0], expected(bundle))


def test_weights_that_one_file_does_not_hold_are_in_the_repository_and_told(
    nasctl, bundle, workdir, monkeypatch
):
    monkeypatch.setattr(files, "INLINE", 1024)  # bytes; the limit is 2 GB
    done = nasctl("build", "b", "--layout", "triton", "--out", "models", "--json")
    assert done.code == 0, done.err
    told = sorted(workdir / path for path in json.loads(done.out))
    assert told == sorted(path for path in (workdir / "models").rglob("*") if path.is_file())
    (_,) = [path for path in told if path.suffix == ".data"]
    served = onnxruntime.load(workdir / "models" / "model" / "1" / "model.onnx")
    np.testing.assert_array_equal(onnxruntime.run(served, {"input": images()})[0], expected(bundle))


def test_a_file_of_one_request_at_a_time_and_one_of_strange_types():
    fixed = network()
    for value in (*fixed.graph.input, *fixed.graph.output):
        value.type.tensor_type.shape.dim[0].dim_value = 1
    said = triton.config(fixed, "m", labelled=False)
    assert "max_batch_size: 0" in said and "dims: [ 1, 1, 8, 8 ]" in said
    assert "dynamic_batching" not in said and "label" not in said
    x = helper.make_tensor_value_info("x", TensorProto.COMPLEX64, ["n"])
    graph = helper.make_graph([helper.make_node("Identity", ["x"], ["y"])], "g", [x], [x])
    with pytest.raises(NasctlError, match="input 'x' is COMPLEX64"):
        triton.config(helper.make_model(graph), "m", labelled=False)


def test_the_mobile_file_computes_what_the_model_computes_and_belongs_to_no_processor(
    nasctl, bundle, workdir
):
    done = nasctl("build", "b", "--layout", "mobile", "--out", "phone")
    assert done.code == 0 and "phone/model.ort" in done.err
    found = onnxruntime.load(workdir / "phone" / "model.ort")
    np.testing.assert_allclose(
        onnxruntime.run(found, {"input": images()})[0], expected(bundle), rtol=1e-4, atol=1e-5
    )
    fixed = onnxruntime.build(bundle.model, workdir / "fixed.ort")
    # blocked layouts of this processor are in the engine only
    assert b"ReorderInput" not in (workdir / "phone" / "model.ort").read_bytes()
    assert fixed.read_bytes() != (workdir / "phone" / "model.ort").read_bytes()
    assert json.loads((workdir / "phone" / "task.json").read_text())["input"] == "input"


def test_openvinos_representation_computes_what_the_model_computes(nasctl, bundle, workdir):
    module = runtimes.load_module("openvino")
    if missing := module.unavailable():
        pytest.skip(missing)
    done = nasctl("build", "b", "--layout", "openvino", "--out", "ir")
    assert done.code == 0 and "ir/model.bin" in done.err
    session = module.load(workdir / "ir" / "model.xml")
    (found,) = module.run(session, {"input": images()})
    np.testing.assert_allclose(found, expected(bundle), rtol=1e-4, atol=1e-5)
    weights = sum(t.ByteSize() for t in onnx.load(bundle.model).graph.initializer)
    assert (workdir / "ir" / "model.bin").stat().st_size > 0.9 * weights  # not halved


@pytest.mark.parametrize(
    ("layout", "made"),
    [
        ("triton", ["model/config.pbtxt", "model/1/model.onnx"]),
        ("mobile", ["model.ort"]),
        ("openvino", ["model.xml", "model.bin"]),
    ],
)
def test_what_was_exported_without_data_is_laid_out_too(nasctl, workdir, layout, made):
    if layout == "openvino" and (missing := runtimes.load_module(layout).unavailable()):
        pytest.skip(missing)
    small(workdir / "b", data=False)
    done = nasctl("build", "b", "--layout", layout, "--out", "new", "--json")
    assert done.code == 0, done.err
    assert json.loads(done.out) == [f"new/{name}" for name in made]
    found = [path for path in (workdir / "new").rglob("*") if path.is_file()]
    assert sorted(found) == sorted(workdir / "new" / name for name in made)


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (("--layout", "tritn", "--out", "new"), 2, "unknown layout 'tritn'"),
        (("--layout", "triton"), 2, "a layout and its folder go together"),
        (("--out", "new"), 2, "a layout and its folder go together"),
        (("--layout", "triton", "--out", "b"), 1, "b: exists already"),
        (("--layout", "triton", "--out", "new", "--member", "x.onnx"), 1, "no member 'x.onnx'"),
        (("--layout", "triton", "--out", "new", "--hw", "cpu"), 2, "--hw: is about an engine"),
        (("--layout", "triton", "--out", "new", "--engine", "ort"), 2, "--engine: is about"),
        (("--layout", "triton", "--out", "new", "--precision", "fp16"), 2, "--precision: is"),
        (("--layout", "triton", "--out", "new", "--threads", "1"), 2, "--threads: is about"),
        (("--layout", "triton", "--out", "new", "--on", "ssh://board"), 2, "--on: is about"),
        (("--commands", "--layout", "triton", "--out", "new"), 2, "--layout: changes nothing"),
        (("--commands", "--precision", "fp16"), 1, "none is in fp16"),
    ],
)
def test_what_cannot_be_laid_out_leaves_nothing(nasctl, bundle, workdir, arguments, code, said):
    outcome = nasctl("build", "b", *arguments)
    assert outcome.code == code and said in outcome.err
    assert sorted(path.name for path in workdir.iterdir()) == ["b"]


def test_a_full_disk_leaves_no_half_layout(bundle, workdir, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(triton, "write", full)
    with pytest.raises(NasctlError, match="cannot write: No space left on device"):
        layouts.written("triton", bundle.model, None, workdir / "models")
    assert not (workdir / "models").exists()
