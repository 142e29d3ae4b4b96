"""The contract of hw_profiles.runtimes, over every runtime's file."""

from __future__ import annotations

import inspect
import re
import time

import numpy as np
import pytest
from test_layers import loaded_by

from hw_profiles import runtimes
from hw_profiles.graph import onnx_graph
from hw_profiles.measure import Plan, interleaved
from hw_profiles.op import Tape
from hw_profiles.runtimes import Clock, Compiled, Runtime, Session, onnxruntime
from nas.errors import NasctlError, UsageError

ALL = runtimes.names()
HEAVY = ("torch", "onnx", "onnxruntime", "openvino", "tensorrt")
#: a model of a runtime that compiles takes it half a minute
LOADING = [
    pytest.param(name, marks=pytest.mark.slow if name.startswith("aoti") else ()) for name in ALL
]


def network(channels=8):
    """Every kind of operator that our spaces have, and several outputs."""
    tape = Tape(3, 16)
    x = tape.conv(tape.input, channels, kernel=3, norm=True, act="hswish")
    y = tape.conv(x, channels, kernel=5, groups=channels, norm=True, act="silu")
    gate = tape.conv(tape.gap(y), 4, bias=True, act="relu")
    y = tape.mul(y, tape.conv(gate, channels, bias=True, act="hsigmoid"))
    x = tape.add(tape.maxpool(tape.concat(x, y)), tape.avgpool(tape.concat(y, x)), act="relu")
    tape.conv(x, 3)
    tape.linear(tape.linear(tape.gap(x), 6, act="relu"), 10)
    return tape.ops


MODEL = onnx_graph(network()).SerializeToString()
FEEDS = {"input": np.random.default_rng(5).standard_normal((1, 3, 16, 16)).astype(np.float32)}


@pytest.fixture(scope="module")
def expected():
    return onnxruntime.run(onnxruntime.load(MODEL), FEEDS)


def here(name):
    """The runtime, or the test is skipped and says what is missing."""
    runtime = runtimes.load_module(name)
    if missing := runtime.unavailable():
        pytest.skip(missing)
    return runtime


def parameters(function):
    """Of a function, or of a protocol's method without its self."""
    found = inspect.signature(function).parameters.values()
    return [(p.name, p.kind, p.default) for p in found if p.name != "self"]


# ---- the signature -------------------------------------------------------------------------------


def test_runtimes_are_found_by_file_name():
    assert {"onnxruntime", "openvino", "tensorrt", "torch_cuda"} <= set(ALL)
    assert not [name for name in ALL if name.startswith("_")]
    with pytest.raises(UsageError, match="unknown runtime 'openvin'.*Did you mean openvino"):
        runtimes.load_module("openvin")


@pytest.mark.parametrize("name", ALL)
def test_every_runtime_has_the_signature(name):
    runtime = runtimes.load_module(name)
    assert runtime.__doc__ and runtime.TIMED and set(runtime.PRECISIONS) > {"fp32"}
    wanted = dict(inspect.getmembers(Runtime, inspect.isfunction))
    assert hasattr(runtime, "build") == hasattr(runtime, "ENGINE")
    if hasattr(runtime, "build"):
        wanted["build"] = Compiled.build
        assert runtime.ENGINE != ".onnx"
    else:
        assert runtime.SUFFIX == ".onnx"
    methods = {key: value for key, value in wanted.items() if not key.startswith("_")}
    assert len(methods) >= 6
    for key, method in methods.items():
        own = parameters(getattr(runtime, key))
        extra = [p for p in own if p not in parameters(method)]
        assert [p for p in own if p not in extra] == parameters(method), key
        # more options may be offered, never demanded
        assert all(p[1] is inspect.Parameter.KEYWORD_ONLY for p in extra)
        assert all(p[2] is not inspect.Parameter.empty for p in extra)


def test_importing_every_runtime_imports_no_library():
    code = "\n".join(f"import hw_profiles.runtimes.{name}" for name in ALL)
    assert loaded_by(code, HEAVY) == ""


@pytest.mark.parametrize("name", ALL)
def test_what_is_missing_is_one_line_and_every_use_repeats_it(name):
    runtime = runtimes.load_module(name)
    missing = runtime.unavailable()
    assert "\n" not in missing and missing == missing.strip()
    if missing:
        with pytest.raises(NasctlError) as caught:
            runtime.load(MODEL)
        assert missing.split(":")[0] in str(caught.value)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ALL)
