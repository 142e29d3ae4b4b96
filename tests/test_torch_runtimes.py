"""What the torch runtimes share: an ONNX file as a module, and packages that were built from it."""

from __future__ import annotations

import zipfile

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from test_runtimes import FEEDS, MODEL, network

from deploy.onnx import export
from hw_profiles.graph import onnx_graph
from hw_profiles.op import Tape
from hw_profiles.runtimes import _torch_graph, aoti, onnxruntime
from nas import space
from nas.errors import NasctlError


@pytest.mark.slow
@pytest.mark.parametrize("name", [n for n in space.names() if space.load(n).reads == "images"])
def test_an_exported_network_comes_back(name, tmp_path):
    """The files that are deployed, not only those that tables are measured with."""
    found = space.load(name, size=32, width=0.5)
    arch = found.decode(found.smallest)
    path = tmp_path / "model.onnx"
    export(found.build(arch), path, input_shape=(3, arch.resolution, arch.resolution))
    net = _torch_graph.read(path, None)
    x = np.random.default_rng(0).standard_normal((2, 3, arch.resolution, arch.resolution))
    feeds = {"input": x.astype(np.float32)}
    (expected,) = onnxruntime.run(onnxruntime.load(path), feeds)
    (got,) = net(*_torch_graph.example(net, feeds, "cpu"))
    np.testing.assert_allclose(got, expected, atol=1e-4 * np.abs(expected).max())


def test_a_batch_norm_that_follows_no_convolution():
    rng = np.random.default_rng(0)
    of = {name: rng.uniform(0.5, 2.0, 3).astype(np.float32) for name in "wbmv"}
    of["k"] = rng.standard_normal((3, 3, 1, 1)).astype(np.float32)
    nodes = [
        helper.make_node("BatchNormalization", ["input", *"wbmv"], ["n"], epsilon=0.1),
        helper.make_node("Conv", ["n", "k"], ["output"]),
    ]
    ends = [
        helper.make_tensor_value_info(n, TensorProto.FLOAT, (2, 3, 4, 4))
        for n in ("input", "output")
    ]
    weights = [numpy_helper.from_array(value, name) for name, value in of.items()]
    graph = helper.make_graph(nodes, "g", ends[:1], ends[1:], weights)
    opset = [helper.make_opsetid("", 17)]
    model = helper.make_model(graph, ir_version=8, opset_imports=opset).SerializeToString()
    feeds = {"input": rng.standard_normal((2, 3, 4, 4)).astype(np.float32)}
    (expected,) = onnxruntime.run(onnxruntime.load(model), feeds)
    (got,) = _torch_graph.read(model, None)(torch.from_numpy(feeds["input"]))
    np.testing.assert_allclose(got, expected, atol=1e-5)


def test_a_network_that_grows_its_maps_is_one_that_torch_exports():
    tape = Tape(3, 4)
    tape.upsample(tape.conv(tape.input, 2), 2)
    model = onnx_graph(tape.ops, seed=0).SerializeToString()
    x = np.random.default_rng(0).standard_normal((1, 3, 4, 4)).astype(np.float32)
    (expected,) = onnxruntime.run(onnxruntime.load(model), {"input": x})
    given = (torch.from_numpy(x),)
    (got,) = torch.export.export(_torch_graph.read(model, None), given).module()(*given)
    np.testing.assert_allclose(got, expected, atol=1e-5)


def test_what_torch_cannot_compile_is_told_in_one_line(tmp_path, monkeypatch):
    def fails(*_, **__):
        raise RuntimeError("the compiler\nsays no")

    monkeypatch.setattr(torch._inductor, "aoti_compile_and_package", fails)
    with pytest.raises(NasctlError, match=r"torch cannot compile it \(the compiler says no\)"):
        aoti.build(MODEL, tmp_path / "model.pt2")
    assert not list(tmp_path.iterdir())


def changed(kind, **attributes):
    """The test network with other attributes on its operators of a kind."""
    model = onnx.load_from_string(MODEL)
    for node in (node for node in model.graph.node if node.op_type == kind):
        kept = [part for part in node.attribute if part.name not in attributes]
        del node.attribute[:]
        node.attribute.extend([*kept, *map(helper.make_attribute, attributes, attributes.values())])
    return model.SerializeToString()


def test_attributes_are_read():
    for model in (
        changed("HardSigmoid", alpha=0.2, beta=0.4),
        changed("AveragePool", count_include_pad=1, pads=[1, 1, 1, 1], kernel_shape=[4, 4]),
    ):
        (_, expected) = onnxruntime.run(onnxruntime.load(model), FEEDS)
        (_, got) = _torch_graph.read(model, None)(torch.from_numpy(FEEDS["input"]))
        np.testing.assert_allclose(got, expected, atol=1e-4 * np.abs(expected).max())


def test_what_torch_would_read_otherwise_is_refused():
    x = torch.from_numpy(FEEDS["input"])
    with pytest.raises(NasctlError, match="torch pads both sides alike"):
        _torch_graph.read(changed("MaxPool", pads=[0, 0, 1, 1]), None)(x)
    with pytest.raises(NasctlError, match="operator Gemm: only x @ w"):
        _torch_graph.read(changed("Gemm", alpha=0.5), None)(x)
    value = helper.make_tensor_value_info("x", TensorProto.FLOAT, (2, 3))
    weight = numpy_helper.from_array(np.ones((3, 3), np.float32), "w")
    node = helper.make_node("Einsum", ["x", "w"], ["y"], equation="ij,jk->ik")
    graph = helper.make_graph([node], "g", [value], [value], [weight])
    with pytest.raises(NasctlError, match="cannot be turned into torch: operator Einsum; allowed"):
        _torch_graph.read(helper.make_model(graph).SerializeToString(), None)


