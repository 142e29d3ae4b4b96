"""Latency of single operators at sizes that were not measured: fit on kernels, predict kernels.

log ms = physics + kriging + correction, for each kind of operator apart:

physics     ridge regression per (kernel, stride, fused add) on logarithms of the sizes, their
            squares, the bytes, and the work of a tiled matrix product in waves over the device's
            parallel units: that is where the staircase comes from. How many units there are is
            chosen by the fit.
kriging     the residuals of the nearest measured kernels, weighted as a Gaussian process would
            (Vecchia 1988; exponential covariance). Its length scales are chosen for each dimension
            by hiding that dimension's own level: who is asked for c_in = 96 has neighbours
            at 80 and 128 and none at 96.
correction  boosted trees on what then remains, trained on predictions made with a level hidden in
            the same way; a second forest learns how large the remaining error is.

Trees alone repeat the nearest level and smooth fits cut the corners of the staircase; the page
docs/methods/kernels.md compares them. Times are for one (device, runtime, precision).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import ArrayLike
from pydantic import BaseModel, ConfigDict, PositiveFloat
from scipy.spatial import cKDTree

from hw_profiles.models import boost
from hw_profiles.models.boost import Array, Forest, Growth, Index, Stored
from hw_profiles.op import Op
from nas.errors import NasctlError, unknown

COLUMNS = ("batch", "c_in", "map", "c_out", "kernel", "stride", "fused", "out", "depth")
BATCH, C_IN, MAP, C_OUT, KERNEL, STRIDE, FUSED, OUT, DEPTH = range(len(COLUMNS))
AXES = (C_IN, MAP, C_OUT)  # the dimensions whose unmeasured levels are asked for
TILES = ((64, 32), (64, 64), (128, 64), (128, 128))  # rows x columns of a matrix product's tile
UNITS = (1, 2, 4, 8, 16, 32, 48, 64, 80, 108, 132, 160, 216, 264)
MIN_KERNELS = 12  # of a kind; fewer say nothing about its sizes
NEIGHBOURS = 20
TUNED_ON = 300  # kernels, drawn
TUNED_AMONG = 8000
CORRECTED_ON = 20_000  # kernels, drawn
CONFIDENCE = 0.9

_frozen = ConfigDict(frozen=True, extra="forbid")


def table(ops: Sequence[Op], batch: ArrayLike = 1) -> Array:
    """Rows x COLUMNS of sizes; `map` and `out` are pixels read and written per image, `depth` is
    the number of products in one output element. `batch` is one number or one per operator."""
    sizes = [
        (
            *(op.c_in, op.h * op.w, op.c_out, op.kernel, op.stride, int(op.fuses_add)),
            *(op.h_out * op.w_out, _depth(op)),
        )
        for op in ops
    ]
    rows = np.array(sizes, dtype=float).reshape(-1, len(COLUMNS) - 1)
    return np.column_stack([np.broadcast_to(np.asarray(batch, dtype=float), len(rows)), rows])


def _depth(op: Op) -> float:
    if op.weights:
        return op.weights / op.c_out
    return float(op.h * op.w if op.kind == "gap" else op.kernel**2)


def family(op: Op) -> str:
    """What is fitted apart: a grouped convolution shares nothing with a full one but the name."""
    return "grouped" if op.kind == "conv" and op.groups > 1 else op.kind


# ---- physics -------------------------------------------------------------------------------------


def waves(rows: Array, tile: tuple[int, int], units: float) -> Array:
    """How many rounds of `units` tiles the product takes, exactly (before rounding up)."""
    tall, wide = tile
    tiles = np.ceil(rows[:, BATCH] * rows[:, OUT] / tall) * np.ceil(rows[:, C_OUT] / wide)
    return tiles / units


def terms(rows: Array, units: float) -> Array:
    """log2 of what an operator costs, in several views [N, 20]."""
    raw = np.log2(rows[:, [BATCH, C_IN, MAP, C_OUT]])
    squares = [raw[:, i] * raw[:, j] for i in range(4) for j in range(i, 4)]
    work = [
        np.log2(np.ceil(waves(rows, tile, units)) * np.prod(tile) * rows[:, DEPTH])
        for tile in TILES
    ]
    return np.column_stack([raw, *squares, *work, *_bytes(rows)])


def _bytes(rows: Array) -> tuple[Array, Array]:
    """log2 of elements moved, all and those of the weights."""
    batch, weights = rows[:, BATCH], rows[:, DEPTH] * rows[:, C_OUT]
    written = rows[:, C_OUT] * rows[:, OUT] * (1 + rows[:, FUSED])
    return np.log2(batch * (rows[:, C_IN] * rows[:, MAP] + written) + weights), np.log2(weights)


class Physics(BaseModel):
    """A regression for all, and for each (kernel, stride, fused) what it leaves."""

    model_config = _frozen
    units: float
    centre: Stored
    scale: Stored
    shared: Stored  # 21
    groups: Stored  # G x 3
    own: Stored  # G x 21

    def __call__(self, rows: Array) -> Array:
        """log ms over the level [N]; a group that was never measured has the shared part alone."""
        design = self.design(rows)
        result = design @ self.shared
        for key, weights in zip(self.groups, self.own, strict=True):
            mine = (rows[:, [KERNEL, STRIDE, FUSED]] == key).all(axis=1)
            result[mine] += design[mine] @ weights
        return result

    def design(self, rows: Array) -> Array:
        scaled = (terms(rows, self.units) - self.centre) / self.scale
        return np.column_stack([scaled, np.ones(len(rows))])


def physics(rows: Array, log_ms: Array, units: float) -> Physics:
    columns = terms(rows, units)
    groups = np.unique(rows[:, [KERNEL, STRIDE, FUSED]], axis=0)
    blank = Physics(
        units=units,
        centre=columns.mean(axis=0),
        scale=np.maximum(columns.std(axis=0), 1e-9),
        shared=np.zeros(columns.shape[1] + 1),
        groups=groups,
        own=np.zeros((len(groups), columns.shape[1] + 1)),
    )
    design = blank.design(rows)
    shared = _ridge(design, log_ms)
    left = log_ms - design @ shared
    own = []
    for key in groups:
        mine = (rows[:, [KERNEL, STRIDE, FUSED]] == key).all(axis=1)
        own.append(_ridge(design[mine], left[mine]))
    return blank.model_copy(update={"shared": shared, "own": np.array(own)})


def _ridge(design: Array, goal: Array) -> Array:
    # one kernel's worth for few of them, a ten-thousandth of the data for many
    penalty = (1.0 + 1e-4 * len(design)) * np.eye(design.shape[1])
    return np.linalg.solve(design.T @ design + penalty, design.T @ goal).astype(float)


# ---- kriging -------------------------------------------------------------------------------------


def places(rows: Array) -> Array:
    """Where a kernel is among others [N, 7]; equal steps are equal ratios."""
    logs = np.log2(rows[:, [BATCH, C_IN, MAP, C_OUT, KERNEL, STRIDE]])
    return np.column_stack([logs, rows[:, FUSED]])


START = (0.2, 0.3, 0.15, 0.3, 2.0, 2.0, 0.2, 0.03)  # scale of each place, then the noise's share
TUNED = [0, 1, 2, 3, 6, 7]  # kernel and stride stay far apart


def krige(
    known: Array, residual: Array, asked: Array, scale: Array, hidden: Array | None = None
) -> tuple[Array, Array]:
    """(residual, its variance relative to no neighbour at all) at rows `asked` [M].

    `hidden` [M] hides neighbours from each of `asked`: those with the same level of that column or,
    where it is -1, the same kernel.
    """
    homes, there = places(known) * scale[:-1], places(asked) * scale[:-1]
    # on grids a balanced tree costs more to build than it saves
    tree = cKDTree(homes, balanced_tree=False, compact_nodes=False)
    mean, variance = np.zeros(len(asked)), np.ones(len(asked))
    count = min(len(known), NEIGHBOURS if hidden is None else 5 * NEIGHBOURS)
    for part in np.array_split(np.arange(len(asked)), -(-len(asked) // 3000)):
        far, near = tree.query(there[part], k=np.arange(1, count + 1))
        usable = np.ones(near.shape, dtype=bool)
        if hidden is not None:
            column = hidden[part].astype(int)[:, None]
            same = known[near, column] == asked[part[:, None], column]
            usable = ~np.where(column < 0, far == 0, same)
            order = np.argsort(~usable, axis=1, kind="stable")[:, :NEIGHBOURS]
            near, far, usable = (np.take_along_axis(x, order, 1) for x in (near, far, usable))
        spots = homes[near]
        apart = ((spots[:, :, None] - spots[:, None]) ** 2).sum(axis=-1)
        alike = np.exp(-np.sqrt(apart)) * (usable[:, :, None] & usable[:, None])
        at = np.arange(near.shape[1])
        alike[:, at, at] = 1 + scale[-1]
        towards = np.exp(-far) * usable
        weights = np.linalg.solve(alike, towards[:, :, None])[:, :, 0]
        mean[part] = (weights * residual[near]).sum(axis=1)
        variance[part] = 1 - (weights * towards).sum(axis=1)
    return mean, variance


def tuned(rows: Array, residual: Array, axis: int, rng: np.random.Generator) -> Array:
    """Scales that predict best with the level of `axis` hidden, by coordinate descent.

    On whole groups of equal kernel and stride: others are hardly ever among the neighbours.
    """
    _, group, sizes = np.unique(
        rows[:, [KERNEL, STRIDE]], axis=0, return_inverse=True, return_counts=True
    )
    order = rng.permutation(len(sizes))
    taken = order[: 1 + int(np.searchsorted(sizes[order].cumsum(), TUNED_AMONG))]
    chosen = np.isin(group.ravel(), taken)
    rows, residual = rows[chosen], residual[chosen]
    drawn = rng.permutation(len(rows))[:TUNED_ON]
    hidden = np.full(len(drawn), axis)

    def loss(logs: Array) -> float:
        mean, _ = krige(rows, residual, rows[drawn], np.exp(logs), hidden)
        # odd tactics are no reason to blur the others
        return float(np.minimum(np.abs(mean - residual[drawn]), 0.3).mean())

    best = np.log(START)
    least, step = loss(best), np.log(2.0)
    for _ in range(2):
        for unit in step * np.eye(len(best))[TUNED]:
            tried = ((loss(moved), moved) for moved in (best + unit, best - unit))
            least, best = next((found for found in tried if found[0] < least), (least, best))
        step /= 1.6
    return np.exp(best)


# ---- the model -----------------------------------------------------------------------------------


class Family(BaseModel):
    """What was learned of one kind of operator."""

    model_config = _frozen
    level: float  # mean log ms; all else is relative to it
    physics: Physics
    rows: Stored  # N x COLUMNS
    residual: Stored  # N
    scales: Stored  # nothing hidden, then one row per axis
    correction: Forest
    doubt: Forest
    widen: PositiveFloat

    def predict(self, rows: Array) -> tuple[Array, Array]:
        """(log ms over the level, 90 % half-width of its error) of rows [N, COLUMNS]."""
        unseen = np.stack([~np.isin(rows[:, axis], self.rows[:, axis]) for axis in AXES], axis=1)
        case = np.where(unseen.any(axis=1), 1 + unseen.argmax(axis=1), 0)
        mean, variance = np.zeros(len(rows)), np.ones(len(rows))
        for at in np.unique(case):
            mine = case == at
            mean[mine], variance[mine] = krige(
                self.rows, self.residual, rows[mine], self.scales[at]
            )
        first = self.physics(rows) + mean
        views = self.views(rows, first, variance, unseen.astype(float))
        return first + self.correction(views), self.widen * np.exp(self.doubt(views))

    def views(self, rows: Array, first: Array, variance: Array, unseen: Array) -> Array:
        """What the forests see."""
        units = self.physics.units
        rounded = [
            np.ceil(value / tile) * tile / value
            for value, tile in (
                (rows[:, C_IN], 32),
                (rows[:, C_OUT], 64),
                (rows[:, BATCH] * rows[:, OUT], 128),
            )
        ]
        tails = [np.ceil(count) / count for count in (waves(rows, tile, units) for tile in TILES)]
        sizes = np.column_stack([rows[:, [KERNEL, STRIDE, FUSED]], np.log2(rows[:, [OUT, DEPTH]])])
        return np.column_stack(
            [terms(rows, units), sizes, *rounded, *tails, first, variance, unseen]
        )


class Model(BaseModel):
    """Kernels of one (device, runtime, precision); plain JSON in and out."""

    model_config = _frozen
    families: dict[str, Family]

    def covers(self, op: Op) -> bool:
        return family(op) in self.families

    def predict(self, ops: Sequence[Op], batch: ArrayLike = 1) -> tuple[Array, Array]:
        """(ms [N], relative spread [N]) for the whole batch.

        The spread is where 90 % of relative errors were on kernels of hidden levels. Raises
        NasctlError for a kind of operator that the fit did not have.
        """
        ms, spread = np.zeros(len(ops)), np.zeros(len(ops))
        rows = _checked(ops, batch)
        for name, mine in _by_family(ops):
            if name not in self.families:
                raise unknown("kind of operator", name, self.families, where="kernel model")
            learned = self.families[name]
            log_ms, width = learned.predict(rows[mine])
            ms[mine], spread[mine] = np.exp(learned.level + log_ms), np.expm1(width)
        return ms, spread


def fit(
    ops: Sequence[Op], ms: ArrayLike, *, rng: np.random.Generator, batch: ArrayLike = 1
) -> Model:
    """Learn from single operators and their milliseconds for the whole batch, [N] each.

    An operator that reads two tensors has a residual add fused into it. Raises NasctlError for a
    time that is not positive and finite, and for a kind with fewer than 12 kernels.
    """
    times, rows = np.asarray(ms, dtype=float), _checked(ops, batch)
    if times.shape != (len(ops),):
        raise NasctlError(f"{len(ops)} operators and {times.size} times", where="kernel model")
    if not (np.isfinite(times) & (times > 0)).all():
        raise NasctlError("every latency must be positive and finite", where="kernel model")
    families = {}
    for name, mine in _by_family(ops):
        if len(mine) < MIN_KERNELS:
            raise NasctlError(
                f"{len(mine)} kernels of kind '{name}' are too few to learn from",
                where="kernel model",
                allowed=f"at least {MIN_KERNELS}",
            )
        families[name] = _family(rows[mine], np.log(times[mine]), rng)
    return Model(families=families)


def _checked(ops: Sequence[Op], batch: ArrayLike) -> Array:
    sizes = np.asarray(batch, dtype=float)
    if sizes.shape not in ((), (len(ops),)) or not (sizes >= 1).all():
        raise NasctlError("give one batch size of at least 1, or one per operator", where="batch")
    return table(ops, sizes)


def _by_family(ops: Sequence[Op]) -> Iterator[tuple[str, Index]]:
    names = np.array([family(op) for op in ops], dtype=str)
    for name in np.unique(names):
        yield str(name), np.flatnonzero(names == name)


def _family(rows: Array, log_times: Array, rng: np.random.Generator) -> Family:
    level = float(log_times.mean())
    # rounded, so that a device that is slower by a factor is learned as exactly that
    log_ms = np.round(log_times - level, 9)
    some = rng.permutation(len(rows))[:3000]
    tried = [physics(rows[some], log_ms[some], units) for units in UNITS]
    errors = [np.abs(log_ms[some] - each(rows[some])).mean() for each in tried]
    base = physics(rows, log_ms, UNITS[int(np.argmin(errors))])
    residual = log_ms - base(rows)
    scales = np.array([tuned(rows, residual, axis, rng) for axis in (-1, *AXES)])
    blank = Forest(features=np.zeros((0, 1)), thresholds=np.zeros((0, 1)), values=np.zeros((0, 2)))
    made = Family(
        level=level,
        physics=base,
        rows=rows,
        residual=residual,
        scales=scales,
        correction=blank,
        doubt=blank,
        widen=1.0,
    )
    drawn = rng.permutation(len(rows))[:CORRECTED_ON]
    views, first = _hidden(made, drawn, rng)
    return _corrected(made, views, log_ms[drawn] - first, rng)


def _hidden(model: Family, drawn: Index, rng: np.random.Generator) -> tuple[Array, Array]:
    """(views, log ms) of known kernels as if a level of each, or the kernel alone, were not."""
    rows, case = model.rows[drawn], rng.integers(0, 1 + len(AXES), len(drawn))
    mean, variance = np.zeros(len(drawn)), np.ones(len(drawn))
    for at, axis in enumerate((-1, *AXES)):
        mine = case == at
        mean[mine], variance[mine] = krige(
            model.rows, model.residual, rows[mine], model.scales[at], np.full(mine.sum(), axis)
        )
    first = model.physics(rows) + mean
    unseen = np.stack([case == 1 + at for at in range(len(AXES))], axis=1)
    return model.views(rows, first, variance, unseen.astype(float)), first


def _corrected(model: Family, views: Array, error: Array, rng: np.random.Generator) -> Family:
    """Two thirds of the kernels teach the correction, the rest how far to trust it."""
    teach = np.arange(len(error)) % 3 > 0
    trees = int(np.clip(len(error) / 20, 20, Growth().trees))  # a few kernels teach little
    correction = boost.fit(views[teach], error[teach], rng, Growth(trees=trees))
    left = np.abs(error - correction(views))[~teach]
    logs = np.log(left + 1e-3)
    doubt = boost.fit(views[~teach], logs, rng, Growth(trees=60, depth=4, width=1.0))
    ratio = left / np.exp(doubt(views[~teach]))
    widen = float(np.quantile(ratio, CONFIDENCE, method="higher"))
    return model.model_copy(update={"correction": correction, "doubt": doubt, "widen": widen})
