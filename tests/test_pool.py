"""The contract of a pool search, held by every file in nas/pool on pools with every defect."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nas import pool as pools
from nas.errors import NasctlError, UsageError
from nas.pool import (
    Pool,
    bananas,
    evolution,
    forest,
    graph,
    robot,
    robot_paper,
    scales,
    single,
)

every_method = pytest.mark.parametrize("name", pools.names())
WARM = ("walk", "robot")  # begin with what the features say


@pytest.fixture(autouse=True, scope="module")
def small_models():
    patch = pytest.MonkeyPatch()
    patch.setattr(forest, "TREES", 5)
    patch.setattr(bananas, "STEPS", 50)
    patch.setattr(robot_paper, "RANDOM", 200)
    yield
    patch.undo()


def make(seed=0, n=60, m=4, genes=4, options=3):
    """Features that know the truth more or less; the truth is additive in genes, with noise."""
    rng = np.random.default_rng(seed)
    digits = rng.integers(0, options, (n, genes))
    hot = (digits[:, :, None] == np.arange(options)).reshape(n, -1).astype(np.float32)
    truth = hot @ rng.normal(size=genes * options) + 0.3 * rng.normal(size=n)
    noise = np.linspace(0.3, 3, m)
    features = truth[:, None] + noise * rng.normal(size=(n, m))
    names = tuple(f"f{at}" for at in range(m))
    return Pool(features, names, hot, rng.permutation(10 * n)[:n]), truth


def trace(name, pool, truth, budget=12, seed=3):
    return pools.run(pools.load(name), pool, lambda row: truth[row], budget, seed)


# ---- the contract --------------------------------------------------------------------------------


@every_method
@settings(max_examples=3, deadline=None)
@given(seed=st.integers(0, 99), budget=st.integers(1, 14), n=st.integers(1, 40))
def test_it_asks_for_distinct_rows_exactly_as_many_as_it_may(name, seed, budget, n):
    pool, truth = make(seed, n=n)
    calls = []

    def objective(row):
        calls.append(row)
        return truth[row]

    found = pools.run(pools.load(name), pool, objective, budget, seed)
    assert [row for row, _ in found] == calls
    assert len(calls) == len(set(calls)) == min(budget, n)
    assert all(0 <= row < n for row in calls)


@every_method
def test_the_order_of_a_pools_rows_means_nothing(name):
    pool, truth = make(1)
    order = np.random.default_rng(5).permutation(len(pool))
    shuffled = trace(name, pool.take(order), truth[order])
    assert [(int(order[row]), value) for row, value in shuffled] == trace(name, pool, truth)


@every_method
def test_a_run_is_a_function_of_its_seed(name):
    pool, truth = make(2)
    first = trace(name, pool, truth)
    np.random.seed(1)  # noqa: NPY002 - that nobody reads it is the test
    assert trace(name, pool, truth) == first
    same_whatever = {"walk", "rank-sum", "robot"}
    if name not in same_whatever:
        assert trace(name, pool, truth, seed=4) != first


@every_method
def test_a_replayed_history_gives_the_next_query_at_every_step(name):
    pool, truth = make(3)
    method, found = pools.load(name), trace(name, pool, truth, budget=8)
    for step, (row, _) in enumerate(found):
        assert pools.next_query(method, pool, 8, 3, found[:step]) == row
    assert pools.next_query(method, pool, 8, 3, found) is None


@every_method
@settings(max_examples=3, deadline=None)
@given(dead=st.sets(st.integers(0, 59)))
def test_an_objective_that_fails_costs_its_query_and_nothing_else(name, dead):
    pool, truth = make(4)
    answers = [None if row in dead else math.inf if row == 7 else truth[row] for row in range(60)]
    found = pools.run(pools.load(name), pool, lambda row: answers[row], 10, 0)
    assert len({row for row, _ in found}) == 10
    if not {row for row, _ in found} <= dead | {7}:
        assert pools.best(found) not in dead | {7}


@every_method
def test_every_query_may_fail(name):
    pool, _ = make(5)
    found = pools.run(pools.load(name), pool, lambda row: math.nan, 8, 0)
    assert len(found) == 8
    with pytest.raises(NasctlError, match="objective: all 8 evaluations failed"):
        pools.best(found)


@every_method
@pytest.mark.parametrize("defect", ["constant", "missing", "infinite everywhere"])
def test_a_feature_that_says_nothing_has_no_influence(name, defect):
    pool, truth = make(6)
    value = {"constant": 3.0, "missing": np.nan, "infinite everywhere": np.inf}[defect]
    wider = Pool(
        np.column_stack([np.full(len(pool), value), pool.features]),
        ("nothing", *pool.names),
        pool.encoding,
        pool.ids,
    )
    assert trace(name, wider, truth) == trace(name, pool, truth)


@every_method
@settings(max_examples=3, deadline=None)
@given(holes=st.sets(st.tuples(st.integers(0, 59), st.integers(0, 3)), min_size=1, max_size=90))
def test_missing_and_infinite_entries_are_harmless(name, holes):
    pool, truth = make(7)
    features = pool.features.copy()
    for at, (row, column) in enumerate(sorted(holes)):
        features[row, column] = (np.nan, np.inf, -np.inf)[at % 3]
    as_missing = np.where(np.isfinite(features), features, np.nan)
    found = [
        trace(name, Pool(table, pool.names, pool.encoding, pool.ids), truth, budget=8)
        for table in (features, as_missing)
    ]
    assert found[0] == found[1] and len(found[0]) == 8


@every_method
def test_a_pool_without_features_or_encodings_is_searched(name):
    pool, truth = make(8)
    bare = Pool(np.zeros((60, 0)), (), np.zeros((60, 0), np.float32), pool.ids)
    assert len({row for row, _ in trace(name, bare, truth)}) == 12


@every_method
def test_units_and_offsets_of_features_mean_nothing(name):
    pool, truth = make(9)
    scaled = Pool(pool.features * 1024 + 4096, pool.names, pool.encoding, pool.ids)
    assert [r for r, _ in trace(name, scaled, truth)] == [r for r, _ in trace(name, pool, truth)]


@pytest.mark.parametrize("name", WARM)
@settings(max_examples=4, deadline=None)
@given(seed=st.integers(0, 99))
def test_warm_starts_find_what_a_perfect_feature_knows(name, seed):
    """In one query per feature and one for all of them."""
    pool, truth = make(seed)
    features = np.column_stack([pool.features[:, :2], truth, pool.features[:, 2:]])
    names = ("a", "b", "truth", "c", "d")
    perfect = Pool(features, names, pool.encoding, pool.ids)
    found = trace(name, perfect, truth, budget=20, seed=seed)
    assert truth[pools.best(found)] == truth.max()
    if name == "walk":
        assert truth[pools.best(found[: len(names) + 1])] == truth.max()


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted({*pools.names()} - {"random"}))
def test_it_beats_random_search(name):
    """Paired over 40 pools, on the logarithm of the true rank; informative features and genes.
    Methods without a model begin at random: of twenty queries half or all are that."""
    budget = 50 if name in ("evolution", "nsga2", "reinforce") else 20
    gains = []
    for seed in range(40):
        pool, truth = make(seed, n=300, m=5, genes=5)
        ranks = [
            1 + (truth > truth[pools.best(trace(each, pool, truth, budget, seed))]).sum()
            for each in ("random", name)
        ]
        gains.append(np.log(ranks[0]) - np.log(ranks[1]))
    gains = np.array(gains)
    assert gains.mean() > 2 * gains.std(ddof=1) / np.sqrt(len(gains))


# ---- by name, bad input --------------------------------------------------------------------------


def test_names_are_the_methods():
    with pytest.raises(UsageError, match="unknown pool search 'robots'.*mean robot"):
        pools.load("robots")
    assert "scales" not in pools.names() and "graph" not in pools.names()


def test_a_pool_that_does_not_fit_together_is_refused():
    pool, _ = make()
    with pytest.raises(NasctlError, match="pool: 60 rows of 4 features"):
        Pool(pool.features, pool.names[:2], pool.encoding, pool.ids)
    with pytest.raises(NasctlError, match="59 distinct ids"):
        Pool(pool.features, pool.names, pool.encoding, np.maximum(pool.ids, np.sort(pool.ids)[1]))


def test_a_history_of_another_search_is_refused():
    pool, truth = make()
    found = trace("random", pool, truth)
    with pytest.raises(NasctlError, match="start a new search"):
        pools.next_query(pools.load("random"), pool, 12, seed=4, history=found[1:])


def test_one_feature_alone_is_walked_down():
    pool, truth = make()
    found = pools.run(single.by("f2"), pool, lambda row: truth[row], 10, 0)
    assert [row for row, _ in found] == np.argsort(-pool.features[:, 2])[:10].tolist()
    with pytest.raises(UsageError, match="unknown feature 'nothing'"):
        pools.run(single.by("nothing"), pool, lambda row: truth[row], 10, 0)


# ---- what each is known for ----------------------------------------------------------------------


def grid(options=4, genes=4):
    """A pool that holds a whole space; its truth is one gene's option, then the next's."""
    digits = np.stack(np.meshgrid(*[np.arange(options)] * genes), -1).reshape(-1, genes)
    hot = (digits[:, :, None] == np.arange(options)).reshape(len(digits), -1).astype(np.float32)
    pool = Pool(np.zeros((len(digits), 0)), (), hot, np.arange(len(digits)))
    return pool, digits, digits @ options ** np.arange(genes, dtype=float)


def test_evolution_mutates_one_gene_of_a_living_network():
    pool, digits, truth = grid()
    rows = [row for row, _ in trace("evolution", pool, truth, budget=40)]
    for at in range(evolution.POPULATION, 40):
        alive = digits[rows[at - evolution.POPULATION : at]]
        assert (alive != digits[rows[at]]).sum(axis=1).min() == 1


def test_the_paper_asks_for_its_weightings_favourite_and_walks_the_best_weighting():
    pool, truth = make(11, n=200)
    table = scales.min_max(pool.features[np.argsort(pool.ids)])
    weights = np.random.default_rng((3, 28, 0)).uniform(-1, 1, 4)
    rows = [row for row, _ in trace("robot-paper", pool, truth)]
    order = np.argsort(pool.ids)
    assert rows[0] == order[np.argmax(table @ weights)]
    assert rows[0] == order[np.argmax(table @ (7 * weights))]
    alone = trace("robot-paper", Pool(pool.features[:, :1], ("a",), pool.encoding, pool.ids), truth)
    ends = {int(np.argmax(pool.features[:, 0])), int(np.argmin(pool.features[:, 0]))}
    assert {row for row, _ in alone[:2]} == ends  # one weight has two signs, the rest is the walk
    up = truth[alone[0][0]] >= truth[alone[1][0]]
    best_end = alone[0][0] if up else alone[1][0]
    walked = np.argsort(pool.features[:, 0])[
        :: -1 if best_end == np.argmax(pool.features[:, 0]) else 1
    ]
    assert [row for row, _ in alone[2:]] == [row for row in walked if row not in ends][:10]


def test_the_bound_climbs_along_its_true_slope():
    rng = np.random.default_rng(0)
    process = robot_paper.fit(rng.uniform(-1, 1, (9, 3)), rng.normal(size=9))
    at = rng.uniform(-1, 1, (5, 3))
    _, slope = process.bound(at)
    for axis in range(3):
        step = np.zeros(3)
        step[axis] = 1e-5
        rise = process.bound(at + step)[0] - process.bound(at - step)[0]
        np.testing.assert_allclose(slope[:, axis], rise / 2e-5, rtol=1e-3, atol=1e-4)


def test_ours_begins_with_what_the_features_agree_on_but_not_with_its_twins():
    pool, truth = make(12, n=300)
    scores = scales.normal_scores(pool.features)
    consensus = scores.mean(axis=1)
    rows = [row for row, _ in trace("robot", pool, truth, budget=robot.START)]
    top = np.argsort(-consensus)[: int(robot.AGREED * 300)]
    assert rows[0] == top[0] and set(rows) <= set(top.tolist())
    apart = ((scores[rows][:, None] - scores[rows]) ** 2).sum(-1)[np.triu_indices(len(rows), 1)]
    twins = ((scores[top[:5]][:, None] - scores[top[:5]]) ** 2).sum(-1)[np.triu_indices(5, 1)]
    assert apart.min() > twins.min()


def test_ours_turns_round_when_the_features_are_wrong():
    """All of them negated: the optimum is where the consensus says the worst are."""
    ranks = []
    for seed in range(10):
        pool, truth = make(seed, n=300, m=5, genes=5)
        wrong = Pool(-pool.features, pool.names, pool.encoding, pool.ids)
        ranks.append(1 + (truth > truth[pools.best(trace("robot", wrong, truth, 20))]).sum())
    assert np.exp(np.log(ranks).mean()) < 2  # random search: 11


# ---- parts ---------------------------------------------------------------------------------------


def test_scales_by_hand():
    table = np.array([[1.0, 5, np.nan], [3, 5, np.inf], [np.nan, 5, np.nan], [2, 5, 1]])
    assert scales.finite(table).shape == (4, 1)
    np.testing.assert_allclose(scales.min_max(table)[:, 0], [0, 1, np.nan, 0.5])
    scores = scales.normal_scores(table)[:, 0]
    np.testing.assert_allclose(scores, [-0.9674, 0.9674, 0, 0], atol=1e-4)
    graded = scales.graded(np.array([2.0, np.nan, 2, 5]))
    np.testing.assert_allclose(graded, [-0.3186] * 3 + [1.1503], atol=1e-4)


@every_method
def test_an_empty_pool_has_nothing_to_ask_for(name):
    pool, truth = make()
    assert trace(name, pool.take(np.zeros(0, np.int64)), truth[:0]) == []


def test_the_best_of_equals_is_the_first_found():
    assert pools.best([(4, 1.0), (9, 3.0), (2, 3.0), (5, math.nan)]) == 9


def test_graph_features_of_a_cell_by_hand():
    """0 -> 1 -> 2 by operation 0, and 0 -> 2 by operation 1."""
    sources, ops = np.array([[0, 1, 0]]), np.array([[0, 0, 1]])
    found = graph.features(sources, np.array([1, 2, 2]), ops, nodes=3, kinds=2)
    # the sets {0}, {1}, {0, 1}, and all: edges, shortest, longest, paths, at both ends
    both = [3, 1, 2, 2, 2, 2]
    assert found.tolist() == [[2, 2, 2, 1, 1, 1, *[1] * 6, *both, *both]]
