"""hw_profiles.half: a model that computes in float16 between float32 inputs and outputs."""

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper, shape_inference
from test_runtimes import FEEDS, MODEL

from hw_profiles.half import half, half_file
from hw_profiles.runtimes import onnxruntime
from nas.errors import NasctlError


def model_of(nodes, weight, outputs=("y",)):
    """A graph x -> outputs, all of 2 x 3, with the weight "w"."""
    values = [
        helper.make_tensor_value_info(name, TensorProto.FLOAT, (2, 3)) for name in ("x", *outputs)
    ]
    weights = [numpy_helper.from_array(np.asarray(weight), "w")]
    graph = helper.make_graph(nodes, "g", values[:1], values[1:], weights)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=8)


def test_every_operator_computes_in_float16_between_float32_ends():
    twin = shape_inference.infer_shapes(half(onnx.load_from_string(MODEL), "m"), strict_mode=True)
    kinds = {value.name: value.type.tensor_type.elem_type for value in twin.graph.value_info}
    computed = [node for node in twin.graph.node if node.op_type != "Cast"]
    # those just before an output are named after it
    assert {kinds[node.output[0]] for node in computed} == {TensorProto.FLOAT16}
    ends = [*twin.graph.input, *twin.graph.output]
    assert {value.type.tensor_type.elem_type for value in ends} == {TensorProto.FLOAT}
    assert sum(node.op_type == "Cast" for node in twin.graph.node) == len(ends) == 3


def test_it_computes_nearly_the_same_and_the_original_is_left_alone():
    before = onnx.load_from_string(MODEL)
    kept = before.SerializeToString()
    found, expected = (
        onnxruntime.run(onnxruntime.load(content), FEEDS)
        for content in (half(before, "m").SerializeToString(), MODEL)
    )
    for mine, theirs in zip(found, expected, strict=True):
        off = np.abs(mine - theirs).max() / np.abs(theirs).max()
        assert 1e-6 < off < 1e-2
    assert before.SerializeToString() == kept


def test_an_output_that_others_read_is_cast_only_on_its_way_out():
    nodes = [
        helper.make_node("Add", ["x", "w"], ["a"]),
        helper.make_node("Relu", ["a"], ["y"]),
    ]
    twin = half(model_of(nodes, np.full((2, 3), -1, np.float32), ("a", "y")), "m")
    relu = next(node for node in twin.graph.node if node.op_type == "Relu")
    assert list(relu.input) == ["a.half"]
    session = onnxruntime.load(twin.SerializeToString())
    a, y = onnxruntime.run(session, {"x": np.zeros((2, 3), np.float32)})
    assert (a == -1).all() and (y == 0).all() and a.dtype == np.float32


def test_what_cannot_be_halved_is_one_line():
    add = [helper.make_node("Add", ["x", "w"], ["y"])]
    big = model_of(add, np.full((2, 3), 1e6, np.float32))
    with pytest.raises(NasctlError, match="m: weight 'w' exceeds float16's range"):
        half(big, "m")
    odd = model_of([helper.make_node("Erf", ["x"], ["y"])], np.ones((2, 3), np.float32))
    with pytest.raises(NasctlError, match=r"m: cannot be turned into float16: operator Erf"):
        half(odd, "m")
    whole = model_of(add, np.ones((2, 3), np.float64))
    with pytest.raises(NasctlError, match="no float32 weights"):
        half(whole, "m")
    with pytest.raises(NasctlError, match="m: is no ONNX file"):
        half_file(b"no model", "m")


def test_a_file_in_float16_is_left_as_it_is(tmp_path):
    path = tmp_path / "model.onnx"
    path.write_bytes(half_file(MODEL, "m"))
    assert half_file(path, "m") == path.read_bytes() != MODEL
