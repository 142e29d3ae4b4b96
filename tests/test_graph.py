"""hw_profiles.graph and the ONNX Runtime behind it: right values, clear errors."""

import numpy as np
import onnx
import pytest
import torch
import torch.nn.functional as F
from onnx import numpy_helper

from hw_profiles.graph import ACTS, onnx_graph
from hw_profiles.op import INPUT, Op, Tape
from hw_profiles.runtimes import onnxruntime
from nas.errors import NasctlError, UsageError

ACT = {
    "": lambda x: x,
    "relu": F.relu,
    "hswish": F.hardswish,
    "hsigmoid": F.hardsigmoid,
    "silu": F.silu,
    "gelu": F.gelu,
}


def torch_reference(model, ops, x):
    """The same op list in torch with the graph's weights: an independent second reading of Op."""
    weights = {
        w.name: torch.from_numpy(numpy_helper.to_array(w).copy()) for w in model.graph.initializer
    }

    def parameters(at, op):
        name = "output" if at == len(ops) - 1 else f"t{at}"
        name += ".pre" if op.act else ""
        return weights[f"{name}.weight"], weights.get(f"{name}.bias")

    values = {INPUT: torch.from_numpy(x)}
    for at, op in enumerate(ops):
        a, *rest = (values[read] for read in op.reads)
        pad = 0 if op.kernel % 2 == 0 else op.kernel // 2
        if op.kind in ("conv", "dwconv"):
            y = F.conv2d(a, *parameters(at, op), op.stride, pad, groups=op.groups)
        elif op.kind == "linear":
            y = F.linear(a.flatten(1), *parameters(at, op))[:, :, None, None]
        elif op.kind == "avgpool":
            y = F.avg_pool2d(a, op.kernel, op.stride, pad, count_include_pad=False)
        elif op.kind == "maxpool":
            y = F.max_pool2d(a, op.kernel, op.stride, pad)
        elif op.kind == "upsample":
            y = F.interpolate(a, scale_factor=op.stride, mode="bilinear", align_corners=False)
        elif op.kind == "gap":
            y = a.mean((2, 3), keepdim=True)
        elif op.kind == "concat":
            y = torch.cat([a, *rest], 1)
        else:
            y = {"add": torch.add, "mul": torch.mul}[op.kind](a, rest[0]) if rest else a
        values[at] = ACT[op.act](y)
    return values[len(ops) - 1].numpy()


def check(tape, rows=3):
    model = onnx_graph(tape.ops, batch=None)
    last = tape.ops[-1]
    x = np.random.default_rng(1).standard_normal((rows, tape.input.c, tape.input.h, tape.input.w))
    x = x.astype(np.float32)
    found = onnxruntime.run(onnxruntime.load(model.SerializeToString()), {"input": x})[0]
    expected = torch_reference(model, tape.ops, x)
    assert found.size == rows * last.elements_out
    np.testing.assert_allclose(found.reshape(expected.shape), expected, rtol=1e-4, atol=1e-5)
    assert np.abs(expected).max() > 0.1  # not a comparison of zeros


@pytest.mark.parametrize("act", ["", *ACTS])
def test_convolution_with_each_activation(act):
    tape = Tape(6, 9)
    tape.conv(tape.input, 8, kernel=3, stride=2, norm=True, act=act)
    check(tape)


def test_grouped_and_depthwise_convolutions():
    tape = Tape(8, 7)
    x = tape.conv(tape.input, 8, kernel=5, groups=8, bias=True)
    tape.conv(x, 4, kernel=3, groups=2)
    check(tape)


@pytest.mark.parametrize("kind", ["avgpool", "maxpool"])
@pytest.mark.parametrize(("kernel", "stride"), [(2, 2), (3, 1), (3, 2)])
def test_pools(kind, kernel, stride):
    tape = Tape(3, 8)
    getattr(tape, kind)(tape.input, kernel=kernel, stride=stride)
    check(tape)


@pytest.mark.parametrize("factor", [2, 4])
def test_upsampling_and_a_linear_layer_that_reads_a_map(factor):
    tape = Tape(3, 4, 6)
    x = tape.upsample(tape.conv(tape.input, 5), factor)
    assert (x.h, x.w) == (4 * factor, 6 * factor)
    tape.linear(tape.flatten(x), 7)
    check(tape)


def test_residual_with_squeeze_excite_of_linear_layers():
    tape = Tape(8, 6)
    x = tape.conv(tape.input, 8, kernel=3, norm=True, act="hswish")
    gate = tape.linear(tape.linear(tape.gap(x), 4, act="relu"), 8, act="hsigmoid")
    tape.add(tape.mul(x, gate), tape.input, act="relu")
    check(tape)


