"""The contract of a search strategy, held by every file in nas/strategies on every search space."""

from __future__ import annotations

from dataclasses import replace
from functools import cache, partial

import numpy as np
import pytest
import toy
from hypothesis import given, settings
from hypothesis import strategies as st

from hw_profiles import op
from nas import pareto, search, strategies
from nas import space as spaces
from nas.errors import NasctlError, UsageError
from nas.search import GENERATION, Candidate, Limit, Problem
from nas.strategies import coarse_to_fine, evolution, nsga2, predictor, robot

every_strategy = pytest.mark.parametrize("name", strategies.names())
ITEMSIZE = 2  # bytes of an activation


@pytest.fixture(autouse=True, scope="module")
def small_pools():
    patch = pytest.MonkeyPatch()
    patch.setattr(search, "POOL", 600)
    patch.setattr(predictor, "POOL", 600)
    patch.setattr(robot, "POOL", 90)
    yield
    patch.undo()


@cache
def load(space):
    return toy.Space() if space == "toy" else spaces.load(space, channels=3, size=32, width=0.25)


#: (space, genes [N, G]) -> latency in ms (a made-up one), MACs, parameters, bytes [N]
COSTS = {
    "latency": lambda space, genes: space.costs(genes)[:, 0] ** 0.7 / 1e3,
    "macs": lambda space, genes: space.costs(genes)[:, 0],
    "params": lambda space, genes: space.costs(genes)[:, 1],
    "memory": lambda space, genes: space.peak_elements(genes) * ITEMSIZE,
}


@cache
def seen(space, name):
    """That cost of random networks [N]."""
    found = load(space)
    return COSTS[name](found, found.sample(np.random.default_rng(0), 500))


def bounds(space, shares):
    """Budgets that these shares of random networks meet, each by itself."""
    return [
        None if share is None else float(np.quantile(seen(space, name), share))
        for name, share in zip(COSTS, shares, strict=True)
    ]


def make(space, shares=(None,) * 4, seed=0):
    """A problem whose cross-entropy falls with every gene, unevenly."""
    found, most = load(space), bounds(space, shares)
    good = np.random.default_rng(5).uniform(0.2, 1, len(found.genes))

    def latency(genes):
        high = COSTS["latency"](found, genes)
        return high / 1.1, high

    def evaluate(genes):
        share = genes / np.maximum(found.sizes - 1, 1)
        cross_entropy = 2.5 - float(good @ np.sqrt(share)) / good.sum()
        return cross_entropy, float(np.exp(-cross_entropy))

    limits = tuple(
        Limit(name, limit, partial(COSTS[name], found))
        for name, limit in zip(COSTS, most, strict=True)
        if name != "latency" and limit is not None
    )
    return Problem(found, latency, evaluate, most[0], seed, limits)


def evaluated(problem, rows, first=0):
    value, high = problem.latency(rows)
    scores = [problem.evaluate(row) for row in rows]
    return [
        Candidate(first + at, tuple(row), float(value[at]), float(high[at]), *scores[at])
        for at, row in enumerate(rows.tolist())
    ]


