"""`nasctl verify` and deploy.chain: what holds is said, what does not has its own exit code."""

import contextlib
import json
from pathlib import Path

import numpy as np
import pytest
from bundles import digits, network, small
from onnx import numpy_helper
from safetensors.numpy import save

from cli import judging, verdict, verifying
from compress import quantize
from deploy import bundle as bundles
from deploy import chain, interface
from deploy import onnx as files
from hw_profiles import device, runtimes
from hw_profiles.half import half
from nas import checkpoint
from nas.errors import NasctlError, ParityFailed

NAN = float("nan")


def verified(nasctl, *arguments):
    outcome = nasctl("verify", *arguments, "--json")
    return outcome.code, json.loads(outcome.out) if outcome.out else {}, outcome.err


@pytest.mark.slow
def test_latency_and_memory_are_measured(nasctl, workdir):
    small(workdir / "b")
    code, content, _ = verified(nasctl, "b", "--latency", "1s", "--memory", "2GB")
    assert code == 0
    assert 0 < content["measured"]["median_ms"] < 1000
    assert 0 < content["measured"]["memory_bytes"] < 2e8


@pytest.mark.usefixtures("stated")
@pytest.mark.parametrize("archive", [False, True])
def test_a_sound_bundle_is_verified(nasctl, workdir, archive):
    made, name = small(workdir / "b"), "b"
    if archive:
        name = "b.zip"
        bundles.pack(made, workdir / name)
    code, content, _ = verified(nasctl, name, "--latency", "1s", "--memory", "2GB")
    assert code == 0 and content["bundle"] == bundles.identity(made)
    (score,) = content["metric"].values()
    assert score["delivered"] == score["float"] > 0.8 and score["images"] == 359
    assert [note for note in content["not_measured"] if note.startswith("supernet = extracted")]
    assert bundles.read(workdir / "b").manifest == made.manifest  # it was not changed


@pytest.mark.usefixtures("stated")
def test_a_missed_budget_has_exit_code_4_and_a_report(nasctl, workdir):
    small(workdir / "b")
    code, content, error = verified(nasctl, "b", "--latency", "1us", "--out", "r.json")
    assert code == 4 and "the budget is 1 us" in error
    assert json.loads((workdir / "r.json").read_text()) == content
    code, _, error = verified(nasctl, "b", "--memory", "2MB")
    assert code == 4 and "needs 3.0 MB, the budget is 2.0 MB" in error


@pytest.mark.usefixtures("stated")
def test_another_network_under_the_delivered_name_has_exit_code_5(nasctl, workdir):
    made = small(workdir / "b")
    model = network()
    weight = next(t for t in model.graph.initializer if t.dims[:] == [10, 64])
    weight.raw_data = bytes(len(weight.raw_data))
    files.write(model, workdir / "other.onnx")
    bundles.add(made, {"other.onnx": ("model", workdir / "other.onnx")}, model="other.onnx")
    code, content, error = verified(nasctl, "b")
    assert code == 5 and "float file = delivered file: outputs differ" in error
    assert [one["holds"] for one in content["chain"]] == [False]


def halved(folder, to):
    """A bundle that delivers its half-precision form."""
    made, name = small(folder), f"model.{to}.onnx"
    files.write(half(files.read(made.model), "m", to=to), folder.with_name(name))
    bundles.add(made, {name: ("model", folder.with_name(name))}, model=name)
    return name


@pytest.mark.usefixtures("stated")
def test_a_half_precision_file_is_held_to_its_own_types(nasctl, workdir):
    name = halved(workdir / "b", "fp16")
    code, content, error = verified(nasctl, "b")
    assert code == 0, error
    (one,) = content["chain"]
    assert one["precision"] == "fp16" and chain.TOLERANCE["fp32"] < one["error"] <= 1e-2
    assert content["file"]["path"] == name and content["metric"] and content["measured"]


def in_int8(folder, activations):
    """A bundle that delivers its INT8 form."""
    made, name = small(folder), "model.int8.onnx"
    plain = quantize.prepared(files.read(made.model))
    images = digits().normalise(digits().train.images[:64]).numpy()
    scheme = quantize.Scheme(activations)
    ranges = quantize.calibrate(plain, [{"input": images}], scheme)
    files.write(quantize.int8(plain, ranges, scheme), folder.with_name(name))
    bundles.add(made, {name: ("model", folder.with_name(name))}, model=name)


