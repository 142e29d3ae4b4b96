"""benchmarks.deploy: ratios and their spread decide, nothing that a runtime refuses is lost."""

from __future__ import annotations

import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from benchmarks import contract, deploy, deploy_nets, deploy_nncf, deploy_rows
from benchmarks.deploy_nets import Examples, Subject
from benchmarks.deploy_rows import Effort
from benchmarks.deploy_timing import Turns, summed
from compress import guard, quantize
from compress.guard import Variant
from hw_profiles.graph import onnx_graph
from hw_profiles.op import Tape
from hw_profiles.protocol import Timing
from hw_profiles.runtimes import _torch_graph
from nas.errors import NasctlError


def timing(ms, noisy=""):
    return Timing(ms, 0.0, ms, ms, ms, 10, noisy)


def test_ratios_are_taken_inside_a_process_and_summed_over_all():
    slow_and_quick = [[timing(2.0), timing(1.0)], [timing(20.0), timing(10.0, "busy")]]
    plain, other = summed(slow_and_quick)
    assert (plain.ratio, plain.low, plain.high, plain.noisy) == (1, 1, 1, "")
    assert (other.ratio, other.low, other.high, other.ms) == (2, 2, 2, 5.5)
    assert other.noisy == "1 of 2 processes: busy"
    spread = summed([[timing(1.0), timing(1 / ratio)] for ratio in (1.0, 1.5, 2.0)])[1]
    assert spread.ratio == 1.5 and spread.low == pytest.approx(1.05)
    assert spread.high == pytest.approx(1.95)


@pytest.mark.parametrize(("low", "taken"), [(1.01, "u8"), (0.99, "fp32")])
def test_a_file_is_taken_if_the_lower_end_of_its_ratios_is_above_1(low, taken):
    base, other = Turns(3.0, 1, 1, 1), Turns(2.0, 1.5, low, 1.9)
    variants = [
        Variant(name, 0.0, each.timing(base.ms, 5))
        for name, each in (("fp32", base), ("u8", other))
    ]
    assert guard.fastest(variants).name == taken
    doubtful = replace(other, noisy="1 of 5 processes: busy").timing(base.ms, 5)
    choice = guard.fastest([variants[0], replace(variants[1], timing=doubtful)])
    assert choice.name == "fp32" and "the machine was busy" in choice.why[0]


class Logits(nn.Module):
    def __init__(self, model):
        super().__init__()
        self.graph = _torch_graph.read(model.SerializeToString(), None)

    def forward(self, x):
        return self.graph(x)[0]


@pytest.fixture(scope="module")
def small():
    tape = Tape(channels=3, size=8)
    x = tape.conv(tape.input, 16, kernel=3, norm=True, act="relu")
    x = tape.conv(x, 16, kernel=3, groups=16, norm=True, act="relu")
    tape.linear(tape.gap(x), 4)
    exported = onnx_graph(tape.ops, batch=None)
    net, rng = Logits(exported), np.random.default_rng(0)
    held = rng.standard_normal((80, 3, 8, 8), np.float32)
    answers = deploy_nets.through(net, held).argmax(1)
    data = Examples(held, answers, held, answers)
    return Subject(net, exported, quantize.prepared(exported), data)


@pytest.fixture
def timed(monkeypatch):
    """INT8 at twice the speed, everything else at that of fp32."""

    def in_turn(paths, n, seconds):
        return [Turns(2.0, 1.0, 1.0, 1.0), *(Turns(1.0, 2.0, 1.9, 2.1) for _ in paths[1:])]

    monkeypatch.setattr(deploy_rows, "in_turn", in_turn)


def test_every_form_is_a_cell_or_a_refusal(small, timed):
    effort = Effort(processes=1, seconds=0.1, nncf="/no/such/python")
    row = deploy_rows.measured(small, "onnxruntime", effort)
    forms = {"fp32", "fp16", "bf16", "u8, no guard", "u8", "u8 but depthwise"}
    assert set(row["files"]) | set(row["refused"]) == {*forms, "library's defaults", "NNCF"}
    assert "ONNX Runtime cannot load it" in row["refused"]["bf16"]
    assert "cannot run it" in row["refused"]["NNCF"]
    assert "/tmp" not in str(row["refused"]) and row["nncf"] is True
    cells = row["files"]
    assert all(cell["holds"] for cell in cells.values())
    assert cells["fp32"]["error"] < 1e-5 < cells["fp16"]["error"] < cells["u8"]["error"]
    # it computes in float32, so it is no file in half precision, however fast it may look
    choice = deploy_rows.chosen(row)
    assert cells["fp16"]["observed"] == "fp32" and choice.name in ("u8", "u8 but depthwise")
    assert not any(line.startswith("fp16") for line in choice.why)
    assert cells["u8 but depthwise"]["observed"] == "int8 2, fp32 1"


def test_aoti_says_why_it_takes_no_quantized_file(small, monkeypatch):
    built = deploy_rows.engines.build

    def no_compiler(model, path, **asked):
        if asked["precision"] != "fp16" and "DequantizeLinear" not in str(model.read_bytes()):
            raise NasctlError("would be compiled", where=str(model))
        return built(model, path, **asked)

    monkeypatch.setattr(deploy_rows.engines, "build", no_compiler)
    row = deploy_rows.measured(small, "aoti", Effort(1, 0.1))
    assert row["files"] == {} and deploy_rows.chosen(row) is None
    assert row["refused"]["fp32"] == "would be compiled"
    assert "offers no fp16" in row["refused"]["fp16"]
    assert "DequantizeLinear" in row["refused"]["u8, no guard"]


