"""`nasctl quantize`: what is tried, guarded, chosen and written into the bundle."""

import json
import re

import pytest
from bundles import small

from cli import measuring, quantizing
from deploy import bundle as bundles
from hw_profiles.protocol import Timing
from hw_profiles.runtimes import onnxruntime


@pytest.fixture
def timed(monkeypatch):
    """Timings that a test states: ms of the float file and of the INT8 ones."""

    def state(*ms):
        def timer(on, board, seed, *, as_written):
            assert as_written
            return lambda paths: [Timing(ms[at], 0.001, 1, 1, 1, 9) for at in range(len(paths))]

        monkeypatch.setattr(measuring, "timer", timer)

    return state


def quantized(nasctl, *arguments):
    outcome = nasctl("quantize", "b", "--images", "64", *arguments, "--json")
    return outcome.code, json.loads(outcome.out) if outcome.out else {}, outcome.err


def test_a_faster_int8_file_is_delivered_with_the_reasons(nasctl, workdir, timed):
    timed(1.0, 0.4)
    before = small(workdir / "b").model.stat().st_size
    code, content, _ = quantized(nasctl, "--max-drop", "3%")
    assert code == 0 and content["choice"] == "u8"
    assert "x2.50 of model.onnx's speed" in content["why"][0]
    row = content["variants"][1]
    assert row["spent"] <= 1 and row["bytes"] < before / 2
    told = row["told"]["class"]
    assert told["low"] <= told["value"] <= told["high"] and content["told_on"] == 180
    found = bundles.read(workdir / "b")
    assert found.manifest.model == "model.int8.onnx"
    assert json.loads(found.path("quantize.json").read_text()) == content
    session = onnxruntime.load(found.model)
    assert onnxruntime.observed_precision(session) == "int8"
    assert session.inputs == {"input": ("batch", 1, 8, 8)}
    assert not list(workdir.glob(".b.quantize*"))


def test_a_loss_on_the_images_that_decided_nothing_is_told_and_decides_nothing(
    nasctl, workdir, timed, monkeypatch
):
    timed(1.0, 0.4)
    small(workdir / "b")
    honest = quantizing.Job.evidence

    def evidence(job, model, half):
        found = honest(job, model, half)
        lost = half == 1 and model is not job.plain
        return {name: each * 0 if lost else each for name, each in found.items()}

    for lost in (False, True):
        if lost:
            monkeypatch.setattr(quantizing.Job, "evidence", evidence)
        _, content, _ = quantized(nasctl, "--max-drop", "3%")
        assert content["choice"] == "u8" and content["variants"][1]["spent"] <= 1
        said = [line for line in content["why"] if "beyond the bound on the images" in line]
        assert len(said) == lost
    assert "u8: " in said[0] and "class 0.0000, before 0.9" in said[0]


def test_a_file_of_one_example_at_a_time_is_calibrated_so(nasctl, workdir, timed):
    timed(1.0, 0.4)
    small(workdir / "b", sizes=(1, 1, 8, 8))
    code, content, error = quantized(nasctl, "--max-drop", "3%")
    assert code == 0, error
    assert content["choice"] == "u8" and content["variants"][1]["spent"] <= 1
    session = onnxruntime.load(bundles.read(workdir / "b").model)
    assert session.inputs == {"input": (1, 1, 8, 8)}


def test_a_slower_int8_file_stays_out(nasctl, workdir, timed):
    timed(1.0, 1.4)
    small(workdir / "b")
    code, content, _ = quantized(nasctl, "--max-drop", "3%")
    assert code == 0 and content["choice"] == "model.onnx"
    assert content["why"] == ["u8: x0.71 of model.onnx's speed, slower", "model.onnx is kept"]
    found = bundles.read(workdir / "b")
    assert found.manifest.model == "model.onnx" and "model.int8.onnx" not in found.manifest.members


def test_half_precision_is_refused_where_the_processor_computes_in_float32(nasctl, workdir, timed):
    """ONNX Runtime has no float16 convolutions for processors: it casts back and forth."""
    timed(1.0, 0.5)  # even where it were faster
    small(workdir / "b")
    code, content, _ = quantized(nasctl, "--max-drop", "3%", "--forms", "fp16")
    assert code == 0 and content["choice"] == "model.onnx"
    row = content["variants"][1]
    assert [one["kind"] for one in row["kept"]] == ["GlobalAveragePool"] and row["nodes"] > 4
    assert row["name"] == "fp16" and row["observed"] == "fp32" and row["spent"] <= 1
    assert content["why"][-1] == (
        "fp16: computes in fp32 there, at x2.00 of model.onnx's speed: refused"
    )
    assert bundles.read(workdir / "b").manifest.members.keys().isdisjoint({"model.fp16.onnx"})


def test_what_the_runtime_cannot_run_is_told(nasctl, workdir, timed):
    timed(1.0, 0.4)
    small(workdir / "b")
    code, content, _ = quantized(nasctl, "--max-drop", "3%", "--forms", "int8, bf16")
    assert code == 0 and content["choice"] == "u8"
    assert "ONNX Runtime cannot load it" in content["refused"]["bf16"]
    assert content["why"][-1].startswith("bf16: not possible here: ")