@pytest.mark.usefixtures("stated")
@pytest.mark.parametrize("activations", ["u8", "s8"])
def test_an_int8_file_is_held_to_int8_whatever_it_is_computed_in(nasctl, workdir, activations):
    """ONNX Runtime has no kernels for the pairs that TensorRT wants and computes in float32."""
    in_int8(workdir / "b", activations)
    code, content, error = verified(nasctl, "b")
    assert code == 0, error
    (one,) = content["chain"]
    assert one["precision"] == "int8" and chain.TOLERANCE["fp32"] < one["error"] < 0.1
    assert one["tolerance"] == chain.TOLERANCE["int8"] and abs(one["gain"] - 1) < 0.05


@pytest.mark.usefixtures("stated")
def test_a_wrong_scale_of_one_output_channel_has_exit_code_5(nasctl, workdir):
    in_int8(workdir / "b", "u8")
    path = workdir / "b/model.int8.onnx"
    model = files.read(path)
    last = next(node for node in model.graph.node if node.op_type == "Gemm")
    made = next(node for node in model.graph.node if node.output[0] == last.input[1])
    scale = next(t for t in model.graph.initializer if t.name == made.input[1])
    values = numpy_helper.to_array(scale).copy()
    values[3] *= 2
    scale.CopyFrom(numpy_helper.from_array(values, scale.name))
    files.write(model, workdir / "other.onnx")
    bundles.add(
        bundles.read(workdir / "b"),
        {"model.int8.onnx": ("model", workdir / "other.onnx")},
        model="model.int8.onnx",
    )
    code, content, error = verified(nasctl, "b")
    assert code == 5 and "times its size; allowed: 0.8 to 1.2" in error
    assert content["chain"][0]["gain"] > 1.5 and not content["chain"][0]["holds"]


@pytest.mark.slow
def test_an_engine_of_an_int8_file_is_held_to_that_file(nasctl, workdir):
    in_int8(workdir / "b", "u8")
    assert nasctl("build", "b", "--engine", "ort").code == 0
    code, content, error = verified(nasctl, "b", "--engine", "model.int8.cpu.onnxruntime.ort")
    assert code == 0, error
    one = content["chain"][-1]
    assert one["name"] == "model.int8.onnx = engine" and one["precision"] == "int8"
    assert one["error"] == 0 and one["tolerance"] < chain.TOLERANCE["int8"] / 2


@pytest.mark.usefixtures("stated")
def test_a_file_that_cannot_be_run_here_is_not_measured(nasctl, workdir):
    halved(workdir / "b", "bf16")
    code, content, error = verified(nasctl, "b")
    assert code == 0, error
    assert content["chain"] == [] and content["metric"] is None and content["measured"] is None
    for what in ("float file = delivered file: ", "metric, latency and memory: "):
        (note,) = (one for one in content["not_measured"] if one.startswith(what))
        assert "ONNX Runtime cannot load it" in note
    code, _, error = verified(nasctl, "b", "--latency", "1s")
    assert code == 1 and "the budget was not checked" in error


@pytest.mark.usefixtures("stated")
def test_a_typed_budget_of_a_device_that_is_not_here_is_not_passed_over(nasctl, workdir):
    small(workdir / "b")
    for words in (["--latency", "1us"], ["--memory", "80MB"]):
        code, content, error = verified(nasctl, "b", "--hw", "jetson", *words)
        assert code == 1 and "the budget was not checked" in error
        assert any("is not this machine" in note for note in content["not_measured"])


OWN = """name = "{}"\nsummary = "?"\nkind = "cpu"\nruntime = "onnxruntime"
precision = "fp32"\nsources = ["?"]\n"""


