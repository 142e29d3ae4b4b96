from __future__ import annotations

import os
from dataclasses import replace

import numpy as np
import pytest
import toy

from nas import search, study
from nas.predictors import ridge
from nas.search import GENERATION, Candidate


@pytest.fixture(autouse=True)
def quickly(monkeypatch):
    monkeypatch.setattr(search, "POOL", 1000)
    monkeypatch.setattr(os, "fsync", lambda handle: None)


def run(path, problem, evaluations):
    return list(search.search(problem, study.open_study(path, "same"), evaluations))


def test_same_seed_same_candidates(tmp_path):
    first, again = (run(tmp_path / name, toy.problem(seed=3), 40) for name in "ab")
    assert first == again
    assert [c.slot for c in first] == list(range(40))
    assert len({c.genes for c in first}) == 40
    assert run(tmp_path / "c", toy.problem(seed=4), 40) != first


@pytest.mark.parametrize("stop", [1, 7, 15, 16, 17, 31, 32, 39])
def test_stopped_anywhere_it_goes_on_to_the_same_candidates(stop, tmp_path):
    whole = run(tmp_path / "whole", toy.problem(), 40)
    parts = search.search(toy.problem(), study.open_study(tmp_path / "parts", "same"), 40)
    for _ in range(stop):
        next(parts)
    parts.close()
    assert run(tmp_path / "parts", toy.problem(), 40) == whole


@pytest.mark.parametrize("stop", [0, 9, 16, 20])
def test_interrupted_inside_an_evaluation_it_goes_on_to_the_same_candidates(stop, tmp_path):
    whole = run(tmp_path / "whole", toy.problem(), 24)
    calls = 0

    def evaluate(genes):
        nonlocal calls
        calls += 1
        if calls > stop:
            raise KeyboardInterrupt
        return toy.problem().evaluate(genes)

    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "parts", replace(toy.problem(), evaluate=evaluate), 24)
    assert run(tmp_path / "parts", toy.problem(), 24) == whole


def test_more_evaluations_extend_a_finished_search(tmp_path):
    fewer = run(tmp_path / "j", toy.problem(), 20)
    assert run(tmp_path / "j", toy.problem(), 36)[:20] == fewer
    assert run(tmp_path / "j", toy.problem(), 36) == run(tmp_path / "k", toy.problem(), 36)


def test_a_tiny_space_is_exhausted_and_the_search_ends(tmp_path):
    found = run(tmp_path / "j", toy.problem(toy.Space(n=3, options=3)), 1000)
    assert len({c.genes for c in found}) == len(found) == 27
    assert len(run(tmp_path / "j", toy.problem(toy.Space(n=3, options=3)), 1000)) == 27


def test_only_networks_inside_the_budget_are_evaluated(tmp_path):
    problem = toy.problem(budget_ms=8.0)
    found = run(tmp_path / "j", problem, 40)
    assert len(found) == 40 and all(c.high_ms <= 8.0 for c in found)
    assert run(tmp_path / "none", toy.problem(budget_ms=1.0), 40) == []


def test_fastest_finds_the_bottom_of_a_space_whose_smallest_network_is_not_it():
    space = toy.Space(n=8, options=5)
    best = np.array([3, 0, 4, 1, 2, 2, 0, 4])

    def latency(genes):
        value = 1.0 + np.abs(genes - best).sum(1)
        return value, 2 * value

    genes, value, high = search.fastest(replace(toy.problem(space), latency=latency))
    assert (genes.tolist(), value, high) == (best.tolist(), 1.0, 2.0)


def test_fastest_is_the_smallest_where_latency_is_monotone():
    genes, value, high = search.fastest(toy.problem())
    assert genes.tolist() == [0] * 10 and (value, high) == (1.0, 1.1)


def candidate(slot, latency_ms, cross_entropy):
    return Candidate(slot, (slot,), latency_ms, 1.2 * latency_ms, cross_entropy, 0.5)


SIX = [
    candidate(0, 1.0, 9.0),
    candidate(1, 2.0, 1.2),  # the knee
    candidate(2, 30.0, 1.0),
    candidate(3, 3.0, 5.0),  # dominated
    candidate(4, 2.5, 1.2),  # a tie in cross-entropy, slower
    candidate(5, 40.0, 0.9),
]


def test_ranked_keeps_to_the_upper_end_of_the_interval():
    assert [c.slot for c in search.ranked(SIX, 3.6)] == [1, 4, 3, 0]
    assert [c.slot for c in search.ranked(SIX, 3.59)] == [1, 4, 0]
    assert search.ranked(SIX, 1.0) == []


def test_without_a_budget_the_knee_comes_first_and_then_the_front():
    assert [c.slot for c in search.front(SIX)] == [0, 1, 2, 5]
    assert [c.slot for c in search.ranked(SIX, None)] == [1, 0, 2, 5]
    assert search.front([]) == []


def test_it_beats_random_search_of_equal_evaluations(tmp_path):
    """Paired over ten seeds; the budget of about half the space's latencies makes it a choice."""
    gains = []
    for seed in range(10):
        problem = toy.problem(budget_ms=9.0, seed=seed)
        found = run(tmp_path / str(seed), problem, 3 * GENERATION)
        rng = np.random.default_rng(1000 + seed)
        rows = problem.space.sample(rng, 1000)
        rows = rows[problem.latency(rows)[1] <= 9.0][: 3 * GENERATION]
        assert len(rows) == len(found) == 3 * GENERATION
        random = min(problem.evaluate(row)[0] for row in rows)
        gains.append(random - min(c.cross_entropy for c in found))
    gains = np.array(gains)
    assert gains.mean() > 3 * gains.std(ddof=1) / np.sqrt(len(gains))  # three standard errors
    assert (gains > 0).sum() >= 9


def test_the_predictor_recovers_an_additive_function_and_knows_what_it_has_not_seen():
    rng, space = np.random.default_rng(0), toy.Space(n=5)
    genes = space.sample(rng, 200)
    weights = rng.normal(size=5)
    predict = ridge.fit(space.encode(genes[:150]), genes[:150] @ weights)
    mean, std = predict(space.encode(genes[150:]))
    np.testing.assert_allclose(mean, genes[150:] @ weights, atol=0.02)
    seen = genes[:40].copy()
    seen[:, 0] = 0
    predict = ridge.fit(space.encode(seen), seen @ weights + rng.normal(0, 0.1, 40))
    known, unknown = np.zeros((2, 1, 5), int)
    unknown[0, 0] = 3
    assert predict(space.encode(unknown))[1] > predict(space.encode(known))[1]


def test_the_predictor_survives_equal_targets_and_two_rows():
    space = toy.Space(n=3)
    for targets in (np.ones(2), np.array([1.0, 2.0])):
        mean, std = ridge.fit(space.encode(np.array([[0, 1, 2], [3, 1, 0]])), targets)(
            space.encode(np.array([[0, 1, 2]]))
        )
        assert np.isfinite(mean).all() and np.isfinite(std).all()


def test_a_candidate_as_json_carries_its_architecture():
    space = toy.Space(n=2)
    fields = search.as_dict(Candidate(0, (1, 3), 1.0, 1.2, 0.5, 0.9), space)
    assert fields["arch"] == {"levels": (1, 3)} and fields["genes"] == (1, 3)
