"""`nasctl search` with a strategy that trains the supernet itself."""

from __future__ import annotations

import json

import numpy as np
import pytest
import toy

from nas.differentiable import proposals
from nas.errors import NasctlError

SEARCH = ["search", "--hw", "jetson", "--space", "nasbench201", "--width", "0.25"]
LITTLE = ["--latency", "8ms", "--epochs", "0.3", "--batch", "64", "--evaluations", "3"]
LITTLE += ["--threads", "1"]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--alone"], "--alone: --strategy gumbel trains a supernet of its own"),
        (["--supernet", "there"], "--supernet: --strategy gumbel trains a supernet"),
        ([], "--latency: --strategy gumbel learns inside a latency budget"),
    ],
)
def test_what_does_not_go_with_it_is_told_before_any_work(nasctl, words, said):
    result = nasctl(*SEARCH, "--strategy", "gumbel", *words)
    assert result.code == 2 and said in result.err


def test_several_devices_are_refused(nasctl):
    words = ["--strategy", "gumbel", "--hw", "jetson,jetson-tx2", "--latency", "5ms"]
    result = nasctl("search", "--space", "nasbench201", *words)
    assert result.code == 2 and "--hw: --strategy gumbel learns for one device" in result.err


def test_a_space_of_sizes_is_refused_before_anything_is_trained(nasctl):
    result = nasctl("search", "--hw", "jetson", "--latency", "5ms", "--strategy", "reinforce")
    assert result.code == 1 and "--space: this space chooses sizes" in result.err


@pytest.mark.slow
def test_a_dry_run_times_steps_of_both(nasctl):
    words = ["--strategy", "reinforce", "--hw", "cpu", "--dry-run", "--json"]
    result = nasctl(*SEARCH, *LITTLE, *words)
    assert result.code == 0, result.err
    assert json.loads(result.out)["estimated_seconds"]["train"] > 0


def learned(certain=0):
    """A problem whose distribution is all but certain of option `certain` of every gene."""
    problem = toy.problem()
    logits = np.full((len(problem.space.genes), 4), -8.0)
    logits[:, certain] = 8.0
    return type(problem)(**{**vars(problem), "policy": logits})


def test_proposals_are_the_likeliest_network_then_others():
    problem = learned(certain=2)
    rows = proposals.propose(problem, 0, [])
    assert rows[0].tolist() == [2] * 10 and len(rows) == 16
    assert len(np.unique(rows, axis=0)) == 16
    assert (proposals.propose(problem, 0, []) == rows).all()
    assert (proposals.propose(problem, 1, []) != rows).any()


def test_without_a_distribution_nothing_is_proposed():
    with pytest.raises(NasctlError, match="no distribution was learned"):
        proposals.propose(toy.problem(), 0, [])


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["gumbel", "proxyless", "reinforce"])
def test_a_search_delivers_a_network_and_goes_on_without_training_again(
    nasctl, workdir, monkeypatch, strategy
):
    words = [*SEARCH, *LITTLE, "--strategy", strategy, "--run", "run", "--json"]
    first = nasctl(*words)
    assert first.code == 0, first.err
    policy = json.loads((workdir / "run" / "policy.json").read_text())
    assert len(policy) == 6 and {len(row) for row in policy.values()} == {5}
    monkeypatch.setattr("cli.learning._learn", lambda *_: pytest.fail("it was trained again"))
    again = nasctl(*words)
    assert json.loads(again.out)["chosen"] == json.loads(first.out)["chosen"]
    export = nasctl("export", "run", "--latency", "7.9ms", "--out", "small.onnx")
    assert export.code == 0, export.err
