"""`nasctl search --hw a,b` and the verbs that measure."""

import json

import pytest
from onnx import save as save_onnx

from hw_profiles.graph import onnx_graph
from hw_profiles.op import Tape

TINY = ("search", "--no-alone", "--width", 0.25, "--threads", 1, "--epochs", 0.2, "--batch", 64)
TINY = (*TINY, "--evaluations", 3)


@pytest.mark.slow
def test_two_devices_share_one_supernet_and_get_a_file_each(nasctl, workdir):
    boards = ("--hw", "jetson,jetson-tx2", "--latency", "6ms,15ms")
    outcome = nasctl(*TINY, *boards, "--run", workdir / "both", "--json")
    assert outcome.code == 0, outcome.err
    reports = json.loads(outcome.out)
    assert list(reports) == ["jetson-orin-nano", "jetson-tx2"]
    for name, budget in zip(reports, (6.0, 15.0), strict=True):
        assert reports[name]["device"]["name"] == name
        assert reports[name]["budget"]["latency_ms"] == budget
        assert reports[name]["chosen"]["latency"]["predicted"]["high_ms"] <= budget
        assert (workdir / "both" / name / "bundle" / "model.onnx").exists()
    assert (workdir / "both/jetson-orin-nano/supernet.safetensors").exists()
    assert not (workdir / "both/jetson-tx2/supernet.safetensors").exists()
    again = nasctl(*TINY, *boards, "--run", workdir / "both", "--json")
    assert json.loads(again.out) == reports  # nothing is repeated


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        ("--hw jetson,jetsn --latency 5ms", 2, "unknown device 'jetsn'"),
        ("--hw jetson,jetson-orin-nano", 2, "a device is named twice"),
        ("--hw jetson,raspi4 --latency 5ms,2ms,1ms", 2, "3 budgets for 2 devices"),
        ("--hw jetson --latency 5ms,2ms", 2, "2 budgets for one device"),
        ("--hw jetson,jetson-tx2 --storage sqlite:///a.db", 2, "cannot share one study"),
        ("--hw jetson,jetson-tx2 --latency 5ms,1us", 3, "fits 0.001 ms on jetson-tx2"),
    ],
)
def test_several_devices_bad_input(words, code, said, nasctl, monkeypatch):
    monkeypatch.setattr("cli.stages.trained_supernet", lambda job: pytest.fail("it began to work"))
    outcome = nasctl(*TINY, *words.split())
    assert outcome.code == code
    assert said in outcome.err
    assert "Traceback" not in outcome.err


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        ("profile --hw jetson", 1, "runtime tensorrt: "),
        ("profile --hw raspi4 --runtime onnxruntime", 2, "raspi4 is not this machine"),
        ("profile --on telnet://x", 2, "is not a board's address"),
        ("profile --budget 5", 2, "--budget: '5' is not a duration"),
        ("profile --runtime onxruntime", 2, "unknown runtime 'onxruntime'"),
        ("profile --space resnt", 2, "unknown space 'resnt'"),
        ("profile --on ssh://board", 2, "--hw: cpu is this machine"),
        ("bench model.onnx --on ssh://board", 2, "--hw: cpu is this machine"),
        ("profile --runtime openvino --precision fp8", 1, "offers no fp8"),
        ("profile --validate", 1, "cannot read the latency table"),
        ("bench nowhere.onnx", 1, "nowhere.onnx: no such file"),
        ("bench model.onnx --runtime nothing", 2, "unknown runtime 'nothing'"),
        ("bench empty.onnx", 1, "cannot load it"),
    ],
)
def test_measuring_bad_input(words, code, said, nasctl, workdir):
    (workdir / "empty.onnx").write_bytes(b"no model")
    write_model(workdir / "model.onnx")
    outcome = nasctl(*words.split())
    assert outcome.code == code, outcome.err
    assert said in outcome.err
    assert "Traceback" not in outcome.err


def write_model(path):
    tape = Tape(3, 8)
    tape.linear(tape.gap(tape.conv(tape.input, 8, kernel=3, act="relu")), 4)
    save_onnx(onnx_graph(tape.ops), path)


def test_bench_of_a_users_own_file(nasctl, workdir):
    write_model(workdir / "model.onnx")
    outcome = nasctl("bench", "model.onnx", "--duration", "1s", "--json")
    assert outcome.code == 0, outcome.err
    found = json.loads(outcome.out)
    assert 0 < found["median_ms"] <= found["p90_ms"] <= found["p95_ms"] <= found["p99_ms"]
    assert found["runtime"].startswith("onnxruntime 1.")
    assert found["precision"] == "fp32"
    assert "percentile(99%)" in nasctl("bench", "model.onnx", "--duration", "1s").err


def test_a_profile_is_planned_without_measuring(nasctl, workdir):
    outcome = nasctl("profile", "--space", "resnet", "--budget", "2min", "--dry-run", "--json")
    assert outcome.code == 0, outcome.err
    assert json.loads(outcome.out)["estimated_seconds"] <= 120
    assert list(workdir.iterdir()) == []
