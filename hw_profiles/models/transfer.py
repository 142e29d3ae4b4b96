"""A new device from few measurements, with the help of devices that were measured at length.

Every source device gets a predictor fitted on its own networks. What these predict for a network
(never what was measured for it, so it need not have been measured anywhere) describes the network
beside its structure. Four models then explain the few measurements on the new device:

sum        a non-negative combination of operators, MACs, bytes and the sources' milliseconds
devices    a Gaussian process on the predictions for the sources: right for a relative of one
structure  one on `structure.describe`: right for a device unlike all of them
both       one on the two together

How much each kernel of these counts beforehand is learnt from the sources themselves, each in turn
playing the new device whose own and whose board's other measurements are hidden; the few
measurements may then move the weights. The four are averaged by how well each predicts the
measurements that it was not shown (pseudo-BMA: Yao et al., Bayesian Analysis 13(3), 2018).
Everything works on logarithms: a device twice as slow is the same problem.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from hw_profiles.latency import Array
from hw_profiles.models import kriging, predict
from hw_profiles.models.kriging import Process, Scale, Task
from hw_profiles.models.predict import Model, checked, checked_rows, matched
from hw_profiles.models.structure import CHAINS, WORK
from nas.errors import NasctlError

#: the processes, and the first and the end of the blocks that they look at
PROCESSES = {"devices": (0, 1), "structure": (1, 3), "both": (0, 3)}
STRUCTURE = (WORK, CHAINS)  # the parts of a description that few measurements can speak about
MIN_SAMPLES = 5  # below this the weights of the members are noise
SOURCE_CAP = 900  # networks of a source that its predictor is fitted on: bounds time and memory
TASK_SIZE = 30  # networks a source shows when it plays the new device
TASKS = 2  # how often each source plays
FREEDOM = 2.0  # standard deviation, in log units, by which the few measurements may move a weight


@dataclass(frozen=True)
class Source:
    """A device that was measured at length; `board` is shared by the settings of one machine."""

    name: str
    board: str
    rows: Array  # of the networks measured on it, at most SOURCE_CAP
    log_ms: Array
    model: Model


@dataclass(frozen=True)
class Sources:
    """What is known before the new device is seen."""

    devices: tuple[Source, ...]
    structure: tuple[Scale, ...]
    centre: Array  # of the sources' log predictions, device by device
    deviation: float  # of all of them
    priors: dict[str, Array]  # member -> log weights

    def logs(self, rows: Array) -> Array:
        """(networks, devices): log ms predicted for each source."""
        return np.column_stack([source.model(rows) for source in self.devices])

    def blocks(self, rows: Array, logs: Array | None = None) -> list[Array]:
        """The predictions, the work and the chains of each network, scaled; the terms of `sum`.
        `logs` are those of `self.logs(rows)` where they are known already: they take most of the
        time."""
        rows = checked_rows(rows)
        logs = self.logs(rows) if logs is None else logs
        terms = np.column_stack([predict.additive_terms(rows), np.exp(logs)])
        return [(logs - self.centre) / self.deviation, *self.scaled_structure(rows), terms]

    def scaled_structure(self, rows: Array) -> list[Array]:
        scales = zip(self.structure, STRUCTURE, strict=True)
        return [scale(rows[:, part]) for scale, part in scales]


@dataclass(frozen=True)
class Sum:
    """The non-negative combination; its deviation is what leaving one out in turn showed."""

    model: Model
    deviation: float

    def predict(self, blocks: Sequence[Array]) -> tuple[Array, Array]:
        (terms,) = blocks
        return self.model(terms), np.full(len(terms), self.deviation)


@dataclass(frozen=True)
class Adapted:
    """A predictor of the new device."""

    sources: Sources
    members: dict[str, Sum | Process]
    shares: dict[str, float]  # of the members; they add up to 1

    def predict(self, rows: Array) -> tuple[Array, Array]:
        """Rows of `structure.describe` to (median ms, standard deviation of its logarithm); the
        deviation includes the noise of one measurement."""
        return self.predict_blocks(self.sources.blocks(rows))

    def predict_blocks(self, blocks: Sequence[Array]) -> tuple[Array, Array]:
        """The same from `Sources.blocks`, for who asks several devices about the same networks."""
        found = {name: one.predict(_own(name, blocks)) for name, one in self.members.items()}
        mean = sum(self.shares[name] * one for name, (one, _) in found.items())
        variance = sum(
            self.shares[name] * (deviation**2 + (one - mean) ** 2)
            for name, (one, deviation) in found.items()
        )
        return np.exp(mean), np.sqrt(variance)


def source(name: str, board: str, rows: Array, ms: Array, rng: np.random.Generator) -> Source:
    """`rows` (networks, structure.WIDTH) and their ms on this device, NaN where it did not run one.

    Raises NasctlError for too few or impossible measurements.
    """
    rows, ms = matched(rows, ms)
    there = ~np.isnan(ms)
    try:
        known, log_ms = checked(rows[there], ms[there], predict.MIN_NETWORKS)
    except NasctlError as error:
        raise NasctlError(error.what, where=f"source {name}", allowed=error.allowed) from error
    some = rng.permutation(len(known))[:SOURCE_CAP]
    known, log_ms = known[some], log_ms[some]
    model = predict.process(known, log_ms, predict.process_weights(known, log_ms, rng))
    return Source(name, board, known, log_ms, model)


def learn(devices: Sequence[Source], rng: np.random.Generator) -> Sources:
    """Prepares for any new device; the sources need not have measured the same networks."""
    if not devices:
        raise NasctlError("no source devices", where="transfer", next="Use predict.fit instead.")
    pooled = np.vstack([device.rows for device in devices])
    rows = pooled[rng.permutation(len(pooled))[:SOURCE_CAP]]
    logs = np.column_stack([device.model(rows) for device in devices])
    centre = logs.mean(axis=0)
    deviation = max(float((logs - centre).std()), 1e-9)
    structure = tuple(Scale.of(rows[:, part]) for part in STRUCTURE)
    blank = Sources(tuple(devices), structure, centre, deviation, {})
    return replace(blank, priors=_priors(_tasks(blank, rng)))


def _own(member: str, blocks: Sequence[Array]) -> Sequence[Array]:
    first, end = PROCESSES.get(member, (len(blocks) - 1, len(blocks)))
    return blocks[first:end]


def _tasks(sources: Sources, rng: np.random.Generator) -> list[Task]:
    """Each source as the new device, with the predictors of its board hidden. One that has no
    others to learn from yields none."""
    tasks = []
    for device in sources.devices:
        others = [at for at, one in enumerate(sources.devices) if one.board != device.board]
        for _ in range(TASKS if others else 0):
            some = rng.permutation(len(device.rows))[:TASK_SIZE]
            predicted, *structure, _ = sources.blocks(device.rows[some])
            shown = [predicted[:, others], *structure]
            tasks.append((kriging.kernels(shown, shown), device.log_ms[some]))
    return tasks


def _priors(tasks: Sequence[Task]) -> dict[str, Array]:
    return {
        member: kriging.learn(
            [(grams[_grams(member)], values) for grams, values in tasks],
            predict.start_weights(end - first),
            predict.PRIOR_SPREAD,
        )
        for member, (first, end) in PROCESSES.items()
    }


def _grams(member: str) -> slice:
    first, end = PROCESSES[member]
    return slice(first * len(kriging.LENGTHS), end * len(kriging.LENGTHS))


def adapt(sources: Sources, rows: Array, ms: Array) -> Adapted:
    """`rows` (networks, structure.WIDTH) and the ms measured for them on the new device: 10 to 100.

    Raises NasctlError for fewer than MIN_SAMPLES, or for a latency that is not positive.
    """
    rows, log_ms = checked(rows, ms, MIN_SAMPLES)
    blocks = sources.blocks(rows)
    members: dict[str, Sum | Process] = {}
    densities: dict[str, float] = {}
    members["sum"], densities["sum"] = _sum(blocks[-1], log_ms)
    for name, prior in sources.priors.items():
        own = _own(name, blocks)
        weights = kriging.learn([(kriging.kernels(own, own), log_ms)], prior, FREEDOM)
        process = members[name] = Process.fit(own, log_ms, weights)
        densities[name] = _density(log_ms, *process.leave_one_out(log_ms))
    best = max(densities.values())
    total = sum(np.exp(density - best) for density in densities.values())
    shares = {name: float(np.exp(density - best) / total) for name, density in densities.items()}
    return Adapted(sources, members, shares)


def _density(values: Array, mean: Array, deviation: Array) -> float:
    """Logarithm, but for a constant."""
    return float((-np.log(deviation) - 0.5 * ((values - mean) / deviation) ** 2).sum())


def _sum(terms: Array, log_ms: Array) -> tuple[Sum, float]:
    """(model, the density of each measurement when it was left out)."""
    left_out = np.empty(len(log_ms))
    for at in range(len(log_ms)):
        rest = np.arange(len(log_ms)) != at
        left_out[at] = predict.non_negative(terms[rest], log_ms[rest])(terms[at : at + 1])[0]
    error = log_ms - left_out
    deviation = max(float(np.sqrt(np.mean(error**2))), np.exp(kriging.NOISE_BOUNDS[0] / 2))
    fitted = Sum(predict.non_negative(terms, log_ms), deviation)
    return fitted, _density(log_ms, left_out, np.full(len(log_ms), deviation))


def choose(sources: Sources, rows: Array, n: int) -> NDArray[np.intp]:
    """Which n of these networks to measure on the new device. One after another, they leave the
    least variance over all of `rows` before anything is known about the device (Cohn, Neural
    Networks 9(6), 1996). Structure alone decides: a device unlike all sources is the one that needs
    a good choice. Time and memory grow with the square of the number of rows."""
    if not 0 < n <= len(rows):
        raise NasctlError(f"{n} of {len(rows)} networks", where="transfer", allowed="1 to all")
    rows = checked_rows(rows)
    blocks, weights = sources.scaled_structure(rows), sources.priors["structure"]
    covariance = np.tensordot(np.exp(weights[:-1]), kriging.kernels(blocks, blocks), axes=1)
    covariance += np.trace(covariance) / len(rows)  # the device's own speed, about as uncertain
    noise = np.exp(weights[-1])
    chosen: list[int] = []
    for _ in range(n):
        gain = (covariance**2).sum(axis=0) / (np.diag(covariance) + noise)
        gain[chosen] = -1.0  # each network once: what repeats would teach is left to the protocol
        best = int(gain.argmax())
        chosen.append(best)
        column = covariance[:, best].copy()
        covariance -= np.outer(column, column) / (column[best] + noise)
    return np.array(chosen)