@pytest.mark.usefixtures("stated")
def test_a_board_measures_the_engine_that_was_built_on_it_for_it(nasctl, workdir):
    """`nasctl` runs on the board, whose device file says nothing of this machine."""
    made, name = small(workdir / "b"), "engines/model.cpu.onnxruntime.ort"
    for board in ("own", "other"):
        (workdir / f"{board}.toml").write_text(OWN.format(board))
    assert nasctl("build", "b", "--engine", "ort").code == 0
    car = json.loads((workdir / "b" / f"{name}.json").read_text())
    assert car["device"] == "cpu"

    def found(board, **change):
        content = json.dumps({**car, "device": "own", **change}).encode()
        bundles.add(bundles.read(made.folder), {f"{name}.json": ("sidecar", content)})
        words = ("--engine", name, "--hw", f"{board}.toml", "--latency")
        return [verified(nasctl, "b", *words, budget)[0] for budget in ("1s", "1us")]

    assert found("own") == [0, 4]
    assert found("other") == found("own", device=None) == [1, 1]
    code, content, error = verified(nasctl, "b", "--engine", name, "--hw", "own.toml")
    assert code == 0 and content["measured"] is None
    told = "latency and memory: the engine was not built on this machine for own (--hw)"
    assert told in content["not_measured"]
    # the file alone says nothing of a machine
    assert verified(nasctl, "b", "--hw", "own.toml", "--latency", "1s")[0] == 1


@pytest.mark.usefixtures("stated")
def test_inputs_that_are_not_numbers_compare_nothing(nasctl, workdir):
    made = small(workdir / "b")
    sample = interface.sample({"input": np.full((2, 1, 8, 8), np.nan, np.float32)})
    bundles.add(made, {"calibration.safetensors": ("calibration", sample)})
    code, content, error = verified(nasctl, "b")
    assert code == 1 and "input 'input' of its examples" in error and not content


@pytest.mark.usefixtures("stated")
def test_the_bound_of_quantize_is_held_on_the_images_that_decided(nasctl, workdir):
    made = small(workdir / "b")
    said = {"max_drop": "class=1%", "seed": 3, "board": "cpu"}
    bundles.add(made, {"quantize.json": ("report", json.dumps(said).encode())})
    code, content, _ = verified(nasctl, "b")
    assert code == 0
    assert content["bound"]["class"]["max_drop"] == 0.01
    assert content["bound"]["class"]["images"] == 359 // 2
    told = content["bound"]["class"]["told"]
    assert told["delivered"] == told["float"] and told["images"] == 359 - 359 // 2
    bundles.add(made, {"quantize.json": ("report", json.dumps(said | {"board": "gone"}).encode())})
    code, content, _ = verified(nasctl, "b")
    assert code == 0 and not content["bound"] and content["metric"]
    assert any("unknown device 'gone'" in note for note in content["not_measured"])
    bundles.add(made, {"quantize.json": ("report", b"{}")})
    code, _, error = verified(nasctl, "b")
    assert code == 1 and "says no bound" in error


@pytest.mark.usefixtures("stated")
def test_the_bound_is_held_in_the_runtime_that_it_was_held_in(nasctl, workdir, monkeypatch):
    made = small(workdir / "b")
    said = {"max_drop": "class=1%", "seed": 3, "board": "other"}
    bundles.add(made, {"quantize.json": ("report", json.dumps(said).encode())})
    own = device.load("cpu").model_copy(update={"name": "other", "runtime": "openvino"})
    named = device.named
    monkeypatch.setattr(device, "named", lambda name: own if name == "other" else named(name))
    if not runtimes.load_module("openvino").unavailable():
        used = []
        runner = judging.runner
        monkeypatch.setattr(
            judging, "runner", lambda *args, **how: used.append(args[1]) or runner(*args, **how)
        )
        code, content, _ = verified(nasctl, "b")
        assert code == 0 and content["bound"]["class"]["delivered"] > 0.8
        assert used.count("openvino") == 2
    library = runtimes.load_module("openvino")
    monkeypatch.setattr(library, "unavailable", lambda: "not here")
    _, content, _ = verified(nasctl, "b")
    assert not content["bound"]
    assert "bound: other runs openvino: not here" in content["not_measured"]


THEIRS = """name = "theirs"\nsummary = "?"\nkind = "cpu"\nruntime = "aoti"\nlocal = true
precision = "fp32"\nsources = ["?"]\n"""


