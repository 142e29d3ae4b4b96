"""The GPU runtimes' own logic on a machine without a GPU: a pretended driver and TensorRT.

Shows that calls have the right arguments, order and lifetimes, and that errors are clear; what a
real driver or TensorRT does with them is shown by nothing here (see docs/methods/runtimes.md).
"""

from __future__ import annotations

import ctypes
import gc
import importlib.machinery
import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pretend_tensorrt
import pytest
from bundles import small
from test_runtimes import FEEDS, MODEL

from deploy import bundle as bundles
from deploy import engine
from hw_profiles.runtimes import (
    Options,
    _cuda,
    _ort,
    onnxruntime,
    onnxruntime_cuda,
    tensorrt,
    torch_cuda,
)
from nas.errors import NasctlError

pytestmark = pytest.mark.skipif(shutil.which("gcc") is None, reason="needs gcc")
SOURCE = Path(__file__).parent / "pretend_cuda.c"


@pytest.fixture(scope="module")
def driver(tmp_path_factory):
    path = tmp_path_factory.mktemp("driver") / "libpretend.so"
    subprocess.run(["gcc", "-shared", "-fPIC", "-w", "-o", path, SOURCE], check=True)
    return path


@pytest.fixture
def gpu(driver, monkeypatch):
    """A pretended GPU for `_cuda`, opened."""
    monkeypatch.setattr(_cuda, "LIBRARY", str(driver))
    _cuda.gpu.cache_clear()
    yield _cuda.gpu()
    _cuda.gpu.cache_clear()


