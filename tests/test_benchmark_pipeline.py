"""benchmarks.pipeline: what is as fast is chosen, what is compared is fair, rows name no folder."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
import torch

from benchmarks import contract, pipeline, pipeline_chain, pipeline_int8, pipeline_stranger
from benchmarks.pipeline import DIGITS
from benchmarks.pipeline_chain import Experiment, evidence_path
from hw_profiles.op import macs
from nas import checkpoint


@pytest.fixture
def experiment(tmp_path):
    return Experiment(DIGITS, 0, contract.Rows(tmp_path / "rows.jsonl"), tmp_path)


def test_a_row_is_made_once_and_names_its_data_not_a_folder(experiment):
    setting = replace(DIGITS, data="/somewhere/tiny_imagenet_20")
    e = replace(experiment, setting=setting)
    assert e.row(lambda: {"ms": 1.0}, what="budget") == {"ms": 1.0}
    assert e.row(lambda: pytest.fail("made again"), what="budget") == {"ms": 1.0}
    assert "somewhere" not in e.rows.path.read_text()
    other = replace(e, setting=replace(setting, own=2.0))
    assert other.row(lambda: {"ms": 2.0}, what="budget") == {"ms": 2.0}


def test_the_random_network_is_the_most_work_that_is_not_slower(experiment, monkeypatch):
    space, like = experiment.space, experiment.folder / "run"
    (like / "bundle").mkdir(parents=True)
    (like / "bundle" / "arch.json").write_text(json.dumps({"genes": space.smallest.tolist()}))
    drawn = space.sample(np.random.default_rng((0, 71)), pipeline_chain.DRAWN)
    work = [macs(space.ops(space.decode(row))) for row in drawn]
    slow = int(np.argmax(work))
    for late, wanted in ((slow, int(np.argsort(work)[-2])), (None, slow)):
        took = [1.0, *(2.0 if at == late else 1.0 for at in range(len(drawn)))]
        monkeypatch.setattr(pipeline_chain, "graph_ms", lambda graphs, seed, took=took: took)
        assert experiment.at_random(like).tolist() == drawn[wanted].tolist()


def test_on_fewer_pixels_the_widest_network_that_is_not_slower(experiment, monkeypatch):
    widths = pipeline_chain.WIDTHS
    monkeypatch.setattr(pipeline_chain, "graph_ms", lambda graphs, seed: list(widths))
    assert experiment.on_less(0.69)[1].scale == 0.7
    assert experiment.on_less(0.1)[1].scale == widths[0]


def test_as_much_work_counts_search_moves_and_own_training(experiment):
    e = replace(experiment, setting=replace(DIGITS, search=5.0, own=1.0))  # 8 steps per epoch
    moves = 8  # every fourth of the last 30 steps
    assert e.work == round(40 + moves * 9 / 3) + 8


@pytest.mark.parametrize(
    ("ms", "noisy", "met"), [(1.0, "", True), (1.2, "", False), (1.0, "busy", False)]
)
def test_a_gain_counts_at_equal_milliseconds_and_beyond_doubt(experiment, ms, noisy, met):
    right = torch.ones(64)
    for name, share in (("whole", 60), ("no search", 30)):
        seen = right * (torch.arange(64) < share)
        checkpoint.write(evidence_path(experiment, name), {"digit": seen, "odd": seen.clone()}, {})
    timing = {"median_ms": 1.0, "noisy": noisy}
    took = {"whole": {**timing, "median_ms": ms}, "no search": timing}
    outcome = contract.Outcome("pipeline")
    pipeline.compared(outcome, [experiment], [took], "no search")
    assert outcome.figures["digit: whole against no search"] == pytest.approx(1.0)
    assert outcome.aims["digit_against_no_search"]["met"] is met


def test_choosing_int8_networks_by_float_milliseconds():
    work, fp32 = np.arange(1.0, 21), np.arange(1.0, 21)
    same = pipeline_int8.judged(work, fp32, fp32 / 2)
    assert same["kendall"] == 1 and same["missed"] == same["lost"] == 0
    assert same["int8 / fp32"] == 0.5
    int8 = fp32 / 2
    int8[::2] *= 1.5  # every other network gains nothing
    mixed = pipeline_int8.judged(work, fp32, int8)
    assert mixed["missed"] > 0 and mixed["kendall"] < 1
    assert mixed["highest"] == 0.75 and mixed["lowest"] == 0.5


def test_a_budget_is_held_by_the_middle_of_the_strangers_medians(tmp_path):
    rows = contract.Rows(tmp_path / "rows.jsonl")
    shares = pipeline_stranger.SHARES
    for share in shares:
        late = share == shares[0]
        made = {"budget_ms": 1.0, "ours_ms": 0.9, "middle_ms": 1.1 if late else 0.9}
        more = {"worst_ms": 1.2, "p95_ms": 0.99, "worst_p95_ms": 1.5}
        key = {"part": "stranger", "share": share, "times": pipeline_stranger.TIMES}
        rows.add(key, {**made, **more})
    outcome = contract.Outcome("pipeline_stranger")
    pipeline_stranger.run(outcome, rows, tmp_path)
    assert outcome.figures["budgets held"] == pytest.approx(1 - 1 / len(shares))
    assert not outcome.aims["stranger_median"]["met"] and outcome.aims["stranger_p95"]["met"]