def test_a_precision_that_is_not_offered_is_refused(name):
    runtime = runtimes.load_module(name)
    with pytest.raises(NasctlError, match="offers no fp12; allowed: fp32"):
        runtime.load(MODEL, precision="fp12")


# ---- where it is here ----------------------------------------------------------------------------


@pytest.mark.parametrize("name", LOADING)
def test_a_tiny_network_computes_what_onnx_runtime_computes(name, expected):
    runtime = here(name)
    assert runtime.version()
    session = runtime.load(MODEL, precision="fp32")
    assert session.inputs == {"input": (1, 3, 16, 16)}
    assert session.outputs == ("output_11", "output")
    found = runtime.run(session, FEEDS)
    assert len(found) == len(expected) == 2
    for mine, theirs in zip(found, expected, strict=True):
        assert np.abs(theirs).max() > 0.1
        np.testing.assert_allclose(mine, theirs, atol=1e-4 * np.abs(theirs).max())
    assert runtime.observed_precision(session) == "fp32"
    again = runtime.run(session, {"input": 2 * FEEDS["input"]})
    assert np.abs(again[1] - found[1]).max() > 1e-3  # and not the first outputs' own buffers

    seconds = runtime.timed(session, FEEDS)
    began = time.perf_counter()
    took = [seconds() for _ in range(3)]
    assert 0 < sum(took) <= time.perf_counter() - began


@pytest.mark.parametrize("name", LOADING)
def test_a_precision_is_obeyed_or_refused(name, expected):
    runtime = here(name)
    for precision in runtime.PRECISIONS[1:]:
        try:
            session = runtime.load(MODEL, precision=precision)
        except NasctlError as error:
            assert f"asked to compute in {precision}" in str(error)
            continue
        assert precision in runtime.observed_precision(session)
        found = runtime.run(session, FEEDS)[1]
        off = np.abs(found - expected[1]).max() / np.abs(expected[1]).max()
        assert 1e-6 < off < 0.05  # not float32, and not something else