def run(problem, propose, generations, size=GENERATION):
    """As many evaluations as that many of the usual generations have, `size` at a time."""
    history = []
    for generation in range(generations * GENERATION // size):
        history += evaluated(problem, propose(problem, generation, history), len(history))
    return history


# ---- the contract --------------------------------------------------------------------------------


def assert_inside(problem, most, history):
    """By the definitions, network by network: not by the tables that the search itself uses."""
    for candidate in history:
        ops = problem.space.ops(problem.space.decode(np.array(candidate.genes)))
        peak = op.peak_activation_bytes(ops, ITEMSIZE)
        got = (candidate.high_ms, op.macs(ops), op.params(ops), peak)
        for value, limit in zip(got, most, strict=True):
            assert limit is None or value <= limit


shares = st.tuples(*[st.none() | st.floats(0.0, 1.0)] * 4)


@every_strategy
@pytest.mark.parametrize("space", [*spaces.names(), "toy"])
@settings(max_examples=2, deadline=None)
@given(asked=shares, seed=st.integers(0, 99))
def test_no_proposal_is_outside_a_budget_known_or_twice(space, name, asked, seed):
    problem, propose = make(space, asked, seed), strategies.load(name)
    history = run(problem, propose, 3, strategies.generation(name))
    assert_inside(problem, bounds(space, asked), history)
    assert len({c.genes for c in history}) == len(history) <= 3 * GENERATION
    genes = np.array([c.genes for c in history]).reshape(-1, len(problem.space.genes))
    assert (problem.space.canonical(genes) == genes).all()
    if problem.budgets and not len(problem.inside(problem.nearest[None])[0]):
        assert not history
    elif not problem.budgets:
        assert len(history) == 3 * GENERATION
    else:
        assert history


@every_strategy
def test_proposals_are_a_function_of_seed_generation_and_history(name):
    propose, problem = strategies.load(name), make("resnet", (0.5, None, None, 0.5), seed=3)
    size = strategies.generation(name)
    history = run(problem, propose, 3, size)
    assert run(problem, propose, 3, size) == history
    again = strategies.load(name)(make("resnet", (0.5, None, None, 0.5), seed=3), 3, history)
    np.random.seed(1)  # noqa: NPY002 - that nobody reads it is the test
    np.testing.assert_array_equal(propose(problem, 3, history), again)
    other = make("resnet", (0.5, None, None, 0.5), seed=4)
    assert propose(other, 3, history).tolist() != again.tolist()


@every_strategy
def test_a_small_space_is_exhausted(name):
    problem = toy.problem(toy.Space(n=3, options=3))
    history = run(problem, strategies.load(name), 4, strategies.generation(name))
    assert len({c.genes for c in history}) == len(history) == 27


@every_strategy
def test_a_budget_that_leaves_few_networks_finds_them_all(name):
    """Of 4^10 networks 56 are inside: those with at most two of ten genes one step up."""
    steps = Limit("macs", 2.5, lambda genes: genes.sum(1) + 9.0 * (genes > 1).any(1))
    problem = toy.problem(limits=(steps,))
    history = run(problem, strategies.load(name), 6, strategies.generation(name))
    assert {c.genes for c in history} == {
        tuple(int(at in (a, b)) for at in range(10))
        for a in range(-1, 10)
        for b in range(-1, a + 1)
    }


@pytest.mark.parametrize("name", sorted({*strategies.names()} - {"random", "robot"}))
def test_it_beats_random_search_of_equal_evaluations(name):
    """Paired over eight seeds, on the hypervolume inside a budget of half the space."""
    gains = []
    for seed in range(8):
        problem = toy.problem(budget_ms=9.0, seed=seed)
        found = [
            run(problem, strategies.load(each), 5, strategies.generation(each))
            for each in (name, "random")
        ]
        areas = [
            pareto.hypervolume(np.array([(c.latency_ms, c.cross_entropy) for c in some]), (9, 3))
            for some in found
        ]
        gains.append(areas[0] - areas[1])
    gains = np.array(gains)
    error = gains.std(ddof=1) / np.sqrt(len(gains))
    assert gains.mean() > 2.365 * error  # 97.5 % of the t distribution


# ---- by name -------------------------------------------------------------------------------------


def test_names_are_what_is_typed():
    wanted = ["coarse-to-fine", "evolution", "nsga2", "predictor", "random", "robot"]
    assert strategies.names() == wanted
    sizes = {name: strategies.generation(name) for name in wanted}
    assert sizes == {**dict.fromkeys(wanted, GENERATION), "robot": 1}
    with pytest.raises(UsageError, match="--strategy: unknown strategy 'nsga3'.*mean nsga2"):
        strategies.load("nsga3")


def test_a_strategy_of_ones_own_is_found_and_checked(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "ends.py").write_text(
        "def propose(problem, generation, history):\n    return problem.space.largest[None]\n"
    )
    (tmp_path / "mine" / "broken.py").write_text("propose = 3\n")
    propose = strategies.load("mine.ends")
    assert propose(toy.problem(), 0, []).tolist() == [[3] * 10]
    with pytest.raises(NasctlError, match="--strategy: mine.broken.propose is no function"):
        strategies.load("mine.broken")


# ---- what each is known for ----------------------------------------------------------------------


def candidate(slot, latency_ms, cross_entropy, genes=None):
    genes = (slot,) * 10 if genes is None else genes
    return Candidate(slot, genes, latency_ms, latency_ms, cross_entropy, 0.5)


def test_coarse_to_fine_evaluates_its_presets_first_and_each_once():
    problem = make("mobilenet")
    history = run(problem, coarse_to_fine.propose, 5)
    presets = {tuple(row) for row in coarse_to_fine.grid(problem).tolist()}
    assert 40 <= len(presets) <= coarse_to_fine.GRID
    assert {c.genes for c in history[: len(presets)]} == presets
    ends = {tuple(problem.space.smallest), tuple(problem.space.largest)}
    assert ends <= presets


def test_presets_treat_all_stages_alike():
    problem = make("mobilenet")
    names = [gene.name.rpartition(".")[2] for gene in problem.space.genes]
    sizes = problem.space.sizes
    for row in coarse_to_fine.grid(problem):
        for kind in ("width", "depth", "kernel"):
            same = [at for at in range(len(names)) if names[at] == kind and sizes[at] > 1]
            ends = {0.0 if row[at] == 0 else 1.0 for at in same if row[at] in (0, sizes[at] - 1)}
            assert len(ends) <= 1  # never the smallest in one stage and the largest in another


def test_skeletons_are_the_best_below_each_rung():
    """Distances of the mutants tell their parents: four networks far apart, one per rung."""
    space = toy.Space(n=40, options=4)
    genes = [tuple([level] * 40) for level in range(4)]
    fast = [candidate(at, 2.0**at, 3.0 - at, genes[at]) for at in range(4)]
    worse = candidate(4, 1.5, 3.1, tuple([0, 3] * 20))

    def latency(rows):
        value = np.full(len(rows), 0.5)
        return value, value

    problem = Problem(space, latency, lambda row: (0.0, 0.0))
    rng = np.random.default_rng(0)
    found = coarse_to_fine._mutants(problem, rng, [*fast, worse])
    away = (found[:, None] != np.array(genes)).sum(2)
    parents = away.argmin(1)
    assert away.min(1).max() < 16  # a tenth of 40 genes is redrawn
    # rungs at 1.7, 2.8, 4.8 and 8 ms
    np.testing.assert_array_equal(parents, np.repeat([0, 1, 2, 3], 4))


def test_nsga2_replays_its_populations():
    """By hand: of 48, the 32 that are left after their own generations' selections."""
    rng = np.random.default_rng(0)
    history = [candidate(at, *rng.random(2)) for at in range(5 * GENERATION)]
    population = []
    for start in range(0, len(history), GENERATION):
        population += history[start : start + GENERATION]
        points = np.array([(c.latency_ms, c.cross_entropy) for c in population])
        best = pareto.crowded_order(points)[: nsga2.POPULATION]
        population = [population[at] for at in sorted(best)]
    assert nsga2.survivors(history) == population
    front = {c.slot for c in search.front(history)}
    assert front <= {c.slot for c in population}
    assert len(population) == nsga2.POPULATION


def test_the_archive_keeps_the_best_of_each_band():
    rng = np.random.default_rng(0)
    history = [candidate(at, *rng.uniform(1, 16, 2)) for at in range(200)]
    kept = evolution.archive(history)
    assert len(kept) == evolution.BANDS
    latencies = np.log([c.latency_ms for c in history])
    width = np.ptp(latencies) / evolution.BANDS
    bands = np.minimum((latencies - latencies.min()) // width, evolution.BANDS - 1)
    for member in kept:
        rivals = [c for c in history if bands[c.slot] == bands[member.slot]]
        assert member.cross_entropy == min(c.cross_entropy for c in rivals)
    assert evolution.archive(history[:1]) == history[:1]


def test_a_predictor_that_knows_nothing_is_refused_and_the_search_goes_on():
    """Cross-entropies at random: no better than counting, and nothing to gain from it."""
    problem = make("resnet", (0.5, None, None, None))
    noise = np.random.default_rng(1)
    history = [
        Candidate(c.slot, c.genes, c.latency_ms, c.high_ms, float(noise.random()), 0.5)
        for c in run(problem, strategies.load("random"), 2)
    ]
    pool, _ = problem.inside(problem.space.sample(np.random.default_rng(2), 50))
    verdict = predictor.held_out.judge(problem.space, history, problem.seed)
    assert (predictor._promise(problem, pool, history) is None) == (not verdict.accepted)
    assert len(predictor.propose(problem, 2, history)) == GENERATION


def test_robot_reads_the_problems_features_of_its_pool_and_of_nothing_else():
    """A feature that is the truth leads to the best of the pool at once; one that is noise does
    not; a broken one (all missing) changes nothing."""
    space = toy.Space()
    asked = []

    def features(genes):
        asked.append(len(genes))
        exact = np.array([-toy.problem(space).evaluate(row)[0] for row in genes])
        return {"exact": exact, "dead": np.full(len(genes), np.nan)}

    problem = replace(toy.problem(space, budget_ms=9.0), features=features)
    rows = robot.drawn(problem)
    truth = np.array([problem.evaluate(row)[0] for row in rows])
    history = run(problem, robot.propose, 1, 1)
    assert set(asked) == {len(rows)} and len(rows) == robot.POOL
    assert min(c.cross_entropy for c in history) == truth.min()
    pool = robot.pool(problem, rows)
    assert pool.names == ("latency", "macs", "params", "exact", "dead")


def test_robot_finds_better_networks_than_random_draws_of_the_same_pool():
    """Without any proxy: counts and architecture alone. Paired over eight seeds; by the picked
    network, because it follows one objective and no front."""
    gains = []
    for seed in range(8):
        problem = toy.problem(budget_ms=9.0, seed=seed)
        rows = robot.drawn(problem)
        drawn = np.random.default_rng(seed).permutation(len(rows))[: 2 * GENERATION]
        luck = min(problem.evaluate(row)[0] for row in rows[drawn])
        gains.append(luck - min(c.cross_entropy for c in run(problem, robot.propose, 2, 1)))
    gains = np.array(gains)
    assert gains.mean() > 2.365 * gains.std(ddof=1) / np.sqrt(len(gains))


def test_robot_goes_on_from_a_history_that_holds_networks_it_never_drew():
    """Another processor's rounding may have drawn another pool: what is known of it is used."""
    problem = toy.problem(seed=1)
    foreign = evaluated(problem, problem.space.largest[None])
    own = evaluated(problem, robot.drawn(problem)[:6], first=1)
    proposed = robot.propose(problem, 7, [*foreign, *own])
    assert len(problem.fresh(proposed, [*foreign, *own])[0]) == 1
