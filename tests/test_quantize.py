"""compress.quantize: the arithmetic that is asked for, and what is refused."""

import numpy as np
import onnx
import pytest
from onnx import numpy_helper
from onnxruntime import InferenceSession, SessionOptions

from compress import quantize
from compress.guard import relative_error
from compress.quantize import Scheme
from deploy import chain
from hw_profiles.graph import onnx_graph
from hw_profiles.op import Tape
from hw_profiles.runtimes import onnxruntime
from nas import space
from nas.errors import NasctlError, UsageError


def network(seed=0):
    """Convolutions, one depthwise, a residual sum, an average and a linear layer."""
    tape = Tape(3, 12)
    x = tape.conv(tape.input, 8, kernel=3, bias=True, act="relu")
    y = tape.conv(x, 8, kernel=3, groups=8, bias=True, act="hswish")
    x = tape.add(x, tape.conv(y, 8, bias=True), act="relu")
    tape.linear(tape.gap(x), 5)
    return onnx_graph(tape.ops, seed=seed, batch=None)


def batches(n=4, size=16, seed=0):
    rng = np.random.default_rng(seed)
    return [{"input": rng.standard_normal((size, 3, 12, 12)).astype(np.float32)} for _ in range(n)]


@pytest.fixture(scope="module")
def plain():
    return quantize.prepared(network())


def answers(model, some):
    session = onnxruntime.load(model.SerializeToString())
    return [onnxruntime.run(session, batch) for batch in some]


def made(plain, scheme, keep=()):
    return quantize.int8(plain, quantize.calibrate(plain, batches(), scheme), scheme, keep)


@pytest.fixture(scope="module")
def u8(plain):
    return made(plain, Scheme())


@pytest.fixture(scope="module")
def s8(plain):
    return made(plain, Scheme("s8"))


def test_outputs_stay_near_those_of_the_float_model(plain, u8, s8):
    expected = answers(plain, batches(seed=1))
    for model in (u8, s8):
        assert 0 < relative_error(expected, answers(model, batches(seed=1))) < 0.05


def test_every_multiplication_is_in_int8(u8, s8):
    session = onnxruntime.load(u8.SerializeToString())
    assert onnxruntime.observed_precision(session) == "int8"
    # ONNX Runtime lacks some kernels for s8, which is for TensorRT
    by_output = {name: node for node in s8.graph.node for name in node.output}
    readers = [node for node in s8.graph.node if node.op_type in quantize.MULTIPLY]
    assert len(readers) == 4
    for node in readers:
        assert [by_output[name].op_type for name in node.input[:2]] == ["DequantizeLinear"] * 2


def constants(model):
    return {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}


def test_s8_is_what_tensorrt_imports(s8):
    """Zero points all 0, no unsigned type, no integer biases."""
    values = constants(s8)
    kinds = ("QuantizeLinear", "DequantizeLinear")
    zeros = [values[node.input[2]] for node in s8.graph.node if node.op_type in kinds]
    assert zeros and all(zero.dtype == np.int8 and not zero.any() for zero in zeros)
    assert not [name for name, value in values.items() if value.dtype in (np.uint8, np.int32)]


def test_both_inputs_of_a_residual_sum_are_quantized(s8):
    by_output = {name: node for node in s8.graph.node for name in node.output}
    (add,) = (node for node in s8.graph.node if node.op_type == "Add")
    assert [by_output[name].op_type for name in add.input] == ["DequantizeLinear"] * 2


def test_s8_pairs_are_before_inputs_alone(plain, s8):
    """None between a convolution and its ReLU, on the answers or on what only one float reads."""
    outputs = {value.name for value in s8.graph.output}
    pairs = [node for node in s8.graph.node if node.op_type == "DequantizeLinear"]
    assert pairs
    for pair in pairs:
        assert pair.output[0] not in outputs
        readers = {node.op_type for node in s8.graph.node if pair.output[0] in node.input}
        assert readers and readers <= {*quantize.MULTIPLY, "Add"}
    assert any(node.op_type == "Relu" for node in plain.graph.node)


