"""hw_profiles.ingest and hw_profiles.trtexec on small files in the formats of the tools."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hw_profiles import device as devices
from hw_profiles import ingest, trtexec
from hw_profiles.ingest import Kernel
from hw_profiles.latency import Interval, LatencyTable, Terms
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


# ---- nn-Meter ------------------------------------------------------------------------------------


def kernel_file(latency: object = "42.001 +- 1.0", **changes) -> dict[str, object]:
    config = {"HW": 14, "CIN": 98, "COUT": 120, "KERNEL_SIZE": 3, "STRIDES": 1} | changes
    entry = {"model": "m", "shapes": [[14, 14, 98]], "config": config, "latency": latency}
    return {"conv-bn-relu": {"id_0": entry}}


def test_nn_meter_kernels_need_their_unit(tmp_path):
    path = saved(tmp_path, "k.json", kernel_file())
    kernels = ingest.nn_meter(path, unit="us")
    op = Op("conv", 98, 120, 14, 14, 3, act="relu", norm=True)
    assert kernels.found == (Kernel("conv-bn-relu id_0", op, pytest.approx(0.042001), 1),)
    with pytest.raises(NasctlError, match="unknown unit 's'; allowed: ms, us"):
        ingest.nn_meter(path, unit="s")


def test_every_kind_that_has_an_op(tmp_path):
    sizes = {"HW": 14, "CIN": 32, "COUT": 48, "KERNEL_SIZE": 3, "STRIDES": 2, "POOL_STRIDES": 2}
    kinds = ("dwconv-relu6", "maxpool", "fc", "global-avgpool", "add", "hswish", "channelshuffle")
    content = {kind: {"a": {"config": sizes, "latency": "1.0 +- 0.1"}} for kind in kinds}
    kernels = ingest.nn_meter(saved(tmp_path, "k.json", content), unit="ms")
    assert [kernel.op for kernel in kernels.found] == [
        Op("dwconv", 32, 32, 14, 14, 3, 2, 32, "relu"),
        Op("maxpool", 32, 32, 14, 14, 3, 2),
        Op("linear", 32, 48, 1, 1, bias=True),
        Op("gap", 32, 32, 14, 14),
        Op("add", 32, 32, 14, 14),
        Op("act", 32, 32, 14, 14, act="hswish"),
    ]
    assert [layer.why for layer in kernels.skipped] == ["channelshuffle is not translated"]


def test_dimensions_may_be_in_the_file_beside_it(tmp_path):
    configs = saved(tmp_path, "c.json", kernel_file())
    path = saved(tmp_path, "k.json", {"conv-bn-relu": {"id_0": {"latency": "1.5 +- 0.2"}}})
    assert ingest.nn_meter(path, unit="ms", configs=configs).found[0].ms == 1.5
    with pytest.raises(NasctlError, match="DETAIL"):
        ingest.nn_meter(path, unit="ms")


def test_a_failed_run_is_not_a_time(tmp_path):
    content = kernel_file()
    content["conv-bn-relu"]["id_1"] = content["conv-bn-relu"]["id_0"] | {"latency": "0.0 +- 0.0"}
    kernels = ingest.nn_meter(saved(tmp_path, "k.json", content), unit="ms")
    assert [layer.why for layer in kernels.skipped] == ["was not measured"]


@pytest.mark.parametrize("text", ["-1.0 +- 0.1", "nan +- 0.1", "1.0", "1 ms +- 0.1", None, 4.2])
def test_a_latency_that_is_not_one_is_refused(text, tmp_path):
    with pytest.raises(NasctlError, match="conv-bn-relu id_0: latency is"):
        ingest.nn_meter(saved(tmp_path, "k.json", kernel_file(text)), unit="ms")


@pytest.mark.parametrize("value", [0, -3, 1.5, "14", None, True])
def test_a_size_that_is_not_one_is_refused(value, tmp_path):
    with pytest.raises(NasctlError, match="HW is .*positive integer"):
        ingest.nn_meter(saved(tmp_path, "k.json", kernel_file(HW=value)), unit="ms")


# ---- our own tables ------------------------------------------------------------------------------


def table(**changes) -> LatencyTable:
    device = devices.load("jetson-tx2")
    fields = {
        "device": device.name,
        "runtime": device.runtime,
        "precision": device.precision,
        "origin": "a colleague's",
        "constant_ms": 1.0,
        "fitted_on": ("mine",),
        "terms": {"conv": Terms(ms_per_gmac=10.0)},
        "intervals": dict.fromkeys(
            ("same", "cross", "analytic"), Interval(low=0.9, high=1.1, n=9, how="")
        ),
    }
    return LatencyTable(**(fields | changes))


def test_a_table_of_the_same_setting_is_taken(tmp_path):
    path = tmp_path / "t.json"
    table().save(path)
    mark = ingest.fingerprint(table())
    assert ingest.own(path, devices.load("jetson-tx2"), sha256=mark.upper()) == table()
    path.write_text(json.dumps(json.loads(path.read_text())))  # laid out anew, not changed
    assert ingest.fingerprint(LatencyTable.load(path)) == mark


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"device": "raspi4"}, "device raspi4, not jetson-tx2"),
        ({"runtime": "onnxruntime"}, "runtime onnxruntime"),
        ({"precision": "int8"}, "precision int8"),
        ({"batch": 8}, "batch 8, not 1"),
        ({"constant_ms": 0.5}, "its fingerprint is"),
    ],
)
def test_a_table_of_another_setting_or_content_is_refused(change, message, tmp_path):
    table(**change).save(tmp_path / "t.json")
    mark = ingest.fingerprint(table())
    with pytest.raises(NasctlError, match=message):
        ingest.own(tmp_path / "t.json", devices.load("jetson-tx2"), sha256=mark)


def test_a_table_is_checked_with_a_few_measured_networks():
    ops = [Op("conv", 16, 16, 32, 32, 3)]
    said = table().estimate(ops, "mine").value_ms
    assert ingest.revalidate(table(), [(ops, said * 1.05)] * 9 + [(ops, said * 1.2)], "mine") == 0.9
    with pytest.raises(NasctlError, match="0 of 3 networks .* take 1.50 times"):
        ingest.revalidate(table(), [(ops, said * 1.5)] * 3, "mine")
    with pytest.raises(NasctlError, match="no network"):
        ingest.revalidate(table(), [], "mine")


def test_one_network_outside_is_no_proof():
    """A true 90 % interval misses one of ten."""
    ops = [Op("conv", 16, 16, 32, 32, 3)]
    said = table().estimate(ops, "mine").value_ms
    assert ingest.revalidate(table(), [(ops, said * 2)], "mine") == 0.0


# ---- kernels as a table --------------------------------------------------------------------------


def timed_kernels(n=40):
    """Convolutions of a pretended GPU: 5 us and 1 us for every MMAC."""
    rng = np.random.default_rng(0)
    ops = []
    while len(ops) < n:
        c_in, c_out, size = (int(rng.choice(c)) for c in ((16, 32, 64), (16, 32, 64), (8, 16, 32)))
        ops.append(Op("conv", c_in, c_out, size, size, 3, act="relu", norm=True))
    found = [Kernel(f"k{at}", one, 5e-3 + one.macs * 1e-9, 1) for at, one in enumerate(ops)]
    return ingest.Kernels(tuple(found), ())


def test_kernels_make_a_table_of_measured_and_interpolated_operators(tmp_path):
    board = devices.load("jetson-orin-nano")
    kernels = timed_kernels()
    made = ingest.kernel_table(kernels, board, np.random.default_rng(0))
    made.save(tmp_path / "t.json")
    made = LatencyTable.load(tmp_path / "t.json")
    seen = kernels.found[0].op
    unseen = Op("conv", 48, 48, 16, 16, 3, act="relu", norm=True)
    other = Op("gap", 64, 64, 8, 8)
    measured, between, rest = (made.columns(one) for one in (seen, unseen, other))
    assert measured[0] == pytest.approx(5e-3 + seen.macs * 1e-9) and not measured[1:].any()
    assert between[2] == pytest.approx(5e-3 + unseen.macs * 1e-9, rel=0.2)
    assert not between[[0, 1, 3]].any()
    assert rest[3] > 0 and not rest[:3].any()  # as the datasheet says
    estimate = made.estimate([seen, unseen, other], "resnet")
    assert estimate.source == "analytic"
    assert set(estimate.shares) == {"measured", "interpolated", "analytic"}
    assert "kernels timed one by one" in made.origin


def test_a_table_does_not_care_who_carries_the_bias(tmp_path):
    made = ingest.kernel_table(
        timed_kernels(), devices.load("jetson-orin-nano"), np.random.default_rng(0)
    )
    seen = timed_kernels().found[0].op
    as_deployed = made.columns(seen.deployed())
    assert (made.columns(seen) == as_deployed).all()


def test_ingest_of_kernels(nasctl, workdir):
    sizes = [(c, size) for c in (8, 16, 24, 32) for size in (8, 16, 28, 32)]
    entries = {
        f"k{at}": {
            "config": {"HW": size, "CIN": c, "COUT": c, "KERNEL_SIZE": 3, "STRIDES": 1},
            "latency": f"{20 + c * c * size * size * 9e-6} +- 1",
        }
        for at, (c, size) in enumerate(sizes)
    }
    saved(
        workdir,
        "kernels.json",
        {"conv-bn-relu": entries, "hole": {"x": {"config": {"CIN": 1}, "latency": "1 +- 1"}}},
    )
    command = ("ingest", "kernels.json", "--hw", "jetson-orin-nano", "--format", "nn-meter")
    assert "ms, us" in nasctl(*command).err
    outcome = nasctl(*command, "--unit", "us", "--json")
    assert outcome.code == 0, outcome.err
    assert "16 understood" in outcome.err and "hole is not translated" in outcome.err
    made = LatencyTable.load(workdir / "profiles/jetson-orin-nano.table.json")
    assert len(made.measured) == len(sizes)
    assert made.provenance["ingested"] == "nn-meter file kernels.json"
    assert json.loads(outcome.out)["sha256"] == ingest.fingerprint(made)
    again = nasctl(*command, "--unit", "us")
    assert again.code == 2 and "--force" in again.err


def test_ingest_of_a_table(nasctl, workdir):
    path = workdir / "theirs.json"
    table().save(path)
    command = ("ingest", "theirs.json", "--hw", table().device)
    wrong = nasctl(*command, "--sha256", "0" * 64)
    assert wrong.code == 1 and "fingerprint" in wrong.err
    assert not (workdir / "profiles").exists()
    taken = nasctl(*command, "--sha256", ingest.fingerprint(table()))
    assert taken.code == 0, taken.err
    other = nasctl("ingest", "theirs.json", "--hw", "raspi4")
    assert other.code == 1 and "measured with device" in other.err