@pytest.mark.parametrize(
    ("observed", "otherwise"),
    [
        ("fp16", False),
        ("?", False),
        ("fp16 9, ? 2", False),
        ("fp32", True),
        ("fp16 1, fp32 9", True),
    ],
)
def test_a_half_that_computes_partly_in_float32_is_none(observed, otherwise):
    row = {"name": "fp16", "observed": observed}
    assert quantizing._computes_otherwise(row) is otherwise


def test_what_half_precision_leaves_in_float_is_told(nasctl, workdir, timed, monkeypatch):
    timed(1.0, 0.5)
    monkeypatch.setattr("hw_profiles.half.vanishing", lambda model: 3)
    small(workdir / "b")
    said = nasctl("quantize", "b", "--max-drop", "3%", "--forms", "fp16")
    assert "fp16: stay in float32: GlobalAveragePool 1" in said.err
    assert "fp16: 3 weights are too small for it and became 0" in said.err
    assert "1 of 9" in said.out


def test_a_float_file_that_knows_nothing_is_not_the_fault_of_a_form(nasctl, workdir, monkeypatch):
    small(workdir / "b")
    monkeypatch.setattr("cli.quantizing._scores", lambda *_: {"class": 0.0})
    code, content, error = quantized(nasctl, "--forms", "fp16")
    assert code == 1 and "the float file scores 0" in error and not content


def test_all_forms_inside_the_bound_go_to_a_board_that_is_not_here(nasctl, workdir):
    before = small(workdir / "b").model.stat().st_size
    code, content, error = quantized(
        nasctl, "--hw", "jetson", "--max-drop", "9%", "--forms", "fp16,int8"
    )
    assert code == 0 and content["choice"] is None, error
    found = bundles.read(workdir / "b")
    assert found.manifest.model == "model.onnx"
    assert {"model.int8.onnx", "model.fp16.onnx"} <= found.manifest.members.keys()
    assert found.path("model.fp16.onnx").stat().st_size < 0.6 * before
    assert content["variants"][-1]["observed"] == "?"
    code, _, _ = quantized(nasctl, "--hw", "jetson", "--max-drop", "9%")
    assert code == 0 and "model.fp16.onnx" not in bundles.read(workdir / "b").manifest.members


def test_a_board_that_is_not_here_gets_the_file_but_no_choice(nasctl, workdir):
    small(workdir / "b")
    code, content, _ = quantized(nasctl, "--hw", "jetson", "--max-drop", "5%")
    assert code == 0 and content["choice"] is None
    assert [row["name"] for row in content["variants"]] == ["model.onnx", "s8"]
    assert content["why"] == ["the device was not reached: what is faster is not known"]
    found = bundles.read(workdir / "b")
    assert found.manifest.model == "model.onnx" and "model.int8.onnx" in found.manifest.members


def test_what_was_measured_before_a_kill_is_not_measured_again(nasctl, workdir, timed, monkeypatch):
    timed(1.0, 0.4)
    small(workdir / "b")
    with monkeypatch.context() as patched:
        patched.setattr(
            "cli.quantizing._timed", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt)
        )
        assert nasctl("quantize", "b", "--images", "64", "--max-drop", "3%").code == 130
    (kept,) = workdir.glob(".b.quantize*")
    assert re.search(r'"key": "spent ', kept.read_text())
    first = bundles.read(workdir / "b")
    assert first.manifest.model == "model.onnx"  # nothing half done
    judged = []
    monkeypatch.setattr("cli.judging.spent", lambda *_: judged.append(1) or 0.0)
    assert quantized(nasctl, "--max-drop", "3%")[1]["choice"] == "u8"
    assert len(judged) == 1  # by the images that decide nothing, once


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (("--max-drop", "1"), 2, "--max-drop: '1'; allowed: a share, as 2%"),
        (("--max-drop", "seg=1%"), 2, "unknown task 'seg'"),
        (("--calibration", "max"), 2, "unknown calibration 'max'"),
        (("--forms", "int8,fp8"), 2, "unknown form 'fp8'; allowed: bf16, fp16, int8"),
        (("--hw", "raspi4"), 2, "--hw: tflite computes no INT8"),
        (("--hw", "raspi4", "--forms", "fp16"), 2, "unknown runtime 'tflite'"),
        (("--hw", "nowhere"), 2, "unknown device 'nowhere'"),
        (("--on", "ssh://pi@board"), 2, "cpu is this machine"),
        (("--data", "nowhere"), 2, "no such data 'nowhere'"),
    ],
)
def test_what_cannot_be_asked_for_is_one_line(nasctl, workdir, arguments, code, said):
    small(workdir / "b")
    found, content, error = quantized(nasctl, *arguments)
    assert found == code and said in error and not content
    assert len(error.strip().splitlines()) == 1


def test_what_is_no_bundle_is_one_line(nasctl, workdir):
    found, _, error = quantized(nasctl)
    assert found == 1 and error.startswith("nasctl: b: no such bundle")
