"""hw_profiles.half: a model that computes in float16 between float32 inputs and outputs."""

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper, shape_inference
from test_runtimes import FEEDS, MODEL

from deploy import onnx as files
from hw_profiles.half import CODES, LOWERED, half, half_file, kept, vanishing
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


def kinds_of(twin):
    """Element types by tensor, as the finished file has them."""
    graph = shape_inference.infer_shapes(twin, strict_mode=True).graph
    values = (*graph.input, *graph.value_info, *graph.output)
    found = {value.name: value.type.tensor_type.elem_type for value in values}
    return found | {tensor.name: tensor.data_type for tensor in graph.initializer}


@pytest.mark.parametrize(("to", "code"), CODES.items())
def test_what_is_lowered_is_listed_and_the_ends_stay_float32(to, code):
    twin = half(onnx.load_from_string(MODEL), "m", to=to)
    kinds = kinds_of(twin)
    for node in twin.graph.node:
        if node.op_type != "Cast":
            wanted = code if node.op_type in LOWERED else TensorProto.FLOAT
            assert kinds[node.output[0]] == wanted, node.op_type
    convolutions = [node for node in twin.graph.node if node.op_type == "Conv"]
    assert convolutions
    for node in convolutions:  # with their weights
        assert {kinds[name] for name in (*node.input, *node.output)} == {code}
    for value in (*twin.graph.input, *twin.graph.output):
        assert value.type.tensor_type.elem_type == TensorProto.FLOAT


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
    odd = model_of([helper.make_node("Odd", ["x"], ["y"], domain="mine")], np.float32(1))
    with pytest.raises(NasctlError, match=r"m: cannot be lowered .*domain mine optype Odd"):
        half(odd, "m")
    odd.opset_import.append(helper.make_opsetid("mine", 1))
    odd.graph.output[0].type.Clear()
    with pytest.raises(NasctlError, match="m: cannot be lowered: nobody knows the type of 'y'"):
        half(odd, "m")
    branch = helper.make_graph([], "b", [], [])
    flow = helper.make_node("If", ["x"], ["y"], then_branch=branch, else_branch=branch)
    with pytest.raises(NasctlError, match=r"m: cannot be lowered: control flow .If"):
        half(model_of([flow], np.float32(1)), "m")
    whole = model_of(add, np.ones((2, 3), np.float64))
    with pytest.raises(NasctlError, match="no float32 weights to lower"):
        half(whole, "m")
    with pytest.raises(NasctlError, match="m: is no ONNX file"):
        half_file(b"no model", "m")


def test_what_the_libraries_refuse_is_one_line():
    taken = [
        helper.make_node("Add", ["x", "w"], ["a"]),
        helper.make_node("Exp", ["a"], ["x.half"]),
        helper.make_node("Relu", ["x.half"], ["y"]),
    ]
    with pytest.raises(NasctlError, match=r"^m: cannot be lowered \(.*'x.half'.*\)$"):
        half(model_of(taken, np.ones((2, 3), np.float32)), "m")
    odd = model_of([helper.make_node("Odd", ["x"], ["y"])], np.float32(1))
    with pytest.raises(NasctlError, match=r"^m: cannot be lowered \(.*no registered schema.*\)$"):
        half(odd, "m", to="bf16")


@pytest.mark.parametrize("constant", ["initializer", "node"])
def test_a_clip_to_all_finite_numbers_is_one_to_all_of_float16(constant):
    """As files with a Pad before a MaxPool have it, from `deploy.onnx.export`."""
    lowest = numpy_helper.from_array(np.array(np.finfo(np.float32).min), "lowest")
    nodes = [
        helper.make_node("Add", ["x", "w"], ["a"]),
        helper.make_node("Clip", ["a", "lowest"], ["y"]),
    ]
    if constant == "node":
        nodes.insert(0, helper.make_node("Constant", [], ["lowest"], value=lowest))
    model = model_of(nodes, np.full((2, 3), -7, np.float32))
    if constant == "initializer":
        model.graph.initializer.append(lowest)
    for to in CODES:
        twin = half(model, "m", to=to)
        assert "Clip" in [node.op_type for node in twin.graph.node]
    np.testing.assert_array_equal(run(half(model, "m"), np.ones((2, 3), np.float32)), -6)
    model.graph.node.append(helper.make_node("Mul", ["y", "lowest"], ["z"]))  # no bound only
    model.graph.output[0].name = "z"
    with pytest.raises(NasctlError, match="weight 'lowest' exceeds float16's range"):
        half(model, "m")


def test_a_network_with_a_pad_before_a_pool_is_lowered():
    nodes = [
        helper.make_node("Add", ["x", "w"], ["a"]),
        helper.make_node("Unsqueeze", ["a", "axis"], ["map"]),
        helper.make_node("Pad", ["map", "pads"], ["padded"]),
        helper.make_node("MaxPool", ["padded"], ["pooled"], kernel_shape=[3]),
        helper.make_node("Squeeze", ["pooled", "axis"], ["y"]),
    ]
    model = model_of(nodes, np.full((2, 3), -2, np.float32))
    for name, values in (("axis", [0]), ("pads", [0, 0, 1, 0, 0, 1])):
        model.graph.initializer.append(numpy_helper.from_array(np.array(values), name))
    files._part_pads(model)
    assert "Clip" in [node.op_type for node in model.graph.node]
    x = np.arange(6, dtype=np.float32).reshape(2, 3)
    twin = half(model, "m")
    assert kinds_of(twin)["pooled.half"] == TensorProto.FLOAT16
    np.testing.assert_array_equal(run(twin, x), [[0, 0, 0], [2, 3, 3]])


