"""deploy.verify: the file is run, differences are found, gaps are named."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from onnx import helper, numpy_helper
from onnx import save as save_onnx
from torch import nn

from deploy import verify
from deploy.verify import Chosen, Measured, Report, Stage
from hw_profiles.latency import Estimate
from hw_profiles.measure import Plan, Timing
from nas.errors import NasctlError, ParityFailed


def write_linear(path, weight, batch="batch"):
    """A file that computes images.flatten(1) @ weight, written without torch's exporter."""
    graph = helper.make_graph(
        [
            helper.make_node("Flatten", ["input"], ["flat"]),
            helper.make_node("MatMul", ["flat", "w"], ["logits"]),
        ],
        "linear",
        [helper.make_tensor_value_info("input", 1, (batch, 3, 2, 2))],
        [helper.make_tensor_value_info("logits", 1, (batch, weight.shape[1]))],
        [numpy_helper.from_array(weight, "w")],
    )
    opset = [helper.make_opsetid("", 18)]
    save_onnx(helper.make_model(graph, opset_imports=opset, ir_version=8), path)
    return path


class Linear(nn.Module):
    def __init__(self, weight):
        super().__init__()
        self.weight = nn.Parameter(torch.from_numpy(weight.copy()))
        self.drop = nn.Dropout(0.9)

    def forward(self, x):
        return self.drop(x.flatten(1)) @ self.weight


@pytest.fixture
def data():
    rng = np.random.default_rng(0)
    weight = rng.standard_normal((12, 4)).astype(np.float32)
    return weight, rng.standard_normal((50, 3, 2, 2)).astype(np.float32)


def test_parity_of_equal_computations(tmp_path, data):
    weight, images = data
    net = Linear(weight).train()
    error = verify.parity(net, write_linear(tmp_path / "m.onnx", weight), images)
    assert 0 <= error < 1e-5
    assert net.training and net.drop.training  # eval was for the comparison only


def test_parity_needs_no_more_images_than_there_are(tmp_path, data):
    weight, images = data
    path = write_linear(tmp_path / "m.onnx", weight)
    assert verify.parity(Linear(weight), path, images[:2], batch_sizes=(5,)) < 1e-5


@pytest.mark.parametrize("wrong", [1e-2, float("nan")])
def test_a_wrong_weight_fails(tmp_path, data, wrong):
    weight, images = data
    path = write_linear(tmp_path / "m.onnx", weight)
    weight = weight.copy()
    weight[3, 2] += wrong
    with pytest.raises(ParityFailed, match="differ by"):
        verify.parity(Linear(weight), path, images)


def test_a_tolerable_difference_is_returned_and_is_relative_to_the_logits(tmp_path, data):
    weight, images = data
    path = write_linear(tmp_path / "m.onnx", weight * 1000)
    error = verify.parity(Linear(weight * 1000 * (1 + 2e-5)), path, images)
    assert 1e-3 < error < 1


def test_a_file_of_another_shape_or_batch_fails(tmp_path, data):
    weight, images = data
    with pytest.raises(ParityFailed, match=r"\(1, 3\).*\(1, 4\)"):
        path = write_linear(tmp_path / "narrow.onnx", weight[:, :3])
        verify.parity(Linear(weight), path, images)
    with pytest.raises(NasctlError, match="cannot run it"):
        path = write_linear(tmp_path / "fixed.onnx", weight, batch=1)
        verify.parity(Linear(weight), path, images)


@pytest.mark.parametrize("batch", [7, 50, 256])
def test_outputs_of_all_batches_are_in_the_order_of_the_images(tmp_path, data, batch):
    weight, images = data
    path = write_linear(tmp_path / "m.onnx", weight)
    found = verify.outputs(path, images, batch=batch)["logits"]
    np.testing.assert_allclose(found, images.reshape(50, 12) @ weight, rtol=1e-5, atol=1e-6)


def test_latency_of_the_file_on_this_machine(tmp_path, data):
    path = write_linear(tmp_path / "m.onnx", data[0])
    plan = Plan(rounds=4, max_rounds=4)
    timing = verify.latency(path, rng=np.random.default_rng(0), plan=plan)
    assert timing.n >= 2
    assert 0 < timing.median_ms <= timing.p95_ms


TIMING = Timing(1.5, 0.1, 1.8, 1.9, 2.0, 20)
ESTIMATE = Estimate(1.4, 1.2, 1.7, "calibrated", {"calibrated": 1.0})
REPORT = Report(
    nasctl="0.1.0",
    created="2026-01-01T00:00:00Z",
    spec={"seed": 3},
    device={"name": "jetson"},
    chosen=Chosen(
        arch={"width": 8},
        genes=(1, 2),
        macs=10,
        params=5,
        test_accuracy=0.9,
        predicted=ESTIMATE,
        measured=Measured(TIMING, "jetson", "onnxruntime, 1 thread"),
        parity_error=1e-6,
    ),
    stages=(Stage("train", 12.5),),
)


def test_a_full_report_has_no_gaps_but_those_it_is_told():
    assert REPORT.not_measured() == []
    assert replace(REPORT, notes=("energy",)).to_dict()["not_measured"] == ["energy"]


@pytest.mark.parametrize(
    ("field", "gap"),
    [("measured", "latency"), ("test_accuracy", "accuracy"), ("parity_error", "agreement")],
)
def test_what_is_absent_is_named_as_not_measured(field, gap):
    (text,) = replace(REPORT, chosen=replace(REPORT.chosen, **{field: None})).not_measured()
    assert text.startswith(gap)


def test_an_analytic_prediction_is_named_as_not_measured():
    guess = replace(ESTIMATE, source="analytic")
    (text,) = replace(REPORT, chosen=replace(REPORT.chosen, predicted=guess)).not_measured()
    assert "jetson" in text and "analytic" in text


def test_report_to_json_and_back(tmp_path):
    path = tmp_path / "report.json"
    REPORT.write(path)
    back = verify.read(path)
    assert back == json.loads(json.dumps(REPORT.to_dict()))
    assert back["chosen"]["latency"]["predicted"]["high_ms"] == 1.7
    assert back["chosen"]["latency"]["measured"]["p95_ms"] == 1.9
    assert back["chosen"]["latency"]["measured"]["on"] == "jetson"
    assert back["chosen"]["parity"] == {"max_abs_error": 1e-6}
    assert back["stages"][0]["seconds"] == 12.5


@pytest.mark.parametrize("content", [None, "{", "[1]"])
def test_an_unreadable_report_is_one_clear_error(tmp_path, content):
    path = tmp_path / "report.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(NasctlError, match="report.json"):
        verify.read(path)


def test_the_environment_names_versions_and_processor():
    found = verify.environment()
    assert found["torch"] == torch.__version__
    assert found["cpu"] and found["cores"] >= 1
