"""fit: whole networks measured on one device in, a predictor of the others' latency out.

Three models, from the most to the least assuming, of which cross-validation inside the measured
networks picks one:

additive  non-negative milliseconds per operator, GMAC and MB of every role plus a constant
ridge     the logarithm of latency, linear in everything that `structure.describe` knows
process   the same by Gaussian-process regression (`kriging`), which can bend

All are fitted to relative error, since 1 ms matters on a network of 5 ms and not on one of 500.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import nnls
from sklearn.linear_model import RidgeCV

from hw_profiles.latency import Array
from hw_profiles.models import kriging
from hw_profiles.models.kriging import Process, Scale
from hw_profiles.models.structure import CHAINS, JOINED, MEASURES, ROLES, WIDTH, WORK
from nas.errors import NasctlError

Method = Literal["additive", "ridge", "process"]
Model = Callable[[Array], Array]  # rows of `describe` -> log ms

METHODS: tuple[Method, ...] = ("additive", "ridge", "process")
MIN_NETWORKS = 10
FOLDS = 5
LEARNT_ON = 200  # networks that the process learns its weights from; it then regresses on all
START = np.log(0.02), np.log(0.003)  # log weights of a kernel and of the noise (5 %) to begin with
PRIOR_SPREAD = 3.0  # in log units: hardly a prior, it only keeps unused weights from drifting
PARTS = (WORK, CHAINS, JOINED)
RIDGES = np.logspace(-2, 4, 13)


@dataclass(frozen=True)
class Predictor:
    """`spread` is the cross-validated standard deviation of log(measured / predicted)."""

    method: Method
    model: Model
    spread: float
    errors: dict[Method, float]  # cross-validated mean absolute relative error of each method

    def predict(self, rows: Array) -> Array:
        """Rows of `structure.describe` to milliseconds."""
        return np.exp(self.model(checked_rows(rows)))


def fit(rows: Array, ms: Array, rng: np.random.Generator) -> Predictor:
    """`rows` (networks, structure.WIDTH) and the milliseconds measured for them.

    Raises NasctlError for fewer than MIN_NETWORKS networks or a latency that is not positive.
    """
    rows, log_ms = checked(rows, ms, MIN_NETWORKS)
    folds = rng.permutation(len(rows)) % FOLDS
    learnt = process_weights(rows, log_ms, rng)
    fitters: dict[Method, Callable[[Array, Array], Model]] = {
        "additive": additive,
        "ridge": ridge,
        "process": lambda rows, log_ms: process(rows, log_ms, learnt),
    }
    logs = {name: np.empty(len(rows)) for name in METHODS}
    for fold in range(FOLDS):
        inside = folds == fold
        for name, fitter in fitters.items():
            logs[name][inside] = fitter(rows[~inside], log_ms[~inside])(rows[inside])
    errors = {name: float(np.mean(np.abs(np.expm1(logs[name] - log_ms)))) for name in METHODS}
    best = min(METHODS, key=errors.__getitem__)
    spread = float(np.std(log_ms - logs[best]))
    return Predictor(best, fitters[best](rows, log_ms), spread, errors)


def additive(rows: Array, log_ms: Array) -> Model:
    """Milliseconds per operator, GMAC and MB of every role, and a constant; none is negative."""
    model = non_negative(additive_terms(rows), log_ms)
    return lambda asked: model(additive_terms(asked))


def non_negative(terms: Array, log_ms: Array) -> Model:
    """The logarithm of a non-negative combination of non-negative columns, by least squares of
    predicted / measured against 1."""
    scale = np.maximum(terms.max(axis=0), 1e-12)
    weights = nnls(terms / scale / np.exp(log_ms)[:, None], np.ones(len(terms)))[0] / scale
    # a network that has none of what costs takes no time: keep the logarithm finite
    least = np.exp(log_ms.min()) / 10
    return lambda asked: np.log(np.maximum(asked @ weights, least))


def additive_terms(rows: Array) -> Array:
    """A constant, then ops, GMACs and MB of every role: what is sure to add up."""
    sums = rows[:, : len(ROLES) * len(MEASURES)].reshape(len(rows), len(ROLES), len(MEASURES))
    return np.column_stack([np.ones(len(rows)), sums[:, :, :3].reshape(len(rows), -1)])


def ridge(rows: Array, log_ms: Array) -> Model:
    """Penalty by leave-one-out."""
    scale = Scale.of(rows)
    if not len(scale.kept):
        mean = float(log_ms.mean())
        return lambda asked: np.full(len(asked), mean)
    model = RidgeCV(alphas=RIDGES).fit(scale(rows), log_ms)
    return lambda asked: model.predict(scale(asked))


def process_weights(rows: Array, log_ms: Array, rng: np.random.Generator) -> Array:
    """Log weights of the kernels of PARTS and of the noise, by marginal likelihood."""
    some = rng.permutation(len(rows))[:LEARNT_ON]
    blocks = [Scale.of(rows[some][:, part])(rows[some][:, part]) for part in PARTS]
    task = kriging.kernels(blocks, blocks), log_ms[some]
    return kriging.learn([task], start_weights(len(PARTS)), PRIOR_SPREAD)


def process(rows: Array, log_ms: Array, log_weights: Array) -> Model:
    scales = [Scale.of(rows[:, part]) for part in PARTS]

    def blocks(asked: Array) -> list[Array]:
        return [scale(asked[:, part]) for scale, part in zip(scales, PARTS, strict=True)]

    fitted = Process.fit(blocks(rows), log_ms, log_weights)
    return lambda asked: fitted.mean_at(blocks(asked))


def start_weights(blocks: int) -> Array:
    return np.array([START[0]] * (blocks * len(kriging.LENGTHS)) + [START[1]])


def checked(rows: Array, ms: Array, least: int) -> tuple[Array, Array]:
    """(rows, log ms) of measured networks, or one clear line."""
    rows, ms = matched(rows, ms)
    if len(rows) < least:
        raise NasctlError(
            f"{len(rows)} measured networks are too few",
            where="measurements",
            allowed=f"at least {least}",
        )
    bad: NDArray[np.intp] = np.flatnonzero(~(np.isfinite(ms) & (ms > 0)))
    if len(bad):
        raise NasctlError(
            f"latency {ms[bad[0]]} ms of network {bad[0]}",
            where="measurements",
            allowed="positive milliseconds",
            next="Leave out what could not be measured.",
        )
    return rows, np.log(ms)


def matched(rows: Array, ms: Array) -> tuple[Array, Array]:
    """Both as arrays of floats, one latency per network."""
    rows, ms = checked_rows(rows), np.asarray(ms, dtype=float)
    if ms.shape != (len(rows),):
        raise NasctlError(f"{len(rows)} networks but {ms.size} latencies", where="measurements")
    return rows, ms


def checked_rows(rows: Array) -> Array:
    rows = np.asarray(rows, dtype=float)
    if rows.ndim != 2 or rows.shape[1] != WIDTH or not np.isfinite(rows).all():
        raise NasctlError(
            f"rows of shape {rows.shape}",
            where="network descriptions",
            allowed=f"finite (networks, {WIDTH}) from structure.describe",
        )
    return rows