def test_of_sums_s8_quantizes_those_of_two_activations(plain):
    model = onnx.ModelProto()
    model.CopyFrom(plain)
    (logits,) = model.graph.output
    bias = numpy_helper.from_array(np.ones(5, np.float32), "shift")
    model.graph.initializer.append(bias)
    model.graph.node.append(onnx.helper.make_node("Add", [logits.name, "shift"], ["moved"], "move"))
    logits.name = "moved"
    twin = made(model, Scheme("s8"))
    (add,) = (node for node in twin.graph.node if node.name == "move")
    by_output = {name: node.op_type for node in twin.graph.node for name in node.output}
    assert by_output[add.input[0]] == "Gemm"
    listed = [node.name for node in quantize.quantized(model, Scheme("s8"))]
    assert "move" not in listed and len(listed) == 5
    assert "move" in [node.name for node in quantize.quantized(model, Scheme())]


def test_weights_are_symmetric_with_a_scale_per_output_channel(plain, u8):
    before, after = constants(plain), constants(u8)
    convolutions = [node for node in plain.graph.node if node.op_type == "Conv"]
    assert len(convolutions) == 3
    for node in convolutions:
        weight = before[node.input[1]]
        scale = after[f"{node.input[1]}_scale"]
        np.testing.assert_allclose(scale, np.abs(weight).max((1, 2, 3)) / 127, rtol=1e-5)
        assert not after[f"{node.input[1]}_zero_point"].any()


def test_one_convolution_is_what_rounding_says(plain):
    """Against quantization written out in numpy: at most one step of the output apart."""
    tape = Tape(4, 6)
    tape.conv(tape.input, 8)
    model = quantize.prepared(onnx_graph(tape.ops, batch=None))
    x = np.random.default_rng(3).standard_normal((64, 4, 6, 6)).astype(np.float32)
    scheme = Scheme("s8")
    twin = quantize.int8(model, quantize.calibrate(model, [{"input": x}], scheme), scheme)
    (weight,) = (value for value in constants(model).values() if value.ndim == 4)

    def rounded(values, largest):
        return np.clip(np.rint(values / (largest / 127)), -128, 127) * (largest / 127)

    w = rounded(weight, np.abs(weight).max((1, 2, 3), keepdims=True))
    expected = np.einsum("nchw,oc->nohw", rounded(x, np.abs(x).max()), w[:, :, 0, 0])
    ((found,),) = answers(twin, [{"input": x}])
    step = np.abs(answers(model, [{"input": x}])[0][0]).max() / 127
    assert np.abs(found - expected).max() <= step * 1.001


@pytest.mark.parametrize(
    "calibration", [pytest.param("entropy", marks=pytest.mark.slow), "percentile"]
)
def test_other_calibrations_give_outliers_less_room(plain, calibration):
    some = batches(2, size=160)
    some[0]["input"][0, 0, 0, 0] = 60.0
    scales = {}
    for name in ("minmax", calibration):
        scheme = Scheme(calibration=name)
        twin = quantize.int8(plain, quantize.calibrate(plain, some, scheme), scheme)
        scales[name] = float(constants(twin)["t1_scale"])
    assert scales[calibration] < 0.5 * scales["minmax"]


def test_nodes_that_are_kept_stay_in_float_in_the_runtime_too(plain):
    """Also those that have INT8 on both sides, which ONNX Runtime would quantize by itself."""
    multiplying = [node.name for node in plain.graph.node if node.op_type in ("Conv", "Gemm")]
    for name in multiplying:
        session = onnxruntime.load(made(plain, Scheme(), [name]).SerializeToString())
        assert onnxruntime.observed_precision(session) == "int8 3, fp32 1", name


def test_average_pooling_is_in_float_in_the_runtime_too(tmp_path):
    tape = Tape(3, 12)
    x = tape.avgpool(tape.conv(tape.input, 8, kernel=3, bias=True, act="relu"))
    tape.linear(tape.gap(tape.conv(x, 8, bias=True)), 5)
    plain = quantize.prepared(onnx_graph(tape.ops, seed=0, batch=None))
    settings, path = SessionOptions(), tmp_path / "optimised.onnx"
    settings.optimized_model_filepath = str(path)
    model = made(plain, Scheme())
    InferenceSession(model.SerializeToString(), settings, providers=["CPUExecutionProvider"])
    kinds = [node.op_type for node in onnx.load(path).graph.node]
    assert "AveragePool" in kinds and "QLinearAveragePool" not in kinds
    assert kinds.count("QLinearConv") == 2