def test_a_foreign_or_damaged_package_is_refused_before_its_code_runs(tmp_path):
    path = tmp_path / "model.pt2"
    path.write_bytes(b"no zip")
    with pytest.raises(NasctlError, match="no package that nasctl built"):
        aoti.load(path)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("model/data/aotinductor/model/x_metadata.json", '{"by": "another"}')
        archive.writestr("model/data/aotinductor/model/x.so", b"not to be loaded")
    with pytest.raises(NasctlError, match="no package that nasctl built"):
        aoti.load(path)
    with pytest.raises(NasctlError, match="no such file"):
        aoti.load(tmp_path / "absent.pt2")
    with pytest.raises(NasctlError, match=r"must end in \.pt2"):
        aoti.build(MODEL, tmp_path / "model.so")


def test_an_absent_compiler_is_named(monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(NasctlError, match="there is no no-such-compiler: apt-get install g\\+\\+"):
        aoti.load(MODEL)


@pytest.mark.slow
def test_a_package_is_for_one_number_of_threads_and_fixed_sizes(tmp_path):
    model = onnx_graph(network(), batch=None).SerializeToString()
    path = aoti.build(model, tmp_path / "new" / "model.pt2", threads=1)
    assert [found.name for found in path.parent.iterdir()] == ["model.pt2"]
    with pytest.raises(NasctlError, match=r"built for 1 thread\(s\) on cpu, not for 2 on cpu"):
        aoti.load(path, threads=2)
    with pytest.raises(NasctlError, match="asked to compute in bf16, but it computes in fp32"):
        aoti.load(path, precision="bf16")
    session = aoti.load(path)
    assert session.inputs == {"input": (1, 3, 16, 16)}
    before = torch.get_num_threads()
    found = aoti.run(session, FEEDS)
    assert torch.get_num_threads() == before
    (_, expected) = onnxruntime.run(onnxruntime.load(model), FEEDS)
    np.testing.assert_allclose(found[1], expected, atol=1e-4 * np.abs(expected).max())
    for feeds in ({}, {"input": np.zeros((2, 3, 16, 16), np.float32)}):
        with pytest.raises(NasctlError, match=r"feeds do not fit.*allowed: input \[1, 3, 16, 16\]"):
            aoti.run(session, feeds)


def words():
    """A mask of token numbers, as an encoder's file has it: their mean but for 0, the padding."""
    rng = np.random.default_rng(0)
    table = rng.standard_normal((9, 4)).astype(np.float32)
    weight = rng.standard_normal((4, 3)).astype(np.float32)
    constants = {
        "table": table,
        "weight": weight,
        "padding": np.array(0),
        "last": np.array([2]),
        "places": np.array([1]),
        "nothing": np.array(0, np.float32),
    }
    node = helper.make_node
    nodes = [
        node("Equal", ["input", "padding"], ["padded"]),
        node("Not", ["padded"], ["word"]),
        node("Unsqueeze", ["word", "last"], ["mask"]),
        node("Cast", ["mask"], ["ones"], to=TensorProto.FLOAT),
        node("ReduceSum", ["ones", "places"], ["count"], keepdims=0),
        node("Gather", ["table", "input"], ["vectors"]),
        node("Where", ["mask", "vectors", "nothing"], ["kept"]),
        node("ReduceSum", ["kept", "places"], ["sum"], keepdims=0),
        node("Div", ["sum", "count"], ["mean"]),
        node("IsNaN", ["mean"], ["empty"]),
        node("Where", ["empty", "nothing", "mean"], ["whole"]),
        node("MatMul", ["whole", "weight"], ["output"]),
    ]
    given = helper.make_tensor_value_info("input", TensorProto.INT64, (1, 5))
    made = helper.make_tensor_value_info("output", TensorProto.FLOAT, (1, 3))
    tensors = [numpy_helper.from_array(value, name) for name, value in constants.items()]
    graph = helper.make_graph(nodes, "words", [given], [made], tensors)
    imports = [helper.make_opsetid("", 18)]
    version = helper.find_min_ir_version_for(imports)
    return helper.make_model(graph, opset_imports=imports, ir_version=version).SerializeToString()


WORDS = [np.array([[3, 1, 8, 0, 0]]), np.array([[0, 0, 0, 0, 0]])]


def test_masks_of_token_numbers_are_read():
    for tokens in WORDS:
        feeds = {"input": tokens}
        (expected,) = onnxruntime.run(onnxruntime.load(words()), feeds)
        net = _torch_graph.read(words(), None)
        (got,) = net(*_torch_graph.example(net, feeds, "cpu"))
        np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-7)
        half = _torch_graph.read(words(), "bf16")
        (got,) = half(*_torch_graph.example(half, feeds, "cpu"))
        assert got.dtype == torch.bfloat16
        np.testing.assert_allclose(got.float(), expected, rtol=0.05, atol=0.05)


@pytest.mark.slow
@pytest.mark.skipif(bool(aoti.unavailable()), reason=aoti.unavailable())
def test_a_package_takes_token_numbers(tmp_path):
    aoti.build(words(), tmp_path / "words.pt2")
    session = aoti.load(tmp_path / "words.pt2")
    assert session.dtypes == {"input": "int64"}
    for tokens in WORDS:
        (expected,) = onnxruntime.run(onnxruntime.load(words()), {"input": tokens})
        (got,) = aoti.run(session, {"input": tokens})
        np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-6)
