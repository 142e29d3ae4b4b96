"""deploy.engine and `nasctl build`: engines say what they are, misfits are refused."""

import hashlib
import json

import numpy as np
import pytest
from bundles import digits, small

from cli import building, bundling, judging
from deploy import bundle as bundles
from deploy import engine, recipes, sizes
from deploy import onnx as files
from hw_profiles import device, engines, runtimes
from hw_profiles.half import half
from hw_profiles.protocol import Plan
from hw_profiles.remote import build
from hw_profiles.remote import engines as there
from hw_profiles.runtimes import Options, onnxruntime
from nas.errors import NasctlError

HERE = [
    name for name in ("onnxruntime", "openvino") if not runtimes.load_module(name).unavailable()
]


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    return small(tmp_path_factory.mktemp("engines") / "bundle")


@pytest.fixture(scope="module", params=HERE)
def built(request, bundle, tmp_path_factory):
    suffix = runtimes.compiled(request.param).ENGINE
    path = tmp_path_factory.mktemp("built") / f"model{suffix}"
    return path, engine.build(bundle.model, path, runtime=request.param, precision="fp32")


def test_an_engine_computes_what_its_model_computes(bundle, built):
    path, car = built
    session, said = engine.load(path)
    assert said == car and car.observed == car.requested == "fp32"
    images = digits().normalise(digits().val.images[:1]).numpy()
    module = runtimes.load_module(car.runtime)
    (found,) = module.run(session, {"input": images})
    (expected,) = onnxruntime.run(onnxruntime.load(bundle.model), {"input": images})
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"machine": {"processor": "Cortex-A78"}}, "was built for processor 'Cortex-A78', here"),
        ({"machine": {}}, r"was built for .*architecture '\?', here"),
        ({"version": "0.9"}, "version '0.9', here"),
        ({"sha256": "0" * 64}, "is not the engine that its side-car describes"),
    ],
)
def test_an_engine_of_elsewhere_is_refused_unopened(built, monkeypatch, change, said):
    path, car = built
    module = runtimes.load_module(car.runtime)
    monkeypatch.setattr(module, "load", lambda *_, **__: pytest.fail("it was opened"))
    engine.write(car.model_copy(update=change), path)
    try:
        with pytest.raises(NasctlError, match=said):
            engine.load(path)
    finally:
        engine.write(car, path)


FLAGS = "fpu sse2 ssse3 avx avx2 fma f16c bmi2"
X86 = "model name : AMD EPYC\ncpu family : {}\nmodel : 17\nstepping : 1\nflags : {}\n"
ARM = "CPU implementer : 0x41\nCPU part : 0xd42\nCPU revision : 1\nFeatures : fp asimd {}\n"


@pytest.mark.parametrize(
    ("one", "other", "differs"),
    [
        (X86.format(25, FLAGS), X86.format(25, f"{FLAGS} avx512f"), {"instructions"}),
        (X86.format(25, FLAGS), X86.format(26, FLAGS), {"design"}),
        (X86.format(25, FLAGS), X86.format(25, f"{FLAGS} hypervisor ibrs"), set()),
        (ARM.format(""), ARM.format("asimddp"), {"instructions"}),
        (ARM.format(""), ARM.format("").replace("0xd42", "0xd40"), {"design"}),
        ("", "", set()),
    ],
)
def test_processors_of_one_name_are_told_apart(tmp_path, one, other, differs):
    (tmp_path / "proc").mkdir()
    found = []
    for text in (one, other):
        (tmp_path / "proc/cpuinfo").write_text(text)
        found.append(engines.processor(tmp_path))
    assert {name for name in found[0] if found[0][name] != found[1][name]} == differs
    assert ("?" in found[0].values()) is (one == "")


def test_an_engine_belongs_to_a_processors_design_and_instructions(built):
    _, car = built
    assert {"design", "instructions"} <= car.machine.keys()


def test_an_engine_without_a_side_car_is_refused(built, tmp_path):
    path, _ = built
    (tmp_path / path.name).write_bytes(path.read_bytes())
    with pytest.raises(NasctlError, match="has no side-car"):
        engine.load(tmp_path / path.name)
    engine.beside(tmp_path / path.name).write_text("{}")
    with pytest.raises(NasctlError, match="is no side-car"):
        engine.load(tmp_path / path.name)


def test_another_precision_than_asked_for_leaves_no_engine(bundle, tmp_path):
    path = tmp_path / "model.ort"
    with pytest.raises(NasctlError, match="asked to compute in int8, but it computes in fp32"):
        engine.build(bundle.model, path, runtime="onnxruntime", precision="int8")
    assert list(tmp_path.iterdir()) == []


