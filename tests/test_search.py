from __future__ import annotations

import os
from dataclasses import replace

import numpy as np
import pytest
import toy

from nas import search, study
from nas.errors import NasctlError
from nas.search import GENERATION, Candidate, Limit
from nas.strategies import evolution, robot


@pytest.fixture(autouse=True)
def quickly(monkeypatch):
    monkeypatch.setattr(search, "POOL", 1000)
    monkeypatch.setattr(os, "fsync", lambda handle: None)


def run(path, problem, evaluations, propose=evolution.propose, size=GENERATION):
    opened = study.open_study(path, "same")
    return list(search.search(problem, opened, evaluations, propose, size))


def test_same_seed_same_candidates(tmp_path):
    first, again = (run(tmp_path / name, toy.problem(seed=3), 40) for name in "ab")
    assert first == again
    assert [c.slot for c in first] == list(range(40))
    assert len({c.genes for c in first}) == 40
    assert run(tmp_path / "c", toy.problem(seed=4), 40) != first


@pytest.mark.parametrize("stop", [1, 7, 15, 16, 17, 31, 32, 39])
def test_stopped_anywhere_it_goes_on_to_the_same_candidates(stop, tmp_path):
    whole = run(tmp_path / "whole", toy.problem(), 40)
    opened = study.open_study(tmp_path / "parts", "same")
    parts = search.search(toy.problem(), opened, 40, evolution.propose)
    for _ in range(stop):
        next(parts)
    parts.close()
    assert run(tmp_path / "parts", toy.problem(), 40) == whole


@pytest.mark.parametrize("stop", [1, 5, 8])
def test_generations_of_one_go_on_to_the_same_candidates(stop, tmp_path):
    problem = toy.problem(budget_ms=9.0)
    whole = run(tmp_path / "whole", problem, 9, robot.propose, 1)
    opened = study.open_study(tmp_path / "parts", "same")
    parts = search.search(problem, opened, 9, robot.propose, 1)
    for _ in range(stop):
        next(parts)
    parts.close()
    robot.drawn.cache_clear()  # as a new process begins
    robot.surrogate.cache_clear()
    assert run(tmp_path / "parts", problem, 9, robot.propose, 1) == whole
    assert [c.slot for c in whole] == list(range(9))
    with pytest.raises(NasctlError, match="or more than 1"):
        run(tmp_path / "other", problem, 9, evolution.propose, 1)


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


def test_least_finds_the_bottom_of_a_space_whose_smallest_network_is_not_it():
    best = np.array([3, 0, 4, 1, 2, 2, 0, 4])
    problem = toy.problem(toy.Space(n=8, options=5))
    found = search.least(problem, lambda genes: np.abs(genes - best).sum(1))
    assert found.tolist() == best.tolist()


def test_least_is_the_smallest_where_the_cost_is_monotone():
    problem = toy.problem()
    assert search.least(problem, lambda genes: problem.latency(genes)[1]).tolist() == [0] * 10


def ones(genes):
    return (genes == 1).sum(1)


def test_the_nearest_network_meets_two_budgets_that_pull_apart():
    """Few steps up and yet four genes at exactly 1: neither cost's own minimum will do."""
    few = Limit("macs", 4.0, lambda genes: genes.sum(1))
    not_ones = Limit("params", 6.0, lambda genes: 10.0 - ones(genes))
    problem = toy.problem(limits=(few, not_ones))
    assert ones(problem.nearest[None])[0] == problem.nearest.sum() == 4
    assert few.cost(search.least(problem, not_ones.cost)[None])[0] > few.most


def test_a_budget_that_three_networks_meet_finds_them(tmp_path):
    """Three of 4^10: what random rows never hit."""
    only = Limit("macs", 0.5, lambda genes: genes[:, 1:].sum(1) + 0.25 * genes[:, 0])
    problem = toy.problem(limits=(only,))
    found = run(tmp_path / "j", problem, 40)
    assert sorted(c.genes for c in found) == [(at, *[0] * 9) for at in range(3)]


def test_every_budget_is_kept_at_once(tmp_path):
    rising = Limit("macs", 12.0, lambda genes: genes.sum(1))
    few_ones = Limit("params", 2.0, ones)
    problem = toy.problem(budget_ms=7.0, limits=(rising, few_ones))
    found = run(tmp_path / "j", problem, 48)
    genes = np.array([c.genes for c in found])
    assert len(found) == 48 and max(c.high_ms for c in found) <= 7.0
    assert genes.sum(1).max() <= 12 and ones(genes).max() <= 2


def test_fresh_keeps_the_order_and_drops_what_is_known_or_twice():
    problem = toy.problem(budget_ms=8.0)
    rows = problem.space.sample(np.random.default_rng(0), 200)
    rows = np.concatenate([rows, rows[:50]])
    known = [Candidate(0, tuple(rows[3].tolist()), 1.0, 1.0, 1.0, 0.5)]
    left, latency = problem.fresh(rows, known)
    wanted = [tuple(r) for r in rows[:200].tolist() if problem.latency(np.array([r]))[1] <= 8.0]
    assert [tuple(row) for row in left.tolist()] == [r for r in wanted if r != known[0].genes]
    np.testing.assert_array_equal(latency, problem.latency(left)[0])


@pytest.mark.parametrize(
    "rows",
    [np.zeros((2, 10), int), np.full((1, 10), 3), np.arange(170).reshape(17, 10) % 4],
    ids=["twice", "outside", "too many"],
)
def test_a_strategy_that_breaks_its_contract_is_named(rows, tmp_path):
    with pytest.raises(NasctlError, match="--strategy: .* outside the budgets, or one twice"):
        run(tmp_path / "j", toy.problem(budget_ms=8.0), 40, lambda *given: rows)


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


def test_with_other_budgets_alone_the_best_counts_and_not_the_knee():
    assert [c.slot for c in search.ranked(SIX, None, limited=True)] == [5, 2, 1, 4, 3, 0]


def test_without_a_budget_the_knee_comes_first_and_then_the_front():
    assert [c.slot for c in search.front(SIX)] == [0, 1, 2, 5]
    assert [c.slot for c in search.ranked(SIX, None)] == [1, 0, 2, 5]
    assert search.front([]) == []


def test_a_candidate_as_json_carries_its_architecture():
    space = toy.Space(n=2)
    fields = search.as_dict(Candidate(0, (1, 3), 1.0, 1.2, 0.5, 0.9), space)
    assert fields["arch"] == {"levels": (1, 3)} and fields["genes"] == (1, 3)