@pytest.mark.usefixtures("stated")
def test_no_runtime_is_taken_from_a_device_file_of_the_bundles(nasctl, workdir, monkeypatch):
    said = {"max_drop": "class=1%", "seed": 3, "board": "b/theirs.toml"}
    content = {
        "quantize.json": ("report", json.dumps(said).encode()),
        "theirs.toml": ("report", THEIRS.encode()),
    }
    bundles.add(small(workdir / "b"), content)
    monkeypatch.setattr("hw_profiles.runtimes.aoti.load", lambda *_, **__: pytest.fail("run"))
    code, content, _ = verified(nasctl, "b")
    assert code == 0 and not content["bound"]
    assert any("unknown device 'b/theirs.toml'" in note for note in content["not_measured"])


@pytest.mark.usefixtures("stated")
def test_native_code_is_made_only_for_a_device_that_was_typed(nasctl, workdir, monkeypatch):
    said = {"max_drop": "class=1%", "seed": 3, "board": "own"}
    made = {"quantize.json": ("report", json.dumps(said).encode())}
    bundles.add(small(workdir / "b"), made)
    monkeypatch.setenv(device.ENV, str(workdir))
    (workdir / "own.toml").write_text(THEIRS.replace("theirs", "own"))
    aoti = runtimes.load_module("aoti")
    monkeypatch.setattr(aoti, "unavailable", lambda: "")
    monkeypatch.setattr(aoti, "load", lambda *_, **__: pytest.fail("run"))
    code, content, _ = verified(nasctl, "b")
    assert code == 0 and not content["bound"]
    assert "bound: own runs aoti, native code: name it with --hw" in content["not_measured"]


@pytest.mark.parametrize(("after", "beyond"), [(0.796, False), (0.79, True), (NAN, True)])
def test_the_bound_on_the_images_that_decided_nothing_is_a_note(after, beyond):
    both = WELL | {"max_drop": 0.01, "told": {"float": 0.8, "delivered": after, "images": 7}}
    assert ("on the 7 other validation images" in verdict._beyond("class", both)) is beyond
    for told in (None, both["told"] | {"float": NAN}):
        assert not verdict._beyond("class", both | {"told": told})


def test_a_metric_that_the_float_file_has_not_is_a_note():
    both = {"float": NAN, "delivered": NAN, "images": 9}
    (note,) = verifying._undefined("metric", {"class": WELL, "presence": both})
    assert note == "metric: presence of the float file is nan on these images"


def test_reports_are_strict_json(tmp_path):
    verdict.write({"chain": [{"error": float("inf")}], "metric": {"box": NAN}}, tmp_path / "r")
    text = (tmp_path / "r").read_text()
    assert json.loads(text) == {"chain": [{"error": None}], "metric": {"box": None}}


WELL = {"float": 0.8, "delivered": 0.8}
LOST = {"float": 0.8, "delivered": 0.79, "images": 9, "max_drop": 0.01}


@pytest.mark.parametrize(
    ("found", "code", "said"),
    [
        ({}, 0, ""),
        ({"metric": {"class": WELL, "box": WELL | {"delivered": NAN}}}, 5, "box of the delivered"),
        ({"metric": {"presence": {"float": NAN, "delivered": NAN}}}, 0, ""),
        ({"bound": {"class": LOST | {"float": NAN, "delivered": NAN}}}, 0, ""),
        ({"bound": {"class": LOST}}, 4, "class is 0.7900 on the images"),
        ({"bound": {"class": LOST | {"max_drop": 0.02}}}, 0, ""),
    ],
)
def test_what_was_seen_to_fail_has_an_exit_code(found, code, said):
    nothing = {"latency_ms": None, "memory_bytes": None}
    content = {"chain": [], "metric": None, "bound": {}, "measured": None, "budget": nothing}
    asked = verifying.Asked(device.load("cpu"), None, None, None, None, "val")
    with contextlib.nullcontext() if code == 0 else pytest.raises(NasctlError, match=said) as error:
        verdict.require(content | found, asked, "verify.json")
    assert code == 0 or error.value.exit_code == code