def test_a_killed_build_leaves_nothing_under_the_final_name(bundle, tmp_path, monkeypatch):
    path = tmp_path / "model.ort"
    path.write_bytes(b"of an earlier build")

    def killed(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(onnxruntime.os, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        engine.build(bundle.model, path, runtime="onnxruntime")
    with pytest.raises(NasctlError, match="has no side-car"):
        engine.load(path)
    assert [each.name for each in tmp_path.iterdir()] == ["model.ort"]


def test_a_runtime_without_engines_is_named(bundle, tmp_path):
    with pytest.raises(NasctlError, match="torch_cuda has no engines; allowed: aoti"):
        engine.build(bundle.model, tmp_path / "x", runtime="torch_cuda")


# ---- nasctl build --------------------------------------------------------------------------------


@pytest.mark.slow
def test_build_puts_a_measured_engine_into_the_bundle(nasctl, workdir):
    small(workdir / "b")
    outcome = nasctl("build", "b", "--engine", "ort", "--json")
    assert outcome.code == 0
    car = json.loads(outcome.out)
    assert car["observed"] == "fp32" and car["latency"]["median_ms"] > 0
    found = bundles.read(workdir / "b")
    assert found.of("engine") == ["engines/model.cpu.onnxruntime.ort"]
    session, _ = engine.load(found.path(found.of("engine")[0]))
    assert session.inputs == {"input": ("batch", 1, 8, 8)}
    assert found.manifest.model == "model.onnx"


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (("--engine", "ortt"), 2, "unknown engine 'ortt'"),
        (("--engine", "tensorrt"), 2, "no tensorrt for a cpu"),
        (("--hw", "raspi4", "--engine", "ort"), 2, "raspi4 is not this machine"),
        (("--hw", "raspi4"), 2, "tflite has no engines; allowed: ort, openvino, aoti"),
        (
            ("--engine", "ort", "--compatible", "version"),
            2,
            "--compatible: onnxruntime has no such",
        ),
        (("--engine", "ort", "--sizes", "batch=1:4:8"), 2, "--sizes: onnxruntime has no such"),
        (("--compatible", "versions"), 2, "unknown compatibility 'versions'"),
        (("--engine", "ort", "--member", "x.onnx"), 1, "no member 'x.onnx'"),
        (("--engine", "ort", "--member", "task.json"), 1, "'task.json' is no ONNX file; allowed"),
    ],
)
def test_what_cannot_be_built_is_one_line(nasctl, workdir, arguments, code, said):
    small(workdir / "b")
    outcome = nasctl("build", "b", *arguments)
    assert outcome.code == code and said in outcome.err
    assert len(outcome.err.strip().splitlines()) == 1


def test_the_command_of_trtexec_for_both_versions(nasctl, workdir):
    small(workdir / "b")
    ten, eleven = nasctl("build", "b", "--commands").out.split("# TensorRT 11")
    assert "--stronglyTyped" in ten and "--stronglyTyped" not in eleven
    for line in (ten, eleven):
        assert "--onnx=" in line and "model.onnx" in line
        assert "--optShapes=input:1x1x8x8" in line and "--noTF32" in line
        assert not {"--fp16", "--int8", "--best", "--calib"} & set(line.split())


def test_trtexec_writes_its_engine_outside_the_bundle(nasctl, workdir, monkeypatch):
    made = small(workdir / "b")
    assert nasctl("build", "b", "--commands").out.count(" --saveEngine=model.engine ") == 2
    monkeypatch.chdir(made.folder)
    beside = made.folder.resolve().parent / "model.engine"
    assert nasctl("build", ".", "--commands").out.count(f" --saveEngine={beside} ") == 2
    monkeypatch.chdir(workdir)
    bundles.pack(made, workdir / "b.zip")  # its files would be gone when trtexec starts
    refused = nasctl("build", "b.zip", "--commands")
    assert refused.code == 2 and "trtexec reads no archive" in refused.err


def test_trtexec_is_told_no_shapes_of_what_is_fixed(nasctl, workdir):
    fixed = small(workdir / "b", sizes=(1, 1, 8, 8))
    assert "Shapes" not in nasctl("build", "b", "--commands").out
    shapes = bundling.free_shapes(fixed.model, bundling.sample_of(fixed))
    assert recipes.of(device.load("tx2"), shapes)["engines"]["tensorrt"] == {
        "nasctl": "nasctl build BUNDLE --hw jetson-tx2 --engine tensorrt",
        "runtime": "tensorrt",
        "precision": "fp32",
        "trtexec": "trtexec --onnx=BUNDLE/model.onnx --saveEngine=model.engine "
        "--stronglyTyped --timingCacheFile=tensorrt10.cache --noTF32 "
        "--memPoolSize=workspace:1024M --profilingVerbosity=detailed --skipInference",
    }