@pytest.mark.parametrize("name", LOADING)
def test_bad_models_and_bad_feeds_are_one_line(name, tmp_path):
    runtime = here(name)
    cut = tmp_path / "cut.onnx"
    cut.write_bytes(MODEL[: len(MODEL) // 2])
    for model in (cut, b"", b"no model", tmp_path / "absent.onnx"):
        with pytest.raises(NasctlError) as caught:
            runtime.load(model)
        assert "\n" not in str(caught.value)
    if runtime.SUFFIX != ".onnx":
        return  # compiling takes long: their feeds are tested with their files
    session = runtime.load(MODEL)
    for feeds in ({}, {"input": np.zeros((1, 3, 16, 15), np.float32)}):
        with pytest.raises(NasctlError, match=r"allowed: input \[1, 3, 16, 16\]"):
            runtime.run(session, feeds)


@pytest.mark.parametrize("name", ["onnxruntime", "openvino"])
def test_a_free_batch_may_be_any(name):
    runtime = here(name)
    model = onnx_graph(network(), batch=None).SerializeToString()
    session = runtime.load(model)
    rows = np.concatenate([FEEDS["input"]] * 3)
    one, three = (runtime.run(session, {"input": x})[1] for x in (FEEDS["input"], rows))
    np.testing.assert_allclose(three, np.concatenate([one] * 3), rtol=1e-4, atol=1e-4)
    shape = runtimes.random_feeds(session, np.random.default_rng(0))["input"].shape
    assert shape == (1, 3, 16, 16)


# ---- the parts they share ------------------------------------------------------------------------


def test_a_float16_file_is_not_taken_for_float16_computing():
    """On a processor without such kernels ONNX Runtime computes it in float32 between casts."""
    import onnx

    from hw_profiles.half import half

    twin = half(onnx.load_from_string(MODEL), "model").SerializeToString()
    session = onnxruntime.load(twin)
    assert onnxruntime.observed_precision(session) == "fp32"
    with pytest.raises(NasctlError, match="asked to compute in int8, but it computes in fp32"):
        onnxruntime.load(twin, precision="int8")


def test_the_clock_moves_by_what_a_call_says_and_otherwise_with_the_wall():
    clock = Clock()
    gpu_ms = {"fast": 0.003, "slow": 0.030}
    calls = [clock.of(lambda ms=ms: ms / 1e3) for ms in gpu_ms.values()]
    plan = Plan(rounds=4, max_rounds=4)
    timings = interleaved(calls, rng=np.random.default_rng(0), plan=plan, clock=clock)
    # a call's own figure, to the microsecond or so that reading the clock takes
    assert [t.median_ms for t in timings] == pytest.approx([0.003, 0.030], abs=0.003)
    before, wall = clock(), time.perf_counter()
    sum(range(100_000))
    assert clock() - before == pytest.approx(time.perf_counter() - wall, abs=1e-3)


def test_mixtures_are_summarised_with_the_most_frequent_first():
    assert runtimes.summary({}) == "?"
    assert runtimes.summary({"fp16": 3}) == "fp16"
    assert runtimes.summary({"fp32": 3, "int8": 18}) == "int8 18, fp32 3"
    runtimes.obeyed("int8", "int8 18, fp32 3", "m")
    runtimes.obeyed(None, "?", "m")
    runtimes.obeyed("fp32", "fp32 40, ? 12", "m")


@pytest.mark.parametrize(
    ("precision", "observed"),
    [
        ("fp16", "?"),
        ("fp16", "fp32 50, fp16 1"),
        ("bf16", "bf16 50, fp32 1"),
        ("fp32", "int8 2, fp32 1"),
        ("fp32", "fp32 50, fp16 1"),
        ("int8", "fp16"),
    ],
)
def test_a_mixture_is_not_taken_for_the_precision_asked_for(precision, observed):
    said = f"m: asked to compute in {precision}, but it computes in {observed}"
    with pytest.raises(NasctlError, match=re.escape(said)):
        runtimes.obeyed(precision, observed, "m")


def test_feeds_are_normal_noise_in_the_types_of_the_inputs():
    session = Session(None, "m", {"a": ("n", 400), "b": (2, 3)}, ("y",), {"b": "float16"})
    feeds = runtimes.random_feeds(session, np.random.default_rng(0))
    assert {k: (v.shape, v.dtype.name) for k, v in feeds.items()} == {
        "a": ((1, 400), "float32"),
        "b": ((2, 3), "float16"),
    }
    assert 0.9 < feeds["a"].std() < 1.1


def quantized():
    """A 3x3 convolution between quantize and dequantize nodes: u8 activations, s8 weights."""
    from onnx import TensorProto, helper, numpy_helper

    rng = np.random.default_rng(0)
    constants = {
        "scale": np.float32(0.05),
        "zero": np.uint8(128),
        "w8": rng.integers(-127, 128, (8, 8, 3, 3)).astype(np.int8),
        "w_scale": np.full(8, 0.01, np.float32),
        "w_zero": np.zeros(8, np.int8),
    }
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "scale", "zero"], ["xq"]),
        helper.make_node("DequantizeLinear", ["xq", "scale", "zero"], ["xd"]),
        helper.make_node("DequantizeLinear", ["w8", "w_scale", "w_zero"], ["w"], axis=0),
        helper.make_node("Conv", ["xd", "w"], ["c"], pads=[1] * 4, kernel_shape=[3, 3]),
        helper.make_node("QuantizeLinear", ["c", "scale", "zero"], ["cq"]),
        helper.make_node("DequantizeLinear", ["cq", "scale", "zero"], ["y"]),
    ]
    ends = [
        helper.make_tensor_value_info(name, TensorProto.FLOAT, (1, 8, 8, 8)) for name in ("x", "y")
    ]
    weights = [numpy_helper.from_array(np.asarray(v), name) for name, v in constants.items()]
    graph = helper.make_graph(nodes, "q", ends[:1], ends[1:], weights)
    opset = [helper.make_opsetid("", 18)]
    return helper.make_model(graph, opset_imports=opset, ir_version=8).SerializeToString()


@pytest.mark.parametrize("name", ["onnxruntime", "openvino"])
def test_a_quantized_file_is_seen_to_compute_in_int8(name):
    runtime = here(name)
    session = runtime.load(quantized(), precision="int8")
    assert runtime.observed_precision(session) == "int8"
    feeds = {"x": np.random.default_rng(1).standard_normal((1, 8, 8, 8)).astype(np.float32)}
    (found,) = runtime.run(session, feeds)
    (expected,) = onnxruntime.run(onnxruntime.load(quantized()), feeds)
    assert np.abs(found - expected).max() <= 0.05 + 1e-6  # a step of the output's scale
    with pytest.raises(NasctlError, match="asked to compute in fp32, but it computes in int8"):
        runtime.load(quantized(), precision="fp32")