def test_with_every_node_kept_it_is_the_float_model(plain):
    model = made(plain, Scheme(), [node.name for node in plain.graph.node])
    assert relative_error(answers(plain, batches()), answers(model, batches())) == 0


def test_depthwise_convolutions_are_found(plain):
    (name,) = quantize.depthwise(plain)
    (node,) = (node for node in plain.graph.node if node.name == name)
    assert next(a.i for a in node.attribute if a.name == "group") == 8


def test_nothing_is_changed_in_place_or_random(plain, u8):
    before = plain.SerializeToString(deterministic=True)
    scheme = Scheme()
    ranges = quantize.calibrate(plain, batches(), scheme)
    for keep in (["t2"], []):  # what was made before must not matter either
        again = quantize.int8(plain, ranges, scheme, keep)
    assert plain.SerializeToString(deterministic=True) == before
    assert again.SerializeToString(deterministic=True) == u8.SerializeToString(deterministic=True)


def test_the_quantizer_says_nothing(plain, capfd):
    made(plain, Scheme(calibration="percentile"))
    assert capfd.readouterr() == ("", "")


def test_nodes_get_names_of_their_own():
    model = network()
    for node in model.graph.node:
        node.name = "same"
    names = [node.name for node in quantize.prepared(model).graph.node]
    assert len(set(names)) == len(names)


@pytest.mark.parametrize(
    ("some", "said"),
    [
        ([], "no calibration data"),
        ([{"input": np.zeros((2, 3, 12, 13), np.float32)}], r"gets \[2, 3, 12, 13\]; allowed"),
        ([{"input": np.zeros((2, 3, 12), np.float32)}], r"gets \[2, 3, 12\]"),
        ([{"other": np.zeros((2, 3, 12, 12), np.float32)}], "allowed: input"),
        ([{"input": np.full((2, 3, 12, 12), np.nan, np.float32)}], "is not finite"),
    ],
)
def test_calibration_data_that_do_not_fit_are_refused(plain, some, said):
    with pytest.raises(NasctlError, match=said):
        quantize.calibrate(plain, some, Scheme())


def test_models_that_are_not_float_are_refused(u8):
    with pytest.raises(NasctlError, match="is quantized already"):
        quantize.prepared(u8)
    empty = network()
    empty.graph.ClearField("initializer")
    with pytest.raises(NasctlError, match="no float32 weights"):
        quantize.prepared(empty)
    with pytest.raises(UsageError, match="unknown calibration 'minimax'.*Did you mean minmax"):
        Scheme(calibration="minimax")


def test_int8_files_are_valid_onnx(u8, s8):
    for model in (u8, s8):
        onnx.checker.check_model(model, full_check=True)


@pytest.mark.slow
@pytest.mark.parametrize("activations", ["u8", "s8"])
@pytest.mark.parametrize("name", ["resnet", "mobilenet", "fbnet", "nasbench201"])
def test_networks_of_every_image_space_in_int8_run_and_stay_near(name, activations):
    found = space.load(name, size=32)
    genes = found.sample(np.random.default_rng(4), 1)[0]
    model = quantize.prepared(onnx_graph(found.ops(found.decode(genes)), batch=None))
    rng = np.random.default_rng(0)
    some = [{"input": rng.standard_normal((8, 3, 32, 32)).astype(np.float32)} for _ in range(2)]
    scheme = Scheme(activations)
    twin = quantize.int8(model, quantize.calibrate(model, some, scheme), scheme)
    error = relative_error(answers(model, some), answers(twin, some))
    assert 0 < error < chain.TOLERANCE["int8"]
    if activations == "u8":  # s8 leaves rounding the weights to TensorRT
        assert twin.ByteSize() < 0.6 * model.ByteSize()