def test_squeeze_excite_of_convolutions_and_concat_and_classifier():
    tape = Tape(8, 6)
    x = tape.act(tape.input, "silu")
    gate = tape.conv(tape.conv(tape.gap(x), 4, bias=True, act="relu"), 8, bias=True, act="hsigmoid")
    x = tape.concat(tape.mul(x, gate), x, tape.input)
    tape.linear(tape.gap(x), 10)
    check(tape)


def test_batch_is_fixed_unless_left_free():
    tape = Tape(3, 4)
    tape.conv(tape.input, 5)
    fixed, free = (
        onnx_graph(tape.ops, batch=batch).graph.input[0].type.tensor_type.shape.dim[0]
        for batch in (1, None)
    )
    assert fixed.dim_value == 1
    assert free.dim_param == "batch"


def test_same_seed_same_file():
    tape = Tape(3, 4)
    tape.conv(tape.input, 5, kernel=3, bias=True)
    one, same, other = (onnx_graph(tape.ops, seed=s).SerializeToString() for s in (1, 1, 2))
    assert one == same
    assert one != other


def test_an_op_that_nobody_reads_is_an_output_and_so_is_not_dropped():
    tape = Tape(3, 4)
    x = tape.conv(tape.input, 5)
    tape.conv(x, 7)
    tape.conv(x, 2)
    assert [o.name for o in onnx_graph(tape.ops).graph.output] == ["output_1", "output"]


def test_folded_norm_leaves_a_bias_and_no_node():
    tape = Tape(3, 4)
    tape.conv(tape.input, 5, norm=True)
    graph = onnx_graph(tape.ops).graph
    assert [node.op_type for node in graph.node] == ["Conv"]
    assert [list(w.dims) for w in graph.initializer] == [[5, 3, 1, 1], [5]]


def test_unknown_names_are_errors_with_the_known_ones():
    with pytest.raises(UsageError, match="convv.*Did you mean conv"):
        onnx_graph([Op("convv", 3, 3, 4, 4)])
    with pytest.raises(UsageError, match="mish.*relu"):
        onnx_graph([Op("conv", 3, 3, 4, 4, act="mish")])


def test_a_join_of_one_tensor_and_a_network_without_input_are_refused():
    with pytest.raises(ValueError, match="add reads two tensors"):
        onnx_graph([Op("add", 3, 3, 4, 4)])
    with pytest.raises(ValueError, match="input"):
        onnx_graph([Op("conv", 3, 3, 4, 4, reads=(0,))])


def test_damaged_models_give_one_clear_line(tmp_path):
    tape = Tape(3, 4)
    tape.conv(tape.input, 5)
    whole = onnx_graph(tape.ops).SerializeToString()
    cut = tmp_path / "cut.onnx"
    cut.write_bytes(whole[: len(whole) // 2])
    for model in (cut, b"", b"not a model"):
        with pytest.raises(NasctlError, match="cannot load it") as caught:
            onnxruntime.load(model)
        assert "\n" not in str(caught.value)
    with pytest.raises(NasctlError, match="no such file"):
        onnxruntime.load(tmp_path / "absent.onnx")


def test_a_wrong_feed_names_what_the_model_takes():
    tape = Tape(3, 4)
    tape.conv(tape.input, 5)
    session = onnxruntime.load(onnx_graph(tape.ops).SerializeToString())
    for feeds in ({}, {"input": np.zeros((1, 3, 5, 4), np.float32)}):
        with pytest.raises(NasctlError, match=r"allowed: input \[1, 3, 4, 4\]"):
            onnxruntime.run(session, feeds)


def test_an_absent_library_is_named(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "onnxruntime", None)
    with pytest.raises(NasctlError, match="pip install onnxruntime"):
        onnxruntime.version()


def test_two_threads_compute_the_same():
    tape = Tape(3, 8)
    tape.conv(tape.input, 5, kernel=3)
    model = onnx_graph(tape.ops).SerializeToString()
    feeds = {"input": np.ones((1, 3, 8, 8), np.float32)}
    one, two = (onnxruntime.run(onnxruntime.load(model, threads=n), feeds)[0] for n in (1, 2))
    np.testing.assert_allclose(one, two, rtol=1e-5)


def test_file_version_is_the_oldest_that_the_opset_needs():
    tape = Tape(3, 4)
    tape.conv(tape.input, 5)
    model = onnx_graph(tape.ops)
    assert (model.opset_import[0].version, model.ir_version) == (18, 8)
    assert isinstance(model, onnx.ModelProto)