@pytest.fixture
def trt(gpu, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorrt", pretend_tensorrt)
    spec = importlib.machinery.ModuleSpec("tensorrt", None)
    monkeypatch.setattr(pretend_tensorrt, "__spec__", spec)
    tensorrt._logger.cache_clear()
    assert tensorrt.unavailable() == ""
    yield
    tensorrt._logger.cache_clear()


@pytest.fixture(scope="module")
def expected():
    return onnxruntime.run(onnxruntime.load(MODEL), FEEDS)


def same(found, expected, rtol=1e-5):
    for mine, theirs in zip(found, expected, strict=True):
        np.testing.assert_allclose(mine, theirs, atol=rtol * np.abs(theirs).max())


# ---- the driver ----------------------------------------------------------------------------------


def test_a_machine_without_driver_or_gpu_says_so(driver, monkeypatch):
    monkeypatch.setattr(_cuda, "LIBRARY", "libnone.so.1")
    assert "no NVIDIA driver" in _cuda.unavailable()
    monkeypatch.setattr(_cuda, "LIBRARY", str(driver))
    assert _cuda.unavailable() == ""
    monkeypatch.setenv("PRETEND_GPUS", "0")
    assert "finds no GPU" in _cuda.unavailable()
    _cuda.gpu.cache_clear()
    with pytest.raises(NasctlError, match="finds no GPU"):
        _cuda.gpu()


def test_what_goes_up_comes_down_and_buffers_are_freed(gpu, driver):
    allocated = ctypes.CDLL(str(driver)).pretend_allocated
    before = allocated()
    there, back = np.arange(6, dtype=np.float32), np.zeros(6, np.float32)
    buffer = _cuda.Buffer(gpu, there.nbytes)
    gpu.upload(there, buffer)
    gpu.download(buffer, back)
    assert back.tolist() == there.tolist()
    assert allocated() == before + 1
    del buffer
    assert allocated() == before
    assert (gpu.name, gpu.capability, gpu.driver_version) == ("Pretend GPU", "8.7", 13000)


def test_an_error_of_the_driver_is_one_line_in_its_words(gpu):
    with pytest.raises(NasctlError, match=r"CUDA: cuMemAlloc_v2 failed \(out of memory\)"):
        _cuda.Buffer(gpu, 1 << 31)
    with pytest.raises(NasctlError, match=r"cuInit failed \(error 1\)"):
        gpu.call("cuInit", 1)


def test_time_is_between_the_events_and_not_of_what_runs_ahead(gpu, driver):
    launches = ctypes.CDLL(str(driver)).pretend_launches
    done = []
    launch = gpu.captured(lambda: done.append(1))
    assert len(done) == 1  # captured once, then replayed by the driver alone
    before = launches()
    assert gpu.seconds(launch, ahead=launch) == pytest.approx(0.002)
    assert launches() == before + 2 and len(done) == 1


def test_a_failed_capture_leaves_the_stream_usable(gpu, driver):
    def fails():
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        gpu.captured(fails)
    assert ctypes.CDLL(str(driver)).pretend_capturing() == 0


# ---- TensorRT ------------------------------------------------------------------------------------


def test_an_engine_is_built_loaded_run_and_timed(trt, tmp_path, expected):
    path = tensorrt.build(MODEL, tmp_path / "new" / "model.engine", options=Options(cache=tmp_path))
    assert [p.name for p in path.parent.iterdir()] == ["model.engine"]
    session = tensorrt.load(path, precision="fp32")
    assert session.inputs == {"input": (1, 3, 16, 16)}
    assert session.outputs == ("output_11", "output")
    found = tensorrt.run(session, FEEDS)
    same(found, expected)
    tensorrt.run(session, {"input": 2 * FEEDS["input"]})
    same(found, expected)  # not the engine's own buffers
    assert tensorrt.timed(session, FEEDS)() == pytest.approx(0.002)


def test_a_timed_call_keeps_the_buffers_of_its_session(trt, driver):
    allocated = ctypes.CDLL(str(driver)).pretend_allocated
    before = allocated()
    call = tensorrt.timed(tensorrt.load(MODEL), FEEDS)
    gc.collect()
    assert allocated() == before + 3  # an input, two outputs
    del call
    gc.collect()
    assert allocated() == before


def test_the_timing_cache_is_kept_per_gpu_driver_and_version_and_used_again(trt, tmp_path):
    kept = Options(cache=tmp_path / "caches")
    for _ in range(2):
        tensorrt.build(MODEL, tmp_path / "model.engine", options=kept)
    (cache,) = (tmp_path / "caches").iterdir()
    assert cache.name == "Pretend_GPU-sm8.7-cuda13-11.4.0.cache"
    assert cache.read_bytes() == b"timed;timed;"
    for content in (b"damaged", b"of another GPU"):
        cache.write_bytes(content)
        with pytest.raises(NasctlError, match=r"\.cache: TensorRT refuses this timing cache"):
            tensorrt.build(MODEL, tmp_path / "model.engine", options=kept)
    cache.unlink()  # as the line says
    tensorrt.build(MODEL, tmp_path / "model.engine", options=kept)
    assert cache.read_bytes() == b"timed;"


def test_an_engine_does_not_fail_because_its_timings_cannot_be_kept(trt, tmp_path):
    (tmp_path / "caches").write_text("a file, no folder")
    tensorrt.build(MODEL, tmp_path / "a.engine", options=Options(cache=tmp_path / "caches"))
    assert (tmp_path / "a.engine").is_file()


def test_a_compatible_engine_says_so_and_has_timings_of_its_own(trt, tmp_path):
    both = Options(compatible=("version", "hardware"), cache=tmp_path / "caches")
    path = tensorrt.build(MODEL, tmp_path / "a.engine", options=both)
    said = {each.key: each.value for each in onnx.load(path).metadata_props}
    assert (said["flags"], said["level"]) == ("VERSION_COMPATIBLE", "AMPERE_PLUS")
    (cache,) = (tmp_path / "caches").iterdir()
    assert cache.name == "Pretend_GPU-sm8.7-cuda13-11.4.0-hardware-version.cache"
    said = {
        each.key: each.value
        for each in onnx.load(tensorrt.build(MODEL, tmp_path / "b.engine")).metadata_props
    }
    assert (said["flags"], said["level"]) == ("", "NONE")


@pytest.mark.parametrize("said", [None, "{}", "[]", "nonsense", '{"compatible": ["hardware"]}'])
def test_an_engines_own_code_is_run_only_where_its_side_car_says_that_it_has_some(
    trt, tmp_path, said
):
    path = tensorrt.build(MODEL, tmp_path / "a.engine", options=Options(compatible=("version",)))
    car = tmp_path / "a.engine.json"
    if said is not None:
        car.write_text(said)
    with pytest.raises(NasctlError, match="host code is not allowed"):
        tensorrt.load(path)
    car.write_text('{"compatible": ["version"]}')
    assert tensorrt.load(path).inputs == {"input": (1, 3, 16, 16)}


def test_weights_beside_a_model_are_read_only_if_somebody_looked_at_them(trt, tmp_path, expected):
    path = tmp_path / "m.onnx"
    onnx.save(
        onnx.load_from_string(MODEL),
        path,
        save_as_external_data=True,
        location="m.data",
        size_threshold=0,
    )
    made = tensorrt.build(path, tmp_path / "a.engine", options=Options(beside=True))
    same(tensorrt.run(tensorrt.load(made), FEEDS), expected)
    with pytest.raises(NasctlError):
        tensorrt.load(tensorrt.build(path, tmp_path / "b.engine"))
    with pytest.raises(NasctlError, match=r"weights are in another file.*--precision fp32"):
        tensorrt.build(path, tmp_path / "b.engine", precision="fp16", options=Options(beside=True))


# ---- `nasctl build` with them --------------------------------------------------------------------


@pytest.fixture
def jetson_here(trt, workdir, monkeypatch):
    """A bundle, and the pretended GPU as a device's that takes engines in float32."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(workdir / "cache"))
    return small(workdir / "b")


TX2 = ("build", "b", "--hw", "jetson-tx2", "--json")
ENGINE = "engines/model.jetson-tx2.tensorrt.engine"


@pytest.mark.usefixtures("stated")
def test_the_verb_builds_one_engine_for_many_sizes_and_versions(nasctl, jetson_here, workdir):
    words = ("--compatible", "version,hardware", "--sizes", "batch=1:4:16")
    made = nasctl(*TX2, *words)
    assert made.code == 0, made.err
    car = json.loads(made.out)
    assert car["compatible"] == ["version", "hardware"] and car["device"] == "jetson-tx2"
    assert car["shapes"] == {"input": [[1, 1, 8, 8], [4, 1, 8, 8], [16, 1, 8, 8]]}
    assert car["inputs"] == {"input": [1, 1, 8, 8]}  # that it was timed at
    (cache,) = (workdir / "cache/nasctl/tensorrt").iterdir()
    assert cache.read_bytes() == b"timed;"
    shown = nasctl(*(word for word in TX2 if word != "--json"), *words).err
    assert "input 1x1x8x8 to 16x1x8x8, best at 4x1x8x8" in shown
    assert "later versions of TensorRT" in shown and "other GPUs from Ampere on" in shown
    # the engine of this board: its own budget is measured
    words = ("verify", "b", "--engine", Path(ENGINE).name, "--hw", "jetson-tx2", "--latency")
    assert nasctl(*words, "1s").code == 0
    assert nasctl(*words, "1us").code == 4


@pytest.mark.usefixtures("stated")
def test_weights_beside_a_bundles_model_are_built_too(nasctl, trt, workdir, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(workdir / "cache"))
    monkeypatch.setattr("deploy.onnx.INLINE", 1000)
    monkeypatch.setattr("deploy.onnx.EXTERNAL", 100)
    assert small(workdir / "b").of("weights")
    made = nasctl(*TX2)
    assert made.code == 0, made.err
    assert json.loads(made.out)["observed"] == "fp32"


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"version": "11.3.0"}, ""),
        ({"version": "10.3.0"}, ""),
        ({"version": "11.4.0.9"}, "tensorrt version '11.4.0.9', here '11.4.0'"),
        ({"version": "8.6.1"}, "tensorrt version '8.6.1', here '11.4.0'"),
        ({"version": "?"}, r"tensorrt version '\?', here"),
        ({"gpu": "RTX 3090", "sm": "8.6", "design": "1/2/3", "processor": "Xeon"}, ""),
        ({"gpu": "RTX 3090", "driver": "12040"}, "was built for driver '12040', here '13000'"),
        ({"gpu": "RTX 3090", "architecture": "aarch64"}, "was built for architecture 'aarch64'"),
        ({"gpu": "Orin", "board": "Jetson"}, r"was built for board 'Jetson', here '\?'"),
    ],
)
@pytest.mark.usefixtures("stated")
def test_a_compatible_engine_is_loaded_where_it_was_built_for(nasctl, jetson_here, change, said):
    assert nasctl(*TX2, "--compatible", "version,hardware").code == 0
    path = jetson_here.folder / ENGINE
    car = engine.read(path)
    changed = {"machine": {**car.machine, **{k: v for k, v in change.items() if k != "version"}}}
    changed |= {"version": change.get("version", car.version)}
    engine.write(car.model_copy(update=changed), path)
    if said:
        with pytest.raises(NasctlError, match=said):
            engine.load(path)
    else:
        assert engine.load(path)[0].outputs == ("logits",)
    # without having been built for it, every difference is refused
    engine.write(car.model_copy(update={**changed, "compatible": []}), path)
    with pytest.raises(NasctlError, match="was built for"):
        engine.load(path)


@pytest.mark.usefixtures("stated")
def test_a_gpu_before_ampere_takes_no_engine_of_others(nasctl, jetson_here, monkeypatch):
    assert nasctl(*TX2, "--compatible", "hardware").code == 0
    monkeypatch.setattr(_cuda.Gpu, "capability", "7.5")
    with pytest.raises(NasctlError, match="was built for sm '8.7', here '7.5'"):
        engine.load(jetson_here.folder / ENGINE)


@pytest.mark.usefixtures("stated")
def test_an_engine_of_another_gpu_measures_no_budget(nasctl, jetson_here):
    assert nasctl(*TX2, "--compatible", "hardware").code == 0
    path = jetson_here.folder / ENGINE
    car = engine.read(path)
    other = car.model_copy(update={"machine": {**car.machine, "gpu": "RTX 3090"}})
    content = json.dumps(other.model_dump()).encode()
    bundles.add(bundles.read(jetson_here.folder), {f"{ENGINE}.json": ("sidecar", content)})
    words = ("verify", "b", "--engine", path.name, "--hw", "jetson-tx2")
    assert nasctl(*words).code == 0
    refused = nasctl(*words, "--latency", "1s")
    assert refused.code == 1 and "the budget was not checked" in refused.err


def test_fp16_changes_the_file_and_is_read_back_from_the_engine(trt, tmp_path, expected):
    path = tensorrt.build(MODEL, tmp_path / "model.engine", precision="fp16")
    session = tensorrt.load(path, precision="fp16")
    assert tensorrt.observed_precision(session) == "fp16"
    same(tensorrt.run(session, FEEDS), expected, rtol=2e-2)
    with pytest.raises(NasctlError, match="asked to compute in fp32, but it computes in fp16"):
        tensorrt.load(path, precision="fp32")
    with pytest.raises(NasctlError, match="asked to compute in int8, but it computes in fp32"):
        tensorrt.load(MODEL, precision="int8")


def test_bf16_changes_the_file_that_is_parsed(trt):
    twin = onnx.load_from_string(tensorrt._onnx(MODEL, "bf16", "m"))
    kinds = {tensor.data_type for tensor in twin.graph.initializer}
    assert onnx.TensorProto.BFLOAT16 in kinds
    assert tensorrt._onnx(MODEL, "int8", "m") == MODEL


def test_what_tensorrt_refuses_is_one_line_with_its_reason(trt, tmp_path):
    bad = tmp_path / "bad.engine"
    bad.write_bytes(b"no engine")
    with pytest.raises(NasctlError, match=r"magic tag does not match.*build it again") as caught:
        tensorrt.load(bad)
    assert "\n" not in str(caught.value)
    with pytest.raises(NasctlError, match="TensorRT cannot read it"):
        tensorrt.load(b"no model")
    session = tensorrt.load(MODEL)
    for feeds in ({}, {"input": np.zeros((2, 3, 16, 16), np.float32)}):
        with pytest.raises(NasctlError, match=r"feeds do not fit.*allowed: input \[1, 3, 16, 16\]"):
            tensorrt.run(session, feeds)


def test_precisions_are_read_from_both_versions_of_the_inspectors_text():
    def text(key, *types):
        layers = [{"LayerType": "CaskConvolution", "Inputs": [{key: t}]} for t in types]
        plain = [{"LayerType": "Pooling", "Inputs": [{key: "Int8"}]}, "a name without details"]
        return json.dumps({"Layers": [*layers, *plain]})

    assert tensorrt.precisions_of(text("DataType", "Half", "Float", "Half")) == "fp16 2, fp32 1"
    old = text("Format/Datatype", "Channel major FP16 format where channel % 8 == 0", "Int8")
    assert tensorrt.precisions_of(old) == "fp16 1, int8 1"
    assert tensorrt.precisions_of(text("DataType", "BFloat16")) == "bf16"
    for nothing in (text("DataType"), "{}", "not JSON"):
        assert tensorrt.precisions_of(nothing) == "?"


# ---- ONNX Runtime and torch ----------------------------------------------------------------------


@pytest.fixture
def cuda_provider(gpu, monkeypatch):
    """The processor's provider in the place of CUDA's: same calls, other memory."""
    monkeypatch.setattr(onnxruntime_cuda, "PROVIDER", "CPUExecutionProvider")
    monkeypatch.setattr(onnxruntime_cuda, "DEVICE", "cpu")
    monkeypatch.setattr(onnxruntime_cuda, "NO_FALLBACK", {})
    assert onnxruntime_cuda.unavailable() == ""


def test_bound_buffers_compute_and_each_set_has_a_graph_of_its_own(cuda_provider, expected):
    session = onnxruntime_cuda.load(MODEL)
    same(onnxruntime_cuda.run(session, FEEDS), expected)
    one, two = (onnxruntime_cuda.timed(session, FEEDS) for _ in range(2))
    assert one.graph != two.graph
    assert one() == 0.0  # the pretended clock stands still: nothing went to the pretended stream
    same([value.numpy() for value in one.buffers[1:]], expected)  # after the one input
    with pytest.raises(NasctlError, match=r"allowed: input \[1, 3, 16, 16\]"):
        onnxruntime_cuda.run(session, {"input": np.zeros((1, 3, 5, 5), np.float32)})


def test_a_silent_fall_back_to_the_processor_is_refused(cuda_provider, monkeypatch):
    real = _ort.inference_session

    class Fallen:
        def __init__(self, session):
            self.get_providers = lambda: ["AzureExecutionProvider", *session.get_providers()]

    monkeypatch.setattr(_ort, "inference_session", lambda *a: Fallen(real(*a)))
    with pytest.raises(NasctlError, match="fell back to AzureExecutionProvider"):
        onnxruntime_cuda.load(MODEL)


def test_torch_computes_the_same_file(monkeypatch, expected):
    monkeypatch.setattr(torch_cuda, "DEVICE", "cpu")
    monkeypatch.setattr(torch_cuda, "unavailable", lambda: "")
    same(torch_cuda.run(torch_cuda.load(MODEL), FEEDS), expected)
    half = torch_cuda.load(MODEL, precision="fp16")
    assert torch_cuda.observed_precision(half) == "fp16"
    same(torch_cuda.run(half, FEEDS), expected, rtol=2e-2)