@pytest.mark.parametrize(
    ("limit", "noisy", "code"),
    [
        *[(4.9, "", 4), (5.1, "", 0)],
        *[(4.7, "busy", 4), (4.9, "busy", 1), (5.1, "busy", 1), (5.3, "busy", 0)],
    ],
)
def test_a_budget_is_not_decided_by_a_busy_machine(limit, noisy, code, capsys):
    measured = {"median_ms": 5.0, "spread_ms": 0.4, "p95_ms": 6.0, "memory_bytes": 1}
    content = {
        **{"chain": [], "metric": None, "bound": {}, "measured": measured | {"noisy": noisy}},
        **{"budget": {"latency_ms": limit, "memory_bytes": None}, "not_measured": []},
    }
    verdict.say_outcome(content, Path("verify.json"))
    assert ("in doubt: busy" in capsys.readouterr().err) is bool(noisy)
    asked = verifying.Asked(device.load("cpu"), None, limit, None, None, "val")
    with contextlib.nullcontext() if code == 0 else pytest.raises(NasctlError) as error:
        verdict.require(content, asked, "verify.json")
    assert code == 0 or error.value.exit_code == code
    assert code != 1 or str(error.value).startswith("verify.json: not decided, took 5 ms")


def test_a_changed_bundle_is_refused_before_anything_is_run(nasctl, workdir):
    small(workdir / "b")
    (workdir / "b/model.onnx").write_bytes(b"changed")
    code, content, error = verified(nasctl, "b")
    assert code == 1 and "is not the file that the manifest lists" in error and not content


@pytest.mark.usefixtures("stated")
def test_engines_are_loaded_only_if_they_are_named(nasctl, workdir, monkeypatch):
    small(workdir / "b")
    assert nasctl("build", "b", "--engine", "ort").code == 0
    name = "model.cpu.onnxruntime.ort"
    code, content, _ = verified(nasctl, "b", "--engine", name)
    assert code == 0 and content["file"]["path"] == name
    assert [(one["name"], one["holds"]) for one in content["chain"]] == [
        ("model.onnx = engine", True)
    ]
    # what it computes in is seen, whatever its side-car says
    path = workdir / "b/engines" / f"{name}.json"
    car = json.loads(path.read_text()) | {"observed": "int8"}
    content = json.dumps(car).encode()
    bundles.add(bundles.read(workdir / "b"), {f"engines/{name}.json": ("sidecar", content)})
    (one,) = verified(nasctl, "b", "--engine", name)[1]["chain"]
    assert one["precision"] == "fp32" and one["tolerance"] == chain.TOLERANCE["fp32"]
    monkeypatch.setattr("deploy.engine.load", lambda path: pytest.fail("loaded"))
    assert verified(nasctl, "b")[0] == 0
    code, _, error = verified(nasctl, "b", "--engine", "other")
    assert code == 1 and f"has no engine 'other'; allowed: engines/{name}" in error


@pytest.mark.parametrize(
    ("sample", "said"),
    [
        (b"nonsense", "no inputs to run it on"),
        (save({"other": np.ones((2, 1, 8, 8), np.float32)}), "its model takes input"),
        (save({"input": np.ones((0, 1, 8, 8), np.float32)}), "holds input [0, 1, 8, 8]"),
        (save({"input": np.ones(3, np.float32)}), "holds input [3]"),
    ],
)
def test_a_sample_that_is_none_is_one_line(nasctl, workdir, sample, said):
    bundles.add(small(workdir / "b"), {interface.SAMPLE: ("calibration", sample)})
    code, _, error = verified(nasctl, "b")
    assert code == 1 and f"{interface.SAMPLE}: " in error and said in error


@pytest.mark.usefixtures("stated")
def test_an_engine_of_no_model_is_one_line(nasctl, workdir):
    made, name = small(workdir / "b"), "engines/model.cpu.onnxruntime.ort"
    assert nasctl("build", "b", "--engine", "ort").code == 0
    said = {
        "gone.onnx": "has no member 'gone.onnx'",
        name: f"'{name}' is no ONNX file; allowed: model.onnx",
    }
    for model, wanted in said.items():
        made = bundles.read(made.folder)
        car = json.loads(made.path(f"{name}.json").read_text()) | {"model": model}
        bundles.add(made, {f"{name}.json": ("sidecar", json.dumps(car).encode())})
        code, _, error = verified(nasctl, "b", "--engine", name)
        assert code == 1 and wanted in error


