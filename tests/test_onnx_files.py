"""deploy.onnx: several inputs, free sizes, large weights beside the file, files of strangers."""

import numpy as np
import onnx
import pytest
import torch
from nets import Words
from onnx import TensorProto, helper
from onnx.external_data_helper import set_external_data
from torch import nn

from deploy import external, verify
from deploy import onnx as files
from hw_profiles.graph import onnx_graph
from hw_profiles.op import Tape
from hw_profiles.runtimes import onnxruntime
from nas.errors import NasctlError


def image_net(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Conv2d(16, 4, 3, 2)).eval()


class Bessel(nn.Module):
    def forward(self, x):
        return torch.special.bessel_j0(x)


class Branches(nn.Module):
    def forward(self, x):
        return x if x.sum() > 0 else -x


def test_sizes_that_are_free_take_any_value(tmp_path):
    net, path = image_net(), tmp_path / "model.onnx"
    files.export(net, path, input_shape=(3, 12, 12), free=("batch", "height", "width"))
    assert onnxruntime.load(path).inputs == {"input": ("batch", 3, "height", "width")}
    rng = np.random.default_rng(0)
    for size in ((12, 12), (9, 20)):
        images = rng.standard_normal((4, 3, *size)).astype(np.float32)
        assert verify.parity(net, path, images) < 1e-5


def test_zeros_around_a_pool_count(tmp_path):
    net, path = nn.Sequential(nn.ConstantPad2d(1, 0.0), nn.MaxPool2d(3, 2)), tmp_path / "m.onnx"
    files.export(net, path, input_shape=(3, 8, 8))
    images = -1 - np.random.default_rng(0).random((4, 3, 8, 8), np.float32)
    assert verify.parity(net, path, images) < 1e-6
    assert onnxruntime.run(onnxruntime.load(path), {"input": images})[0].max() == 0


@pytest.mark.slow
def test_several_inputs_share_the_dimension_of_one_name(tmp_path):
    net, path = Words().eval(), tmp_path / "words.onnx"
    inputs = {"ids": torch.zeros(2, 7, dtype=torch.int64), "mask": torch.ones(2, 7)}
    axes = {0: "batch", 1: "length"}
    files.export_inputs(net, path, inputs, {"ids": axes, "mask": axes})
    session = onnxruntime.load(path)
    assert session.inputs == {"ids": ("batch", "length"), "mask": ("batch", "length")}
    feeds = {"ids": torch.randint(0, 11, (5, 4)), "mask": torch.rand(5, 4) + 0.1}
    with torch.no_grad():
        expected = net(**feeds).numpy()
    (found,) = onnxruntime.run(session, {name: x.numpy() for name, x in feeds.items()})
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)


def test_a_draft_names_what_it_cannot_translate_too(tmp_path):
    net = nn.Sequential(nn.Linear(4, 4), nn.Sequential(nn.ReLU(), Bessel()))
    with pytest.raises(NasctlError, match=r"^module '1.1' \(Bessel\).*aten.special_bessel_j0 has"):
        files.draft(net, tmp_path / "m.onnx", torch.zeros(2, 4))
    assert not list(tmp_path.iterdir())


@pytest.mark.slow  # torch fails as slowly as it succeeds
def test_an_operator_without_a_translation_is_named_with_its_module(tmp_path):
    net = nn.Sequential(nn.Linear(4, 4), nn.Sequential(nn.ReLU(), Bessel()))
    with pytest.raises(NasctlError, match=r"^module '1.1' \(Bessel\).*operator prims.bessel_j0"):
        files.export_inputs(net, tmp_path / "m.onnx", {"x": torch.zeros(2, 4)}, {})
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_control_flow_on_values_is_quoted(tmp_path):
    with pytest.raises(NasctlError, match="at `return x if x.sum.. > 0 else -x`"):
        files.export(Branches(), tmp_path / "m.onnx", input_shape=(3, 8, 8))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_refused_by_name(tmp_path, bad):
    net = image_net()
    net[2].weight.data[0, 1, 2, 2] = bad
    with pytest.raises(NasctlError, match=r"weight '2.weight': 1 of 576 values are not finite"):
        files.export(net, tmp_path / "m.onnx", input_shape=(3, 8, 8))


# ---- weights beside the file ---------------------------------------------------------------------


def convolutions(seed=0):
    tape = Tape(3, 8)
    tape.conv(tape.conv(tape.input, 16, kernel=3, bias=True, act="relu"), 4)
    return onnx_graph(tape.ops, seed=seed)


def answer(path):
    images = np.random.default_rng(0).standard_normal((1, 3, 8, 8)).astype(np.float32)
    return onnxruntime.run(onnxruntime.load(path), {"input": images})[0]


@pytest.fixture
def large(tmp_path, monkeypatch):
    """A network whose weights are too many for one file, where that begins at a kilobyte."""
    monkeypatch.setattr(files, "INLINE", 1024)
    path = tmp_path / "model.onnx"
    files.write(convolutions(), path)
    return path


