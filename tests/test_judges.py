"""Searches that judge each network by its own training (`--alone`)."""

from __future__ import annotations

import json
import os

import numpy as np
import pytest

from cli import judges, search
from nas import supernet
from nas.strategies import robot

pytestmark = pytest.mark.usefixtures("drafts")

FLAGS = {"hw": "jetson", "width": 0.25, "epochs": 0.3, "batch": 64, "threads": 1, "alone": True}
LITTLE = ["--width", "0.25", "--epochs", "0.3", "--batch", "64", "--evaluations", "3"]
LITTLE += ["--threads", "1"]  # two that fight for one core are many times slower
ALONE = ["search", "--alone", "--strategy", "random", "--hw", "jetson", "--latency", "5ms", *LITTLE]


@pytest.fixture
def job(workdir):
    return search.prepare(FLAGS, workdir / "run", quick=True)


def test_a_network_is_judged_by_its_own_training_which_the_run_keeps(job, monkeypatch):
    judge, genes = judges.made(job), job.space.smallest
    score = judge(genes)
    assert score != judge(job.space.largest)
    monkeypatch.setattr("nas.supernet.gradients", lambda *_: pytest.fail("it was trained again"))
    assert judges.made(job)(genes) == score
    assert judge.child(genes).arch == job.space.decode(genes)


def test_interrupted_in_a_training_it_goes_on_there(job, tmp_path, monkeypatch):
    judge, genes = judges.made(job), job.space.smallest
    begun = []

    def interrupted(*arguments, original=supernet.gradients):
        begun.append(arguments)
        if len(begun) == 3:
            os.kill(os.getpid(), 2)
        return original(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr("nas.supernet.gradients", interrupted)
        with pytest.raises(KeyboardInterrupt):
            judge(genes)
        assert len(begun) == 3
        begun += [None] * 10
        resumed = judge(genes)
        assert len(begun) == 10 + job.recipe.steps
    other = search.prepare(FLAGS, tmp_path / "other", quick=True)
    assert resumed == judges.made(other)(genes)


def test_a_search_without_a_supernet(nasctl, workdir):
    words = [*ALONE, "--finetune", "0.5", "--json", "--run", "run"]
    result = nasctl(*words)
    assert result.code == 0, result.err
    assert "each trained alone for 0.3 epochs" in result.err
    report = json.loads(result.out)
    assert len(report["evaluated"]) == 3
    assert "train" not in {stage["name"] for stage in report["stages"]}
    assert not (workdir / "run/supernet.safetensors").exists()
    again = nasctl(*words)
    assert json.loads(again.out) == report
    whole = nasctl("evaluate", "run", "--arch", "largest")
    assert whole.code == 1
    assert "it has no supernet. Name its model.safetensors" in whole.err
    own = nasctl("evaluate", "run/model.safetensors", "--json")
    assert own.code == 0, own.err
    front = report["front"][0]["slot"]
    assert nasctl("export", "run", "--slot", str(front), "--out", "other.onnx").code == 0


def test_both_judges_are_refused(nasctl, workdir):
    result = nasctl(*ALONE, "--supernet", "elsewhere")
    assert result.code == 2
    assert "the one or the other" in result.err


def test_the_plan_counts_its_trainings(nasctl, workdir):
    parts = json.loads(nasctl(*ALONE, "--dry-run", "--json").out)["estimated_seconds"]
    assert set(parts) == {"profile", "scores", "search", "finetune", "deliver"}
    assert parts["scores"] == 0  # random search asks for none
    words = [word if word != "random" else "robot" for word in ALONE]
    parts = json.loads(nasctl(*words, "--dry-run", "--json").out)["estimated_seconds"]
    assert parts["scores"] > 0
    assert parts["search"] > 0
    assert np.isfinite(sum(parts.values()))


def test_robot_asks_for_scores_of_its_pool_once(nasctl, workdir, monkeypatch):
    monkeypatch.setattr(robot, "POOL", 12)
    words = ["search", "--alone", "--strategy", "robot", "--hw", "jetson", "--latency", "5ms"]
    words += [*LITTLE, "--threads", "1", "--finetune", "0", "--json", "--run", "run"]
    first = nasctl(*words)
    assert first.code == 0, first.err
    scores = workdir / "run/scores.jsonl"
    assert len(scores.read_text().splitlines()) == 1 + 12
    evaluated = json.loads(first.out)["evaluated"]
    assert len(evaluated) == 3
    (workdir / "run/study.journal").unlink()  # the search alone is done again
    (workdir / "run/pareto.json").unlink()
    before = scores.read_bytes()
    again = nasctl(*words)
    assert json.loads(again.out)["evaluated"] == evaluated
    assert scores.read_bytes() == before


@pytest.mark.parametrize(
    ("given", "strategy", "alone"),
    [
        ({}, "robot", True),
        ({"supernet": "run"}, "predictor", False),
        ({"storage": "postgresql://"}, "predictor", False),
        ({"strategy": "evolution"}, "evolution", False),
        ({"strategy": "evolution", "alone": True}, "evolution", True),
        ({"alone": False}, "predictor", False),
        ({"strategy": "robot", "supernet": "run"}, "robot", False),
    ],
)
def test_who_judges_where_nobody_said(given, strategy, alone):
    found = search._judged(given)
    assert (found["strategy"], found["alone"]) == (strategy, alone)