@pytest.mark.usefixtures("stated")
def test_without_its_data_a_bundle_is_verified_but_for_the_metric(nasctl, workdir):
    made = small(workdir / "b")
    said = json.loads((workdir / "b/task.json").read_text()) | {"data": "elsewhere/photos"}
    bundles.add(made, {"task.json": ("task", json.dumps(said).encode())})
    code, content, _ = verified(nasctl, "b")
    assert code == 0 and content["metric"] is None
    assert any("no such data 'elsewhere/photos'" in note for note in content["not_measured"])
    code, _, error = verified(nasctl, "b", "--data", "nowhere")
    assert code == 2 and "no such data 'nowhere'" in error
    assert verified(nasctl, "b", "--data", "digits")[1]["metric"]["class"]["delivered"] > 0.8


@pytest.mark.usefixtures("stated")
def test_code_is_not_run_because_a_bundle_names_it(nasctl, workdir):
    made = small(workdir / "b")
    (workdir / "theirs.py").write_text("raise SystemExit('it was run')")
    said = json.loads((workdir / "b/task.json").read_text()) | {"data": "theirs:task"}
    bundles.add(made, {"task.json": ("task", json.dumps(said).encode())})
    code, content, _ = verified(nasctl, "b")
    assert code == 0 and content["metric"] is None
    assert any("the data are code" in note for note in content["not_measured"])
    refused = nasctl("quantize", "b")
    assert refused.code == 1 and "Name it yourself: --data theirs:task" in refused.err
    # nor because weights do that lie in the bundle
    asked = {"space": "mobilenet", "width": 1.0, "task": {"data": "theirs:task", "size": None}}
    told = {"format": checkpoint.FORMAT, "network": {"genes": []}, **asked}
    weights = save({"w": np.ones(1, np.float32)}, {checkpoint.SAID: json.dumps(told)})
    bundles.add(bundles.read(made.folder), {"model.safetensors": ("weights", weights)})
    code, content, _ = verified(nasctl, "b")
    assert code == 0 and sum("the data are code" in note for note in content["not_measured"]) == 2


@pytest.mark.usefixtures("stated")
def test_the_budget_of_another_device_is_not_held_to(nasctl, workdir):
    made = small(workdir / "b")
    for name, code in (("jetson", 0), ("cpu", 4)):
        said = {"budget": {"latency_ms": 1e-3}, "device": {"name": name}}
        bundles.add(made, {"report.json": ("report", json.dumps(said).encode())})
        outcome, content, _ = verified(nasctl, "b")
        assert outcome == code
        told = [note for note in content["not_measured"] if "it is for jetson" in note]
        assert bool(told) is (name == "jetson")


@pytest.mark.usefixtures("stated")
def test_the_folder_that_one_is_in_is_a_bundle_too(nasctl, workdir, monkeypatch):
    made = small(workdir / "b")
    monkeypatch.chdir(workdir / "b")
    assert nasctl("build", ".", "--engine", "ort").code == 0
    assert verified(nasctl, ".")[0] == 0
    assert (workdir / "b.verify.json").is_file()
    assert bundles.read(made.folder).of("engine")


def test_an_archive_is_not_added_to(nasctl, workdir):
    bundles.pack(small(workdir / "b"), workdir / "b.zip")
    for words in (["quantize", "b.zip"], ["build", "b.zip", "--engine", "ort"]):
        refused = nasctl(*words)
        assert refused.code == 2 and "an archive cannot be added to" in refused.err


@pytest.mark.slow
@pytest.mark.usefixtures("stated")
def test_the_whole_chain_of_a_search_by_a_supernet(nasctl, workdir):
    words = ["--hw", "jetson", "--latency", "5ms", "--quick", "--no-alone", "--run", "r"]
    assert nasctl("search", *words).code == 0
    code, content, _ = verified(nasctl, "r")
    assert code == 0
    names = [one["name"] for one in content["chain"] if one["holds"]]
    assert names == ["supernet = extracted", "network = float file"]
    assert any("the run's budget of 5 ms" in note for note in content["not_measured"])


def test_other_data_than_the_models_judge_nothing(nasctl, workdir):
    made = small(workdir / "b")
    said = json.loads((workdir / "b/task.json").read_text()) | {"data_sha256": "0" * 64}
    bundles.add(made, {"task.json": ("task", json.dumps(said).encode())})
    code, _, error = verified(nasctl, "b", "--data", "digits")
    assert code == 1 and "are not the data that the model was made with" in error


# ---- the chain -----------------------------------------------------------------------------------


