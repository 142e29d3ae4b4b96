from __future__ import annotations

import numpy as np
import pytest
import toy
from scipy import stats

from nas.predictors import ensemble, gp, held_out, ridge
from nas.search import Candidate

EVERY = {"ridge": ridge.fit, "gp": gp.fit, "ensemble": ensemble.fit}
every_predictor = pytest.mark.parametrize("fit", EVERY.values(), ids=EVERY)


def spearman(a, b):
    return stats.spearmanr(a, b).statistic


@every_predictor
def test_it_recovers_an_additive_function(fit):
    rng, space = np.random.default_rng(0), toy.Space(n=5)
    genes = space.sample(rng, 200)
    truth = genes @ rng.normal(size=5)
    mean, std = fit(space.encode(genes[:150]), truth[:150])(space.encode(genes[150:]))
    assert spearman(mean, truth[150:]) > 0.97
    assert np.abs(mean - truth[150:]).mean() < 0.15 * truth.std()
    assert (std > 0).all()


@every_predictor
def test_it_knows_what_it_has_not_seen(fit):
    rng, space = np.random.default_rng(0), toy.Space(n=5)
    seen = space.sample(rng, 40)
    seen[:, 0] = 0
    targets = seen @ rng.normal(size=5) + rng.normal(0, 0.1, 40)
    predict = fit(space.encode(seen), targets)
    known, unknown = seen[:1], seen[:1].copy()
    unknown[0, 0] = 3
    assert predict(space.encode(unknown))[1] > predict(space.encode(known))[1]


@every_predictor
def test_it_survives_equal_targets_and_two_rows(fit):
    space = toy.Space(n=3)
    for targets in (np.ones(2), np.array([1.0, 2.0])):
        rows = space.encode(np.array([[0, 1, 2], [3, 1, 0]]))
        mean, std = fit(rows, targets)(space.encode(np.array([[0, 1, 2]])))
        assert np.isfinite(mean).all() and np.isfinite(std).all()


def test_the_process_sees_what_an_additive_model_cannot():
    """Two genes that are good together and bad apart."""
    rng, space = np.random.default_rng(0), toy.Space(n=4)
    genes = space.sample(rng, 300)
    truth = np.where((genes[:, 0] > 1) == (genes[:, 1] > 1), 0.0, 1.0) + 0.05 * genes[:, 2]
    rows = space.encode(genes)
    additive, process = (
        spearman(fit(rows[:200], truth[:200])(rows[200:])[0], truth[200:])
        for fit in (ridge.fit, gp.fit)
    )
    assert process > 0.9 and additive < 0.5


def test_the_process_is_the_textbook_one():
    """Mean and deviation from the normal equations at its own length and noise."""
    rng, space = np.random.default_rng(0), toy.Space(n=4)
    genes = space.sample(rng, 30)
    rows = space.encode(genes).astype(float)
    fitted = gp.fit(rows, genes @ rng.normal(size=4))
    targets = genes @ np.random.default_rng(0).normal(size=4)  # any: the weights are linear in them

    def kernel(a, b):
        return np.exp(-((a[:, None] - b[None]) ** 2).sum(2) / fitted.length)

    inverse = np.linalg.inv(kernel(rows, rows) + fitted.noise * np.eye(30))
    new = space.encode(space.sample(rng, 10)).astype(float)
    k = kernel(new, rows)
    again = fitted.root @ fitted.root.T
    np.testing.assert_allclose(again @ targets, inverse @ targets, rtol=1e-3, atol=1e-4)
    variance = fitted.amplitude * (1 + fitted.noise - ((k @ inverse) * k).sum(1))
    np.testing.assert_allclose(fitted(new)[1], np.sqrt(variance), rtol=1e-2)


def test_the_ensemble_is_not_thrown_by_networks_that_did_not_learn():
    """A tenth of the errors at 90 %, as a table of trained networks has them."""
    rng, space = np.random.default_rng(0), toy.Space(n=6)
    genes = space.sample(rng, 400)
    truth = 0.1 + 0.01 * (genes @ rng.uniform(0.2, 1, 6))
    dead = rng.random(400) < 0.1
    seen = np.where(dead, 0.9, truth)
    rows = space.encode(genes)
    ours, plain = (
        spearman(fit(rows[:100], seen[:100])(rows[100:])[0], truth[100:])
        for fit in (ensemble.fit, ridge.fit)
    )
    assert ours > plain + 0.1


def history_of(space, truth, n=48):
    """Networks whose cross-entropy `truth` tells from their genes."""
    genes = space.sample(np.random.default_rng(3), n)
    scores = zip(genes.tolist(), truth(genes), strict=True)
    return [Candidate(at, tuple(g), 1.0, 1.0, float(ce), 0.5) for at, (g, ce) in enumerate(scores)]


def test_a_predictor_that_beats_counting_is_accepted():
    space = toy.Space(n=6)
    weights = np.array([1.0, -1.0, 0.5, -0.5, 1.0, -1.0])  # more is not better
    verdict = held_out.judge(space, history_of(space, lambda genes: genes @ weights), seed=0)
    assert verdict.accepted
    assert verdict.ensemble.spearman > 0.8 > verdict.macs.spearman + 0.3
    assert verdict.ensemble.mae < verdict.params.mae


def test_a_predictor_that_counting_beats_is_refused():
    """Cross-entropy is MACs here: no predictor from 48 networks does better."""
    space = toy.Space(n=6, options=6)
    truth = history_of(space, lambda genes: -np.log(space.costs(genes)[:, 0]))
    verdict = held_out.judge(space, truth, seed=0)
    assert verdict.macs.spearman > 0.99 and not verdict.accepted
    record = held_out.record(space, truth, seed=0)
    assert (record["used"], record["generations"], record["n"]) == (0, 2, 48)
    assert "used in 0 of 2 generations, refused in the others" in record["text"]


def test_the_held_out_are_predicted_by_fits_that_never_saw_them():
    fold = np.array([0, 0, 1, 1, 2, 2])
    targets = np.arange(6.0)

    def memory(features, seen):
        return lambda asked: (np.full(len(asked), seen.mean()), np.zeros(len(asked)))

    found = held_out.held_out(memory, np.zeros((6, 1)), targets, fold)
    assert found.tolist() == [3.5, 3.5, 2.5, 2.5, 1.5, 1.5]


def test_too_few_evaluations_give_no_verdict():
    space = toy.Space(n=6)
    assert (
        held_out.judge(space, history_of(space, lambda g: g.sum(1), held_out.LEAST - 1), 0) is None
    )
    assert held_out.record(space, history_of(space, lambda g: g.sum(1), 16), 0) is None