def test_trtexec_is_told_the_same_sizes_and_compatibility(nasctl, workdir):
    small(workdir / "b", sizes=("batch", 1, "height", 8), data=False)
    words = ("--sizes", "batch=2:4:16,height=8:8:32", "--compatible", "hardware,version")
    ten, eleven = nasctl("build", "b", "--commands", *words).out.split("# TensorRT 11")
    for at, line in ((10, ten), (11, eleven)):
        assert {
            "--minShapes=input:2x1x8x8",
            "--optShapes=input:4x1x8x8",
            "--maxShapes=input:16x1x32x8",
            "--hardwareCompatibilityLevel=ampere+",
            "--versionCompatible",
            f"--timingCacheFile=tensorrt{at}.cache",
        } <= set(line.split())


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("batch", "'batch'; allowed: NAME=SMALLEST:USUAL:LARGEST, as batch=1:8:32"),
        ("batch=1:8", "'batch=1:8'; allowed: NAME"),
        ("batch=1:8:32:64", "allowed: NAME"),
        ("batch=1x3:8x3:32x3", "allowed: NAME"),
        ("", "''; allowed: NAME"),
        ("batch=8:4:32", "batch is 8:4:32; allowed: 1 <= smallest <= usual <= largest"),
        ("batch=1:64:32", "batch is 1:64:32"),
        ("batch=0:1:2", "batch is 0:1:2"),
        ("batch=1:2:4,batch=1:2:4", "batch is there twice"),
        ("length=1:2:4", "the model has no free size 'length'; allowed: batch"),
        ("input=1:2:4", "the model has no free size 'input'; allowed: batch"),
    ],
)
def test_sizes_that_are_none_are_one_line(nasctl, workdir, text, said):
    small(workdir / "b")
    refused = nasctl("build", "b", "--commands", "--sizes", text)
    assert refused.code == 2 and "--sizes: " in refused.err and said in refused.err
    assert len(refused.err.strip().splitlines()) == 1


def test_a_model_of_fixed_sizes_has_none_to_choose(nasctl, workdir):
    small(workdir / "b", sizes=(1, 1, 8, 8))
    refused = nasctl("build", "b", "--commands", "--sizes", "batch=1:2:4")
    assert refused.code == 2 and "allowed: none: its sizes are fixed" in refused.err


def test_the_smallest_is_what_an_engine_is_verified_at(nasctl, workdir):
    small(workdir / "b", sizes=("batch", 1, "height", 8), data=False)
    words = ("build", "b", "--hw", "tx2", "--engine", "tensorrt")
    for text, low in (("batch=2:4:8", "2x1x8x8"), ("height=4:8:16", "1x1x4x8")):
        refused = nasctl(*words, "--sizes", text)
        assert refused.code == 2 and len(refused.err.strip().splitlines()) == 1
        assert f"--sizes: input is {low} at the smallest; allowed: 1x1x8x8" in refused.err


def test_one_named_size_is_that_of_every_input():
    inputs = {"ids": ("batch", "length"), "mask": ("batch", "length"), "scale": (1, 4)}
    examples = {"ids": (16,), "mask": (16,), "scale": (4,)}
    found = sizes.shapes(inputs, examples, sizes.parse("length=16:64:128"))
    assert found == dict.fromkeys(("ids", "mask"), [(1, 16), (1, 64), (1, 128)])


def command(*more):
    return ("build", "b", "--commands", "--hw", "jetson", *more)


def test_a_board_of_half_precision_gets_a_half_file(nasctl, workdir):
    """The budget was held by a table in fp16: trtexec would build float32 of the float file."""
    made = small(workdir / "b")
    jetson = device.load("jetson")
    recipe = recipes.of(jetson, {})["engines"]["tensorrt"]
    assert (
        "--onnx=BUNDLE/model.fp16.onnx --saveEngine=model.fp16.engine" in recipe["trtexec"]
        and recipe["precision"] == "fp16"
    )
    assert recipe["first"] == "nasctl quantize BUNDLE --hw jetson-orin-nano --forms fp16"
    outcome = nasctl(*command())
    assert outcome.code == 1 and "none is in fp16" in outcome.err
    assert "--hw jetson-orin-nano --forms fp16 writes model.fp16.onnx" in outcome.err
    assert "model.onnx" in nasctl(*command("--precision", "fp32")).out
    files.write(half(files.read(made.model), "m"), workdir / "half.onnx")
    bundles.add(made, {"model.fp16.onnx": ("model", workdir / "half.onnx")})
    told = nasctl(*command()).out
    assert told.count("--onnx=") == told.count("/model.fp16.onnx ") == 2
    refused = nasctl(*command("--precision", "fp16", "--member", "model.fp16.onnx"))
    assert refused.code == 2 and "trtexec builds what a file says" in refused.err


