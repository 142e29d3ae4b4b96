"""Training-free scores for a strategy that asks for them: computed once, before the search."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from cli import console, scoring
from cli.stages import Job
from nas import scores, strategies
from nas.search import Problem, row_keys
from nas.space import Genes

#: of different kinds, from few passes, and none worse than counting (docs/methods/proxies.md)
PROXIES = ("synflow", "meco", "near", "naswot", "jacob_cov")
IMAGES = 32  # training images that they see
SCORES = "scores.jsonl"


def with_features(job: Job, problem: Problem) -> Problem:
    """The problem with the features of the networks that the strategy will ask about, if any."""
    rows = strategies.drawn(job.spec.strategy, problem)
    if rows is None or len(rows) == 0:
        return problem
    names = ", ".join(PROXIES)
    console.say(f"{len(rows)} untrained networks by {names}", "scores")
    matrix = _matrix(job, rows)
    place = {int(key): at for at, key in enumerate(row_keys(rows))}

    def features(genes: Genes) -> Mapping[str, NDArray[np.float64]]:
        known = matrix[[place[int(key)] for key in row_keys(genes)]]
        return dict(zip(PROXIES, known.T, strict=True))

    return replace(problem, features=features)


def seconds(job: Job) -> float:
    """How long `with_features` will take, from the space's ends scored now."""
    if (pool := strategies.pool_size(job.spec.strategy)) == 0:
        return 0.0
    ends = np.stack([job.space.smallest, job.space.largest])
    began = time.monotonic()
    for _ in scores.scored(_wanted(job), ends):
        pass
    return (time.monotonic() - began) / len(ends) * pool / job.spec.threads


def _wanted(job: Job) -> scores.Job:
    return scores.Job(job.space, scores.batch_of(job.task, IMAGES, job.spec.seed), PROXIES)


def _matrix(job: Job, rows: Genes) -> NDArray[np.float64]:
    """[N, PROXIES], NaN where missing; those that the run's file has are not computed again."""
    work = scores.scored(_wanted(job), rows, path=job.run.path(SCORES), workers=job.spec.threads)
    return scores.matrix(scoring.watched(work, len(rows)), rows, PROXIES)