@pytest.mark.parametrize("precision", sorted(chain.TOLERANCE))
def test_each_precision_has_its_tolerance(precision):
    before = {"logits": np.ones((4, 3)), "box": np.full((4, 2), 5.0)}
    signs = np.array([[1, -1], [-1, 1]] * 2)  # of an error that scales nothing
    for factor, holds in ((0.9, True), (1.1, False)):
        off = factor * chain.TOLERANCE[precision] * signs
        one = chain.link("a = b", precision, before, {**before, "box": before["box"] * (1 + off)})
        assert one.holds is holds
        if not holds:
            with pytest.raises(ParityFailed, match="^a = b: outputs differ"):
                chain.require([one])


def scaled(values, factor, columns=slice(None)):
    found = values.copy()
    found[:, columns] *= factor
    return found


@pytest.mark.parametrize("shape", [(16, 20), (16, 1), (16,), (2, 20, 5, 4), (4, 9, 20)])
def test_what_int8_scales_wrongly_does_not_hold(shape):
    rng = np.random.default_rng(0)
    before = rng.standard_normal(shape)
    honest = before + 0.05 * rng.standard_normal(shape)
    assert chain.link("a = b", "int8", {"y": before}, {"y": honest}).holds
    for factor in (1.29, 0.75):
        one = chain.link("a = b", "int8", {"y": before}, {"y": honest * factor})
        assert not one.holds and one.gain == pytest.approx(factor, abs=0.02)
        assert one.error < 0.31  # which the tolerance alone would let pass, or nearly
        with pytest.raises(
            ParityFailed, match="outputs differ|times its size; allowed: 0.8 to 1.2"
        ):
            chain.require([one])


@pytest.mark.parametrize("shape", [(16, 20), (2, 20, 5, 4)])
@pytest.mark.parametrize("factor", [0.0, 0.7, 1.29, 2.0])
def test_one_column_that_is_scaled_wrongly_does_not_hold(shape, factor):
    rng = np.random.default_rng(0)
    before = rng.standard_normal(shape)
    honest = before + 0.05 * rng.standard_normal(shape)
    one = chain.link("a = b", "int8", {"y": before}, {"y": scaled(honest, factor, 7)})
    assert one.error < one.tolerance and not one.holds
    assert one.gain == pytest.approx(factor, abs=0.05)


def test_noise_in_quiet_columns_is_no_scale():
    rng = np.random.default_rng(0)
    before = rng.standard_normal((16, 20)) * np.geomspace(0.01, 3, 20)
    after = before + 0.2 * rng.standard_normal((16, 20))
    columns = (before * after).sum(0) / np.square(before).sum(0)
    assert np.abs(columns - 1).max() > chain.GAIN
    assert chain.link("a = b", "int8", {"y": before}, {"y": after}).holds
    nothing = {"y": np.zeros((16, 20))}
    assert chain.link("a = b", "int8", nothing, nothing).holds


def test_an_engine_is_about_as_near_its_int8_file_as_that_is_to_the_float_one():
    assert [chain.built(apart) for apart in (0.0, 0.02, 0.1)] == [0.05, 0.05, 0.2]
    one = chain.Link("a = b", "int8", 0.1, limit=chain.built(0.02))
    assert not one.holds and one.tolerance == 0.05
    assert chain.Link("a = b", "int8", 0.29, limit=chain.built(0.2)).holds
    assert not chain.Link("a = b", "int8", 0.31, limit=chain.built(0.2)).holds


@pytest.mark.parametrize("which", ["logits", "box"])
def test_values_that_are_not_numbers_never_hold(which):
    before = {"logits": np.ones((4, 3)), "box": np.ones((4, 2))}
    after = {**before, which: before[which] * np.nan}
    assert not chain.link("a = b", "int8", before, after).holds


def test_other_outputs_are_no_link():
    with pytest.raises(ParityFailed, match="outputs are"):
        chain.link("a = b", "fp32", {"x": np.ones(3)}, {"y": np.ones(3)})


@pytest.mark.parametrize(
    ("observed", "wanted"),
    [("fp32", "fp32"), ("int8 18, fp32 3", "int8"), ("fp16 2, fp32 1", "fp16"), ("?", "fp32")],
)
def test_a_mixture_is_held_to_its_coarsest(observed, wanted):
    assert chain.coarsest(observed) == wanted