def test_the_float_file_is_built_in_what_the_device_states(workdir):
    made = small(workdir / "b")
    bundles.add(made, {"other.onnx": ("model", made.model)})
    jetson, tx2 = device.load("jetson"), device.load("tx2")
    for asked, wanted in (
        (building.Asked(jetson), "fp16"),
        (building.Asked(jetson, precision="fp32"), "fp32"),
        (building.Asked(jetson, member="other.onnx"), None),
        (building.Asked(tx2), None),
    ):
        assert building.precision_of(made, asked) == wanted


def test_the_boards_precision_reaches_the_build(workdir, monkeypatch):
    made, requests = small(workdir / "b"), []

    def built(target, request):
        requests.append(request)
        raise NasctlError("enough")

    monkeypatch.setattr("hw_profiles.remote.build.build", built)
    with pytest.raises(NasctlError, match="enough"):
        building.build(made, building.Asked(device.load("jetson"), on="ssh://board"))
    assert [one.precision for one in requests] == ["fp16"]


def test_a_free_size_is_for_onnx_runtime_alone(nasctl, workdir):
    small(workdir / "b", sizes=("batch", 1, "height", 8), data=False)
    outcome = nasctl("build", "b", "--engine", "openvino")
    assert outcome.code == 1 and len(outcome.err.strip().splitlines()) == 1
    assert (
        "openvino takes 1 for a size that is free: input ['batch', 1, 'height', 8]" in outcome.err
    )
    assert not bundles.read(workdir / "b").of("engine")
    assert "--optShapes=input:1x1x8x8" in nasctl("build", "b", "--commands").out


def test_weights_that_no_file_can_hold_are_members_too(nasctl, workdir, monkeypatch):
    monkeypatch.setattr("deploy.onnx.INLINE", 1000)
    made = small(workdir / "b")
    (weights,) = bundles.read(made.folder).of("weights")
    assert made.path(weights).stat().st_size > 1000
    assert onnxruntime.load(made.model).outputs == ("logits",)
    there = ("--hw", "raspi4", "--engine", "ort", "--on", "ssh://board")
    refused = nasctl("build", "b", *there)
    assert refused.code == 1 and len(refused.err.strip().splitlines()) == 1
    assert f"its weights are in {weights}" in refused.err and "Copy the bundle" in refused.err


def test_the_small_bundle_is_worth_judging(bundle):
    from cli import bundling

    judge = judging.judge(bundling.interface_of(bundle), None)
    run = judging.runner(bundle.model, "onnxruntime")
    assert judge.scores(run, judge.task.val)["class"] > 0.8


def test_a_board_builds_with_the_options_that_were_asked_for(bundle, tmp_path, monkeypatch):
    shapes = {"input": [(1, 1, 8, 8), (4, 1, 8, 8), (8, 1, 8, 8)]}
    asked = Options(("version",), shapes, tmp_path / "cache", beside=True)
    parts = (bundle.model.read_bytes(), b"reference", "tensorrt", None, 1, Plan())
    content = build.Request(*parts, options=asked).content()
    names = (there.REQUEST, there.MODEL, there.REFERENCE)
    for name, each in zip(names, (content, *parts[:2]), strict=True):
        (tmp_path / name).write_bytes(each)
    seen = []

    def built(*arguments):
        seen.extend(arguments)
        raise NasctlError("enough")

    monkeypatch.setattr(there.engines, "built", built)
    with pytest.raises(NasctlError, match="enough"):
        there.build(tmp_path, hashlib.sha256(content).hexdigest())
    (found,) = (one for one in seen if isinstance(one, Options))
    assert (found.compatible, found.cache, found.beside) == (["version"], None, False)
    assert found.shapes == {"input": [[1, 1, 8, 8], [4, 1, 8, 8], [8, 1, 8, 8]]}


@pytest.mark.slow
@pytest.mark.parametrize("engine_name", ["ort", "openvino", "aoti"])
def test_an_engine_is_built_verified_and_timed_by_the_verbs(nasctl, workdir, engine_name):
    runtime = {"ort": "onnxruntime"}.get(engine_name, engine_name)
    if missing := runtimes.load_module(runtime).unavailable():
        pytest.skip(missing)
    small(workdir / "b")
    made = nasctl("build", "b", "--engine", engine_name, "--precision", "fp32", "--json")
    assert made.code == 0, made.err
    car = json.loads(made.out)
    (name,) = bundles.read(workdir / "b").of("engine")
    held = nasctl("verify", "b", "--engine", name, "--json")
    assert held.code == 0, held.err
    found = json.loads(held.out)
    links = {one["name"]: one for one in found["chain"]}
    assert links["model.onnx = engine"]["holds"]
    assert links["model.onnx = engine"]["tolerance"] == 1e-4  # by what it was seen to compute in
    assert found["file"]["runtime"] == runtime == car["runtime"]
    assert found["metric"]["class"]["delivered"] == found["metric"]["class"]["float"]
    assert found["measured"]["median_ms"] > 0 and car["latency"]["median_ms"] > 0