def run(model, x):
    (found,) = onnxruntime.run(onnxruntime.load(model.SerializeToString()), {"x": x})
    return found


def test_a_sum_of_squares_stays_in_float32_and_in_range():
    nodes = [
        helper.make_node("Mul", ["x", "w"], ["scaled"]),
        helper.make_node("ReduceSumSquare", ["scaled"], ["sum"], keepdims=1),
        helper.make_node("Sqrt", ["sum"], ["norm"]),
        helper.make_node("Div", ["scaled", "norm"], ["y"]),
    ]
    model = model_of(nodes, np.full((2, 3), 10, np.float32))
    x = np.arange(6, dtype=np.float32).reshape(2, 3) * 40
    twin = half(model, "m")
    np.testing.assert_allclose(run(twin, x), run(model, x), rtol=2e-3)
    assert [node.op_type for node in kept(model)] == ["ReduceSumSquare", "Sqrt", "Div"]
    kinds = kinds_of(twin)
    assert kinds["scaled.half"] == TensorProto.FLOAT16 and kinds["sum"] == TensorProto.FLOAT
    # one cast there for two readers, one into the product and none between what stays
    assert [n.output[0] for n in twin.graph.node if n.op_type == "Cast"] == ["x.half", "scaled"]


def test_a_weight_that_both_read_is_there_in_both():
    nodes = [
        helper.make_node("Add", ["x", "w"], ["a"]),
        helper.make_node("Div", ["a", "w"], ["y"], name="last"),
    ]
    model = model_of(nodes, np.full((2, 3), 3, np.float32))
    twin = half(model, "m")
    assert {tensor.name for tensor in twin.graph.initializer} == {"w", "w.half"}
    np.testing.assert_allclose(run(twin, np.ones((2, 3), np.float32)), 4 / 3, rtol=1e-3)


def test_nodes_are_kept_by_name():
    nodes = [helper.make_node("Add", ["x", "w"], ["y"], name="sensitive")]
    model = model_of(nodes, np.ones((2, 3), np.float32))
    assert [node.name for node in kept(model, ["sensitive"])] == ["sensitive"]
    twin = half(model, "m", keep=["sensitive"])
    assert [node.op_type for node in twin.graph.node] == ["Add"]


@pytest.mark.parametrize("to", CODES)
def test_a_file_in_half_precision_is_left_as_it_is(tmp_path, to):
    path = tmp_path / "model.onnx"
    path.write_bytes(half_file(MODEL, "m", to=to))
    assert half_file(path, "m", to=to) == path.read_bytes() != MODEL
    assert CODES[to] in kinds_of(onnx.load(path)).values()


def positions(last, weight):
    """int64 positions that are cast and scaled, then read by the node `last` with the weight."""
    nodes = [
        helper.make_node("Cast", ["x"], ["float"], to=TensorProto.FLOAT),
        helper.make_node("Add", ["float", "one"], ["next"]),
        helper.make_node(last, ["next", "w"], ["y"]),
    ]
    model = model_of(nodes, weight)
    model.graph.input[0].type.tensor_type.elem_type = TensorProto.INT64
    model.graph.initializer.append(numpy_helper.from_array(np.float32(1), "one"))
    return model


@pytest.mark.parametrize("to", CODES)
def test_whole_numbers_stay_exact(to):
    model = positions("Sub", np.ones((2, 3), np.float32))
    x = np.array([[1, 257, 2049], [4099, 65505, 70001]])
    twin = half(model, "m", to=to)
    np.testing.assert_array_equal(run(twin, x), x)
    assert [node.op_type for node in kept(model)] == ["Cast", "Add", "Sub"]


def test_a_multiplication_of_whole_numbers_is_lowered():
    model = positions("Gemm", np.ones((3, 3), np.float32))
    kinds = kinds_of(half(model, "m"))
    assert kinds["next"] == TensorProto.FLOAT and kinds["y.half"] == TensorProto.FLOAT16
    assert [node.op_type for node in kept(model)] == ["Cast", "Add"]


def test_a_cast_of_bytes_is_lowered():
    """As of pictures: float16 and bfloat16 hold every byte."""
    model = positions("Sub", np.ones((2, 3), np.float32))
    model.graph.input[0].type.tensor_type.elem_type = TensorProto.UINT8
    twin = half(model, "m")
    assert kinds_of(twin)["float.half"] == TensorProto.FLOAT16
    x = np.array([[0, 1, 2], [3, 254, 255]], np.uint8)
    np.testing.assert_array_equal(run(twin, x), x)


def test_weights_too_small_for_float16_are_counted():
    weight = np.array([0.0, 1e-8, -2e-8, 2.98e-8, 4e-8, 1.0], np.float32)
    model = model_of([helper.make_node("Add", ["x", "w"], ["y"])], np.tile(weight, (2, 1)))
    assert vanishing(model) == 6
    assert (weight.astype(np.float16) == 0).sum() * 2 == 6 + 2
