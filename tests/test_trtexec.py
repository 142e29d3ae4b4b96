"""hw_profiles.trtexec on small files in the formats of TensorRT's tool."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hw_profiles import trtexec
from hw_profiles.ingest import Kernel
from hw_profiles.op import Op, Tape
from nas.errors import NasctlError

ROW32 = "Thirty-two wide channel vectorized row major Int8 format"


def saved(folder: Path, name: str, content: object) -> Path:
    path = folder / name
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


# ---- trtexec --exportTimes -----------------------------------------------------------------------


def call(start: float, ms: float) -> dict[str, float]:
    """One entry, as sampleReporting.cpp writes it: six digits, no data transfers."""
    stamps = {
        "startEnqMs": start - 0.02,
        "endEnqMs": start,
        "startH2dMs": start,
        "endH2dMs": start,
        "startComputeMs": start,
        "endComputeMs": start + ms,
        "startD2hMs": start + ms,
        "endD2hMs": start + ms,
        "h2dMs": 0.0,
        "computeMs": ms,
        "d2hMs": 0.0,
        "latencyMs": ms,
    }
    return {key: float(f"{value:.6g}") for key, value in stamps.items()}


def test_a_network_is_the_median_of_its_calls(tmp_path):
    path = saved(tmp_path, "t.json", [call(7 + i, ms) for i, ms in enumerate((0.27, 0.26, 0.3))])
    time = trtexec.network(path)
    assert time.median_ms == pytest.approx(0.27)
    assert time.spread_ms == pytest.approx(0.02)
    assert time.n == 3


def test_stamps_of_a_long_run_are_rounded_and_still_agree(tmp_path):
    """After 12 s six digits are tenths of a millisecond."""
    path = saved(tmp_path, "t.json", [call(12345.678, 0.271968), call(98765.4321, 0.27)])
    assert trtexec.network(path).median_ms == pytest.approx(0.271, abs=0.001)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"computeMs": -0.3}, "computeMs is -0.3"),
        ({"computeMs": 270.0}, "computeMs is 270, from start to end it is 0.27 ms"),
        ({"computeMs": "0.27"}, "not a number"),
        ({"computeMs": None}, "not a number"),
        ({"computeMs": float("nan")}, "contains NaN"),
        ({"endComputeMs": float("inf")}, "contains Infinity"),
    ],
)
def test_a_wrong_time_refuses_the_file(change, message, tmp_path):
    path = saved(tmp_path, "t.json", [call(7, 0.27), call(8, 0.27) | change])
    with pytest.raises(NasctlError, match=message):
        trtexec.network(path)


@pytest.mark.parametrize("content", ["", "[]", "{}", "[1]", '[{"startComputeMs": 1.0,', "\0"])
def test_a_file_of_something_else_is_one_line(content, tmp_path):
    with pytest.raises(NasctlError, match="t.json") as error:
        trtexec.network(saved(tmp_path, "t.json", content))
    assert "\n" not in str(error.value)


def test_a_missing_file_is_one_line(tmp_path):
    with pytest.raises(NasctlError, match="none.json: cannot read it"):
        trtexec.network(tmp_path / "none.json")


# ---- trtexec --exportLayerInfo and --exportProfile -----------------------------------------------


def tensor(name: str, shape: list[int], kind: str = ROW32) -> dict[str, object]:
    return {"Name": name, "Location": "Device", "Dimensions": shape, "Format/Datatype": kind}


def convolution(name: str, c_in: int, c_out: int, size: int, **changes) -> dict[str, object]:
    """A 3x3 convolution with stride 1, padding 1, bias and ReLU in int8."""
    return {
        "Name": name,
        "LayerType": "CaskConvolution",
        "Inputs": [tensor("x", [1, c_in, size, size])],
        "Outputs": [tensor("y", [1, c_out, size, size])],
        "ParameterType": "Convolution",
        "Kernel": [3, 3],
        "PaddingMode": "kEXPLICIT_ROUND_DOWN",
        "PrePadding": [1, 1],
        "PostPadding": [1, 1],
        "Stride": [1, 1],
        "Dilation": [1, 1],
        "OutMaps": c_out,
        "Groups": 1,
        "Weights": {"Type": "Int8", "Count": c_in * c_out * 9},
        "Bias": {"Type": "Float", "Count": c_out},
        "Activation": "RELU",
        "TacticValue": "0x0",
    } | changes


DEPTHWISE = convolution("dw", 32, 32, 28, Groups=32, Weights={"Type": "Int8", "Count": 288})
STRIDED = convolution(
    "strided", 16, 24, 28, Stride=[2, 2], Outputs=[tensor("y", [1, 24, 14, 14])], Activation="NONE"
)
RESIDUAL = convolution(
    "conv + add", 32, 32, 14, Inputs=[tensor("x", [1, 32, 14, 14]), tensor("r", [1, 32, 14, 14])]
)
POOL = {
    "Name": "GlobalAveragePool_7",
    "LayerType": "TiledPooling",
    "Inputs": [tensor("x", [1, 64, 7, 7])],
    "Outputs": [tensor("y", [1, 64, 1, 1])],
    "ParameterType": "Pooling",
    "PoolingType": "AVERAGE",
    "WindowSize": [7, 7],
    "PrePadding": [0, 0],
    "PostPadding": [0, 0],
    "Stride": [1, 1],
}
REFORMAT = {
    "Name": "Reformatting CopyNode for Input Tensor 0 to conv",
    "LayerType": "Reformat",
    "Inputs": [tensor("x", [1, 3, 28, 28], "Row major linear FP32")],
    "Outputs": [tensor("y", [1, 3, 28, 28])],
    "ParameterType": "Reformat",
}
LAYERS = [REFORMAT, convolution("conv", 16, 32, 28), DEPTHWISE, STRIDED, RESIDUAL, POOL]


def engine(folder: Path, layers: list, times: list[float] | None = None, count: int = 1000):
    """Paths of the two files of one engine."""
    times = times or [0.01 * (at + 1) for at in range(len(layers))]
    rows = [
        {
            "name": layer["Name"],
            "timeMs": ms * count,
            "averageMs": ms,
            "medianMs": ms,
            "percentage": 100 * ms / sum(times),
        }
        for layer, ms in zip(layers, times, strict=True)
    ]
    info = saved(folder, "layers.json", {"Layers": layers, "Bindings": ["x", "y"]})
    return info, saved(folder, "profile.json", [{"count": count}, *rows])


def test_kernels_of_an_engine(tmp_path):
    kernels = trtexec.kernels(*engine(tmp_path, LAYERS), precision="int8")
    assert kernels.found == (
        Kernel("conv", Op("conv", 16, 32, 28, 28, 3, act="relu", bias=True), 0.02, 1000),
        Kernel("dw", Op("dwconv", 32, 32, 28, 28, 3, 1, 32, "relu", bias=True), 0.03, 1000),
        Kernel("strided", Op("conv", 16, 24, 28, 28, 3, 2, bias=True), 0.04, 1000),
        Kernel("conv + add", Op("conv", 32, 32, 14, 14, 3, act="relu", bias=True), 0.05, 1000),
        Kernel("GlobalAveragePool_7", Op("gap", 64, 64, 7, 7), 0.06, 1000),
    )
    assert [layer.why for layer in kernels.skipped] == ["Reformat is not translated"]
    assert kernels.share == pytest.approx(0.20 / 0.21)
    assert [len(kernel.op.reads) for kernel in kernels.found] == [1, 1, 1, 2, 1]


def test_a_table_takes_what_was_timed_alone_whatever_carries_the_bias(tmp_path):
    kernels = trtexec.kernels(*engine(tmp_path, LAYERS), precision="int8")
    tape = Tape(16, 28)
    tape.conv(tape.input, 32, kernel=3, norm=True, act="relu")
    fused = Op("conv", 32, 32, 14, 14, 3, act="relu", bias=True)
    measured = kernels.measured([*tape.ops, fused])
    assert {op.c_in: time.median_ms for op, time in measured.items()} == {16: 0.02}


def test_layers_of_one_name_are_told_apart_by_their_order(tmp_path):
    layers = [convolution("same", 8, 8, 16), convolution("same", 8, 16, 16)]
    kernels = trtexec.kernels(*engine(tmp_path, layers), precision="int8")
    assert [(kernel.op.c_out, kernel.ms) for kernel in kernels.found] == [(8, 0.01), (16, 0.02)]


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"Dilation": [2, 2]}, "is dilated"),
        ({"Kernel": [3, 1]}, "not square"),
        ({"Activation": "TANH"}, "activation TANH"),
        ({"Outputs": [tensor("y", [1, 32, 26, 26])]}, "pads or dilates"),
        ({"Weights": {"Type": "Int8", "Count": 7}}, "7 weights where 4608"),
        ({"Weights": {"Type": "Half", "Count": 4608}}, "runs in fp16"),
        ({"ParameterType": "Convolution3D"}, "Convolution3D is not translated"),
    ],
)
def test_what_no_op_describes_is_listed_with_the_reason(change, why, tmp_path):
    layers = [convolution("odd", 16, 32, 28) | change, POOL]
    kernels = trtexec.kernels(*engine(tmp_path, layers), precision="int8")
    assert [layer.layer for layer in kernels.skipped] == ["odd"]
    assert why in kernels.skipped[0].why


def test_version_11_names_tensors_and_types_in_its_own_way(tmp_path):
    pool = POOL | {"Inputs": [{"Dimensions": [1, 64, 7, 7], "DataType": "Half", "Format": "?"}]}
    info, profile = engine(tmp_path, [pool])
    saved(tmp_path, "layers.json", {"Layers": [pool], "I/O Tensors": []})
    assert len(trtexec.kernels(info, profile, precision="fp16").found) == 1


def test_another_precision_or_batch_is_refused(tmp_path):
    files = engine(tmp_path, LAYERS)
    with pytest.raises(NasctlError, match="no layer of the engine .* in fp16.*runs in int8"):
        trtexec.kernels(*files, precision="fp16")
    with pytest.raises(NasctlError, match="layer 'conv': has batch 1, not 8"):
        trtexec.kernels(*files, precision="int8", batch=8)
    with pytest.raises(NasctlError, match="unknown precision 'half'"):
        trtexec.kernels(*files, precision="half")


def test_files_of_two_engines_are_refused(tmp_path):
    info, profile = engine(tmp_path, LAYERS)
    saved(tmp_path, "layers.json", {"Layers": LAYERS[:2]})
    with pytest.raises(NasctlError, match="times a layer that layers.json does not have: 'dw'"):
        trtexec.kernels(info, profile, precision="int8")


def test_an_engine_without_details_says_how_to_build_one_with(tmp_path):
    info, profile = engine(tmp_path, LAYERS)
    saved(tmp_path, "layers.json", {"Layers": ["conv", "dw"], "Bindings": []})
    with pytest.raises(NasctlError, match="--profilingVerbosity=detailed"):
        trtexec.kernels(info, profile, precision="int8")


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"name": "conv", "timeMs": 20.0, "averageMs": 20.0}, "1000 calls of averageMs make 2"),
        ({"name": "conv", "timeMs": 20.0, "averageMs": 0.02, "medianMs": 20.0}, "mixed units"),
        ({"name": "conv", "timeMs": -20.0, "averageMs": -0.02}, "timeMs is -20"),
        ({"name": "conv", "timeMs": 20.0}, "averageMs is None"),
    ],
)
def test_a_wrong_profile_is_refused(row, message, tmp_path):
    info, profile = engine(tmp_path, LAYERS)
    saved(tmp_path, "profile.json", [{"count": 1000}, row])
    with pytest.raises(NasctlError, match=message):
        trtexec.kernels(info, profile, precision="int8")


@given(cut=st.integers(0, 400))
def test_a_file_cut_anywhere_is_an_error_of_ours(cut, tmp_path_factory):
    info, profile = engine(tmp_path_factory.mktemp("cut"), [convolution("conv", 8, 8, 16)])
    text = info.read_text()
    info.write_text(text[: min(cut, len(text) - 1)])
    with pytest.raises(NasctlError, match="layers.json"):
        trtexec.kernels(info, profile, precision="int8")
