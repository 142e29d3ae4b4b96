"""How good a predictor is on evaluations that it was not fitted on, beside MACs and parameters.

A predictor that ranks unseen networks no better than counting their multiplications is worse than
none: it costs time and looks like knowledge. Such a one is refused (`Verdict.accepted`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from scipy import stats

from nas.predictors import ensemble
from nas.predictors.ensemble import Fit, Predict
from nas.predictors.ridge import Array, Features
from nas.search import GENERATION, Candidate
from nas.space import SearchSpace

FOLDS = 5
LEAST = 10  # evaluations: two per fold


@dataclass(frozen=True)
class Quality:
    """Of predictions for networks that were held out."""

    spearman: float  # rank correlation with the truth; 0 where the predictions are all equal
    mae: float  # mean absolute error, in the target's unit


@dataclass(frozen=True)
class Verdict:
    """The ensemble and the two counts, each judged on the same `n` evaluations in `folds` folds."""

    n: int
    folds: int
    ensemble: Quality
    macs: Quality
    params: Quality

    @property
    def accepted(self) -> bool:
        """Does it rank better than both counts?"""
        return self.ensemble.spearman > max(self.macs.spearman, self.params.spearman)

    def __str__(self) -> str:
        """For people."""
        ours, macs, params = self.ensemble, self.macs, self.params
        return (
            f"rank correlation on held-out evaluations {ours.spearman:.2f} (MACs "
            f"{macs.spearman:.2f}, parameters {params.spearman:.2f}), mean error {ours.mae:.3g} "
            f"({macs.mae:.3g}, {params.mae:.3g}) nats; {self.n} networks in {self.folds} folds"
        )


def judge(space: SearchSpace, history: Sequence[Candidate], seed: int) -> Verdict | None:
    """The verdict on what was evaluated so far; None before there is enough to judge by."""
    if len(history) < LEAST:
        return None
    genes = np.array([c.genes for c in history])
    truth = np.array([c.cross_entropy for c in history])
    fold = np.random.default_rng((seed, 15)).permutation(len(history)) % FOLDS
    log_costs = np.log(space.costs(genes))
    found = [
        _quality(held_out(fit, features, truth, fold), truth)
        for fit, features in (
            (ensemble.fit, space.encode(genes)),
            (_line, log_costs[:, :1]),
            (_line, log_costs[:, 1:]),
        )
    ]
    return Verdict(len(history), FOLDS, *found)


def record(space: SearchSpace, candidates: Sequence[Candidate], seed: int) -> dict[str, Any] | None:
    """For a report: the verdict on a whole search, and in how many of its generations the
    predictor was used rather than refused; None where no generation followed the first."""
    ends = range(GENERATION, len(candidates), GENERATION)
    verdicts = [judge(space, candidates[:end], seed) for end in ends]
    final = judge(space, candidates, seed)
    if not verdicts or final is None:
        return None
    used = sum(verdict is not None and verdict.accepted for verdict in verdicts)
    refused = "" if used == len(verdicts) else ", refused in the others as no better than counting"
    text = f"accuracy predictor used in {used} of {len(verdicts)} generations{refused}: {final}"
    return {"used": used, "generations": len(verdicts), **asdict(final), "text": text}


def held_out(fit: Fit, features: Features, targets: Array, fold: Array) -> Array:
    """Predictions [N], each by a fit to the other folds; `fold` [N] numbers them from 0."""
    predicted = np.empty(len(targets))
    for at in np.unique(fold):
        out = fold == at
        predicted[out] = fit(features[~out], targets[~out])(features[out])[0]
    return predicted


def _quality(predicted: Array, truth: Array) -> Quality:
    tied = np.ptp(predicted) == 0 or np.ptp(truth) == 0
    spearman = 0.0 if tied else float(stats.spearmanr(predicted, truth).statistic)
    return Quality(spearman, float(np.abs(predicted - truth).mean()))


def _line(features: Features, targets: Array) -> Predict:
    """Least squares on one feature: how a count is turned into a prediction."""
    x = features[:, 0]
    slope, intercept = np.polyfit(x, targets, 1) if np.ptp(x) else (0.0, targets.mean())

    def predict(features: Features) -> tuple[Array, Array]:
        mean = slope * features[:, 0] + intercept
        return mean, np.zeros(len(mean))

    return predict