def test_weights_above_the_limit_are_beside_the_file(large, monkeypatch):
    (beside,) = (path for path in large.parent.iterdir() if path != large)
    assert beside.name.startswith("model.") and beside.suffix == ".data"
    assert external.externals(onnx.load(large, load_external_data=False), large) == [beside]
    monkeypatch.undo()
    files.write(convolutions(), whole := large.with_name("whole.onnx"))
    np.testing.assert_array_equal(answer(large), answer(whole))
    for one, other in zip(*(files.read(p).graph.initializer for p in (large, whole)), strict=True):
        assert (one.name, one.raw_data) == (other.name, other.raw_data)


def test_a_file_that_is_too_large_to_be_checked_in_memory_is_read(large, monkeypatch):
    monkeypatch.setattr(onnx.checker, "MAXIMUM_PROTOBUF", 2000)  # 2 GiB
    weights = [tensor.ByteSize() for tensor in files.read(large).graph.initializer]
    assert sum(weights) > 2000


def test_a_kill_between_weights_and_file_leaves_what_was_there(large, monkeypatch):
    before, expected, other = large.read_bytes(), answer(large), convolutions(seed=1)

    def killed(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(onnx.checker, "check_model", killed)  # the weights are there by then
    with pytest.raises(KeyboardInterrupt):
        files.write(other, large)
    assert len(list(large.parent.glob("*.data"))) == 2
    assert large.read_bytes() == before
    np.testing.assert_array_equal(answer(large), expected)


# ---- files of strangers --------------------------------------------------------------------------


def stranger(path, location):
    """A network whose weights are said to be at `location`."""
    weight = TensorProto(name="w", data_type=TensorProto.FLOAT, dims=[2, 2])
    weight.raw_data = bytes(16)
    set_external_data(weight, location, 0, 16)
    weight.ClearField("raw_data")
    value = [helper.make_tensor_value_info(n, TensorProto.FLOAT, [2, 2]) for n in ("x", "y")]
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["x", "w"], ["y"])], "g", value[:1], value[1:], [weight]
    )
    opset = [helper.make_opsetid("", 18)]
    path.write_bytes(helper.make_model(graph, opset_imports=opset).SerializeToString())
    return path


@pytest.mark.parametrize("location", ["../secret", "/etc/hostname", "a/b.data", "..", "a\\b"])
def test_weights_from_elsewhere_are_refused(tmp_path, location):
    (tmp_path / "secret").write_bytes(bytes(16))
    (tmp_path / "in").mkdir()
    with pytest.raises(NasctlError, match="wants weights from .* may be an attack"):
        files.read(stranger(tmp_path / "in" / "m.onnx", location))


def test_weights_of_a_node_from_elsewhere_are_refused_too(tmp_path):
    model = onnx.load(stranger(tmp_path / "m.onnx", "../secret"), load_external_data=False)
    held = model.graph.initializer.pop()
    model.graph.node.insert(0, helper.make_node("Constant", [], ["w"], value=held))
    onnx.save(model, tmp_path / "m.onnx")
    with pytest.raises(NasctlError, match="wants weights from '../secret'"):
        files.read(tmp_path / "m.onnx")


def test_of_several_places_of_one_weight_each_is_looked_at(tmp_path):
    model = onnx.load(stranger(tmp_path / "m.onnx", "../secret"), load_external_data=False)
    model.graph.initializer[0].external_data.add(key="location", value="w.data")
    with pytest.raises(NasctlError, match="wants weights from '../secret'"):
        external.externals(model, tmp_path / "m.onnx")


def test_a_link_to_elsewhere_is_refused_and_so_are_weights_that_are_absent(tmp_path):
    (tmp_path / "secret").write_bytes(bytes(16))
    path = stranger(tmp_path / "m.onnx", "w.data")
    with pytest.raises(NasctlError, match="weights are to be in w.data"):
        files.read(path)
    (tmp_path / "w.data").symlink_to(tmp_path / "secret")
    with pytest.raises(NasctlError, match="weights are to be in w.data"):
        files.read(path)
    (tmp_path / "w.data").unlink()
    (tmp_path / "w.data").write_bytes(bytes(16))
    assert files.read(path).graph.initializer[0].raw_data == bytes(16)


@pytest.mark.parametrize(
    ("content", "said"),
    [(b"\x08garbage\xff\xff", "is no ONNX file"), (b"", "holds no network"), (None, "cannot read")],
)
def test_what_is_no_onnx_file_is_one_clear_line(tmp_path, content, said):
    path = tmp_path / "m.onnx"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(NasctlError, match=said) as caught:
        files.read(path)
    assert "\n" not in str(caught.value)


def test_a_file_cut_anywhere_is_refused_or_whole(tmp_path):
    whole = stranger(tmp_path / "whole.onnx", "w.data").read_bytes()
    (tmp_path / "w.data").write_bytes(bytes(16))
    for length in range(0, len(whole), 7):
        (tmp_path / "cut.onnx").write_bytes(whole[:length])
        with pytest.raises(NasctlError):
            files.read(tmp_path / "cut.onnx")