def test_nncf_missing_is_said_in_its_words(small, tmp_path):
    data = small.data
    asked = deploy_nncf.Asked("onnxruntime", data.fit, data.held, data.held_labels, 0.005)
    with pytest.raises(NasctlError, match="NNCF failed .*No module named 'nncf'"):
        deploy_nncf.controlled(sys.executable, small.exported, asked, tmp_path)


def test_a_network_is_held_against_what_it_answers_with_every_layer_awake():
    zero = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))
    nn.init.zeros_(zero[0].weight)
    assert deploy_nets.awake(zero)[0].weight.abs().min() > 0
    data = deploy_nets.texts(10, 50, 30)
    assert data.fit.min() > 0 and data.fit.max() < 50 and data.held_labels.max() < 10
    halves = [data.half(which)[0] for which in (0, 1)]
    assert sum(map(len, halves)) == 30 and halves[0].tolist() == data.held[::2].tolist()


def test_the_last_layer_is_fitted():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Flatten(), nn.Linear(6, 3))
    x = np.random.default_rng(0).standard_normal((90, 1, 2, 3)).astype(np.float32)
    labels = x.reshape(90, 6)[:, :3].argmax(1)
    before = (deploy_nets.through(net, x).argmax(1) == labels).mean()
    deploy_nets.fit(net, Examples(x, labels, x, labels))
    assert (deploy_nets.through(net, x).argmax(1) == labels).mean() > max(0.8, before)


def cell(ratio, low, high, drop=0.0, **more):
    parts = {"ms": 1.0, "noisy": "", "error": 0.0, "error_largest": 0.0, "holds": True, "kept": 0}
    sizes = {"observed": "int8", "model_bytes": 1, "engine_bytes": 1, "build_seconds": 1.0}
    found = {"ratio": ratio, "low": low, "high": high, "drop_told": drop, "spent": 0.0}
    return {**parts, **sizes, **found, **more}


def row(**files):
    plain = cell(1, 1, 1, observed="fp32")
    return {
        "files": {"fp32": plain, **files},
        "refused": {},
        "processes": 5,
        "nncf": True,
        "clock": "wall",
    }


def found(*rows):
    return [(deploy.key("resnet", at, "onnxruntime"), one) for at, one in enumerate(rows)]


def test_a_claim_counts_where_the_lower_end_makes_it():
    outcome = contract.Outcome("deploy")
    beyond, in_doubt = cell(1.7, 1.6, 1.8), cell(1.7, 1.4, 2.0)
    lossy, outside = cell(1.7, 1.6, 1.8, drop=0.006), cell(1.7, 1.6, 1.8, spent=1.1)
    another = cell(1.7, 1.6, 1.8, holds=False)
    rows = [row(u8=one) for one in (beyond, in_doubt, lossy, outside, another)]
    theirs = cell(0.5, 0.4, 0.6, observed="fp32 3, int8 1")
    slow = row(u8=cell(0.8, 0.7, 0.9), NNCF=theirs)
    deploy.figures(outcome, found(*rows, slow))
    assert next(iter(outcome.aims.values()))["got"] == 1
    assert outcome.figures["networks_int8_faster_1_5"] == 3
    assert outcome.figures["networks_int8_faster_1_5_inside_the_bound_told"] == 1
    assert outcome.figures["kept_in_float"] == 2  # also where u8 is outside the bound
    assert outcome.figures["rows_where_int8_loses"] == 1
    assert outcome.figures["NNCF: share in float, theirs"] == 0.75
    assert outcome.figures["NNCF: share in float, ours"] == 0
    assert outcome.figures["NNCF: ours faster beyond the spread"] == 1


def test_the_half_that_is_told_has_no_part_in_what_is_chosen():
    lossy, slower = cell(1.9, 1.8, 2.0, drop=0.006), cell(1.7, 1.6, 1.8)
    (taken,) = deploy.best(found(row(u8=lossy, s8=slower))).values()
    assert taken is lossy


def test_old_rows_are_told_by_the_rules_of_today():
    busy = row(u8=cell(1.2, 1.1, 1.3, noisy="1 of 5 processes: busy")) | {"choice": "u8"}
    assert deploy_rows.chosen(busy).name == "fp32"
    assert deploy_rows.chosen(row(u8=cell(1.7, 1.6, 1.8))).name == "u8"


@pytest.mark.parametrize(
    ("observed", "share"),
    [("int8", 0), ("fp32", 1), ("int8 63, fp32 46", 46 / 109), ("bf16 1, fp32 2, int8 1", 0.75)],
)
def test_in_float_is_what_is_seen_to_compute_so(observed, share):
    assert deploy_rows.in_float({"observed": observed, "kept": 0}) == pytest.approx(share)


def test_rows_without_a_time_and_refusals_are_lines():
    lines = deploy.table_lines(*found(row() | {"files": {}, "refused": {"fp32": "why"}})[0])
    assert [line[3:5] for line in lines] == [["fp32", "refused"]]
    (name, one), *_ = found(row(u8=cell(1.7, 1.6, 1.8, noisy="busy")))
    lines = deploy.table_lines(name, one)
    assert {len(line) for line in lines} == {len(deploy.HEADER)} and "wall noisy" in lines[1]


def test_a_row_is_measured_again_only_if_it_lacks_what_is_asked_for():
    work = deploy.Work("digits", None, Effort(1, 1.0), quick=False, again=False)
    noisy = row(u8=cell(1.7, 1.6, 1.8, noisy="busy"))
    assert not work.wanting(noisy, "onnxruntime")
    assert replace(work, again=True).wanting(noisy, "onnxruntime")
    asked = replace(work, effort=Effort(1, 1.0, "python"))
    assert not asked.wanting(noisy, "onnxruntime")
    assert asked.wanting({**noisy, "nncf": False}, "onnxruntime")
    assert not asked.wanting({**noisy, "nncf": False}, "aoti")
