"""The shared-sample estimator against exact enumeration."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from nas import mixture
from nas.mixture import Policies

SIZES = np.array([2, 3, 4, 2])
TASKS = 3
EVERY = np.array(list(itertools.product(*map(range, SIZES))))


def policies(seed=0, tasks=TASKS, spread=1.2):
    """Distributions that clearly differ."""
    start = mixture.uniform(tasks, SIZES).logits
    return Policies(start + np.random.default_rng(seed).normal(0, spread, start.shape))


def _landscape(rows):
    """Per task a sum over genes and their pairs [M, T], far from zero as losses are."""
    rng = np.random.default_rng(1)
    single = rng.normal(size=(TASKS, len(SIZES), 4))
    pair = rng.normal(size=(TASKS, len(SIZES), 4, len(SIZES), 4))
    found = np.zeros((len(rows), TASKS))
    for t in range(TASKS):
        for g, h in itertools.product(range(len(SIZES)), repeat=2):
            found[:, t] += 0.5 * pair[t, g, rows[:, g], h, rows[:, h]]
        found[:, t] += sum(single[t, g, rows[:, g]] for g in range(len(SIZES)))
    return found + 3.0


LANDSCAPE = _landscape(EVERY)
STRIDES = np.cumprod([1, *SIZES[:0:-1]])[::-1]


def losses(rows):
    return LANDSCAPE[rows @ STRIDES]


def exact(some):
    """d E[loss_t] / d logits_t by enumeration of every network [T, G, K]."""
    p = np.exp(some.log_prob(EVERY))
    return np.einsum("mt,mt,mtgk->tgk", p, losses(EVERY)[:, : some.tasks], some.score(EVERY))


def estimates(some, samples, repeats, seed=2, estimate=mixture.gradient):
    rng = np.random.default_rng(seed)
    found = []
    for _ in range(repeats):
        rows = mixture.draw(some, rng, samples)
        found.append(estimate(some, rows, losses(rows)[:, : some.tasks]))
    return np.array(found)


def test_probabilities_sum_to_one_and_draws_follow_the_mixture():
    some = policies()
    p = np.exp(some.log_prob(EVERY))
    np.testing.assert_allclose(p.sum(0), 1, atol=1e-12)
    rows = mixture.draw(some, np.random.default_rng(0), 40_000)
    seen = np.bincount(rows @ STRIDES, minlength=len(EVERY)) / len(rows)
    error = np.sqrt(p.mean(1) / len(rows))
    assert (np.abs(seen - p.mean(1)) < 5 * error + 1e-12).all()


def test_weights_average_one_and_never_exceed_the_number_of_tasks():
    some = policies()
    rows = mixture.draw(some, np.random.default_rng(0), 20_000)
    weight = mixture.weights(some, rows)
    assert weight.min() >= 0 and weight.max() <= TASKS + 1e-9
    error = weight.std(0) / np.sqrt(len(rows))
    assert (np.abs(weight.mean(0) - 1) < 4 * error).all()
    assert (mixture.effective(weight) > 1 / TASKS).all()


@pytest.mark.parametrize("samples", [2, 8])
def test_the_gradient_is_unbiased(samples):
    some = policies()
    found, truth = estimates(some, samples, 16_000 // samples), exact(some)
    there = np.isfinite(some.logits)
    error = found.std(0, ddof=1) / np.sqrt(len(found))
    assert np.abs(truth)[there].max() > 0.3
    assert (np.abs(found.mean(0) - truth)[there] < 4.5 * error[there]).all()
    assert not found[:, ~there].any()


def test_a_baseline_that_knows_its_own_row_would_be_biased():
    """The check above can fail: with the row itself in the mean the estimate shrinks."""

    def own(some, rows, lost):
        weight = mixture.weights(some, rows)
        advantage = weight * (lost - (weight * lost).sum(0) / weight.sum(0))
        return np.einsum("mt,mtgk->tgk", advantage, some.score(rows)) / len(rows)

    some = policies()
    found, truth = estimates(some, 2, 8_000, estimate=own), exact(some)
    there = np.isfinite(some.logits)
    error = found.std(0, ddof=1)[there] / np.sqrt(len(found))
    assert (np.abs(found.mean(0) - truth)[there] > 4.5 * error).sum() > 10


def independent(some, rows_of, lost_of):
    """Each task on samples of its own, plain REINFORCE with the same baseline [T, G, K]."""
    parts = [
        mixture.gradient(Policies(some.logits[[t]]), rows, lost[:, [t]])
        for t, (rows, lost) in enumerate(zip(rows_of, lost_of, strict=True))
    ]
    return np.concatenate(parts)


def test_per_network_drawn_it_varies_less_than_separate_samples():
    """24 networks in all: shared by the tasks, or eight for each."""
    some, rng, found = policies(), np.random.default_rng(3), []
    for _ in range(1_000):
        rows_of = [mixture.draw(Policies(some.logits[[t]]), rng, 8) for t in range(TASKS)]
        found.append(independent(some, rows_of, [losses(rows) for rows in rows_of]))
    there = np.isfinite(some.logits)
    separate = np.array(found).var(0)[there].mean()
    shared = estimates(some, 24, 1_000).var(0)[there].mean()
    rows = mixture.draw(some, rng, 20_000)
    effective = mixture.effective(mixture.weights(some, rows))
    print(f"variance {shared / separate:.2f} of separate; effective {effective.round(2)}")
    assert shared < 0.9 * separate


def test_without_a_baseline_it_varies_more():
    def plain(some, rows, lost):
        weight = mixture.weights(some, rows) * lost
        return np.einsum("mt,mtgk->tgk", weight, some.score(rows)) / len(rows)

    some = policies()
    bare = estimates(some, 8, 1_000, estimate=plain).var(0).mean()
    assert estimates(some, 8, 1_000).var(0).mean() < 0.8 * bare


def test_one_task_is_plain_reinforce_and_equal_tasks_weigh_one():
    alone = policies(tasks=1)
    rows = mixture.draw(alone, np.random.default_rng(0), 50)
    np.testing.assert_allclose(mixture.weights(alone, rows), 1, atol=1e-12)
    alike = Policies(np.repeat(alone.logits, 3, axis=0))
    np.testing.assert_allclose(mixture.weights(alike, rows), 1, atol=1e-12)


def test_the_order_of_tasks_means_nothing():
    some, order = policies(), [2, 0, 1]
    rows = mixture.draw(some, np.random.default_rng(0), 40)
    swapped = mixture.gradient(Policies(some.logits[order]), rows, losses(rows)[:, order])
    np.testing.assert_allclose(swapped, mixture.gradient(some, rows, losses(rows))[order])


def test_a_task_without_a_loss_rests_on_its_other_networks():
    some = policies()
    rows = mixture.draw(some, np.random.default_rng(0), 40)
    lost = losses(rows)
    lost[7:, 1] = np.nan
    found = mixture.gradient(some, rows, lost)
    assert np.isfinite(found).all()
    weight = mixture.weights(some, rows[:7])
    full = losses(rows)[:7]
    advantage = weight * (full - mixture.leave_one_out(weight, full))
    expected = np.einsum("mt,mtgk->tgk", advantage, some.score(rows[:7])) / 7
    np.testing.assert_allclose(found[1], expected[1])
    np.testing.assert_allclose(found[0], mixture.gradient(some, rows, losses(rows))[0])


def test_entropy_is_one_at_first_and_falls_as_a_task_settles():
    start = mixture.uniform(TASKS, SIZES)
    np.testing.assert_allclose(start.entropy(), 1)
    settled = Policies(np.where(np.arange(4) == 0, 30.0, start.logits))
    assert (settled.entropy() < 1e-6).all()
    assert not settled.likeliest().any()
