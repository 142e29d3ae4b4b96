"""hw_profiles.models.interpolate on synthetic devices whose true latency is known."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hw_profiles.models import boost, interpolate
from hw_profiles.models.boost import Growth
from hw_profiles.models.interpolate import Model
from hw_profiles.op import Op
from nas.errors import NasctlError

WIDTHS = (8, 16, 32, 48, 64, 96, 128, 192)
SIZES = (7, 14, 28, 40, 56)
SMALL = {"widths": (8, 16, 32, 64), "sizes": (7, 14, 28), "kernels": (3,)}


def kernels(widths=WIDTHS, sizes=SIZES, kind="conv", kernels=(1, 3)) -> list[Op]:
    """A full grid of sizes."""
    if kind == "dwconv":
        return [Op(kind, c, c, s, s, k, 1, c) for c in widths for s in sizes for k in kernels]
    return [Op(kind, a, b, s, s, k) for a in widths for b in widths for s in sizes for k in kernels]


def staircase(op: Op) -> float:
    """A device of 16 units that computes tiles of 64 x 64, in ms."""
    tiles = np.ceil(op.h_out * op.w_out / 64) * np.ceil(op.c_out / 64)
    return 0.01 + 2e-7 * np.ceil(tiles / 16) * 64 * 64 * op.weights / op.c_out


def smooth(op: Op) -> float:
    return 0.004 + op.macs * 2e-8 + op.bytes() * 3e-8


def timed(ops, device=staircase, noise=0.0, seed=0):
    rng = np.random.default_rng(seed)
    return np.array([device(op) for op in ops]) * np.exp(noise * rng.standard_normal(len(ops)))


def fitted(ops, ms, seed=0) -> Model:
    return interpolate.fit(ops, ms, rng=np.random.default_rng(seed))


@pytest.fixture(scope="module")
def staircase_model() -> Model:
    """Fitted without the levels c_out = 96 and 40 pixels."""
    ops = [op for op in kernels() if op.c_out != 96 and op.h != 40]
    return fitted(ops, timed(ops))


def test_measured_kernels_are_reproduced(staircase_model):
    ops = [op for op in kernels() if op.c_out != 96 and op.h != 40]
    ratios = staircase_model.predict(ops)[0] / timed(ops)
    assert np.quantile(np.abs(ratios - 1), 0.95) < 0.03


@pytest.mark.parametrize("dimension", ["c_out", "h"])
def test_a_staircase_is_followed_at_levels_that_were_never_measured(staircase_model, dimension):
    ops = [op for op in kernels() if (op.c_out == 96) != (op.h == 40)]
    ops = [op for op in ops if getattr(op, dimension) in (96, 40)]
    errors = np.abs(staircase_model.predict(ops)[0] / timed(ops) - 1)
    straight = np.abs(nearest_below(ops, dimension) / timed(ops) - 1)
    assert np.median(errors) < 0.08
    assert np.median(errors) < np.median(straight) / 2  # what the next smaller size would say


def nearest_below(ops, dimension):
    lower = {"c_out": 64, "h": 28}[dimension]
    changed = {"c_out": ("c_out",), "h": ("h", "w")}[dimension]
    return timed([replaced(op, changed, lower) for op in ops])


def replaced(op: Op, names, value) -> Op:
    sizes = {name: getattr(op, name) for name in ("kind", "c_in", "c_out", "h", "w", "kernel")}
    return Op(**(sizes | dict.fromkeys(names, value)))


def test_the_spread_covers_most_errors_and_is_not_idle():
    ops = kernels()
    ms = timed(ops, noise=0.04)
    hidden = np.array([op.c_out == 96 for op in ops])
    model = fitted([op for op in ops if op.c_out != 96], ms[~hidden])
    value, spread = model.predict([op for op in ops if op.c_out == 96])
    assert np.mean(np.abs(ms[hidden] / value - 1) <= spread) > 0.75
    assert np.median(spread) < 0.4


@settings(max_examples=2, deadline=None)
@given(factor=st.floats(1e-3, 1e3), seed=st.integers(0, 2**16))
def test_a_device_that_is_slower_by_a_factor_is_predicted_slower_by_it(factor, seed):
    ops = kernels(**SMALL)
    ms = timed(ops, smooth, noise=0.02, seed=seed)
    asked = kernels(widths=(12, 24, 48), sizes=(7, 14, 28), kernels=(3,))
    one, spread = fitted(ops, ms, seed).predict(asked)
    other, wide = fitted(ops, factor * ms, seed).predict(asked)
    np.testing.assert_allclose(other, factor * one, rtol=1e-6)
    np.testing.assert_allclose(wide, spread, rtol=1e-6)


def test_the_same_seed_gives_the_same_model_and_json_keeps_it():
    ops = kernels(**SMALL)
    asked = kernels(widths=(24, 48), sizes=(7, 20))
    model = fitted(ops, timed(ops))
    again = Model.model_validate_json(model.model_dump_json())
    for other in (again, fitted(ops, timed(ops))):
        np.testing.assert_array_equal(model.predict(asked), other.predict(asked))


def test_kinds_are_apart_and_one_that_was_not_fitted_is_an_error():
    full = kernels(**SMALL)
    depthwise = kernels(widths=(8, 16, 32, 64), sizes=(7, 14, 28, 56), kind="dwconv")
    ops = [*full, *depthwise]
    ms = np.concatenate([timed(full, smooth), 50 * timed(depthwise, smooth)])
    model = fitted(ops, ms)
    assert set(model.families) == {"conv", "dwconv"}
    np.testing.assert_allclose(model.predict(ops)[0] / ms, 1, rtol=0.3)
    with pytest.raises(NasctlError, match="unknown kind of operator 'linear'.*conv, dwconv"):
        model.predict([Op("linear", 8, 8, 1, 1)])


def test_batch_and_a_fused_add_are_sizes_like_others():
    plain = kernels(widths=(16, 32, 64, 128), sizes=(7, 14), kernels=(3,))
    added = [Op(op.kind, op.c_in, op.c_out, op.h, op.w, 3, reads=(-1, -1)) for op in plain]
    ops, batch = [*plain, *added] * 2, np.repeat([1, 8], 2 * len(plain))
    ms = np.array([smooth(op) * (1 + 0.5 * (len(op.reads) - 1)) for op in ops]) * batch
    model = interpolate.fit(ops, ms, batch=batch, rng=np.random.default_rng(0))
    one = model.predict(plain, batch=1)[0]
    assert np.median(model.predict(added, batch=1)[0] / one) == pytest.approx(1.5, rel=0.05)
    assert np.median(model.predict(plain, batch=8)[0] / one) == pytest.approx(8, rel=0.05)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 0.0, -1.0])
def test_a_time_that_is_none_is_refused(bad):
    ops = kernels(widths=(8, 16, 32, 64), sizes=(7, 14))
    ms = timed(ops)
    ms[3] = bad
    with pytest.raises(NasctlError, match="every latency must be positive and finite"):
        fitted(ops, ms)


def test_too_few_or_unequal_many_are_refused():
    ops = kernels(widths=(8, 16), sizes=(7, 14), kernels=(3,))
    with pytest.raises(NasctlError, match="8 kernels of kind 'conv' are too few"):
        fitted(ops, timed(ops))
    with pytest.raises(NasctlError, match="8 operators and 7 times"):
        fitted(ops, timed(ops)[1:])
    for batch in (0, [1, 2], float("nan")):
        with pytest.raises(NasctlError, match="batch"):
            interpolate.fit(ops, timed(ops), batch=batch, rng=np.random.default_rng(0))


def test_a_dozen_kernels_are_enough_to_scale():
    ops = kernels(widths=(16, 32, 64), sizes=(14, 28), kernels=(3,))
    asked = [Op("conv", 48, 48, 14, 14, 3), Op("conv", 48, 48, 28, 28, 3)]
    ratios = fitted(ops, timed(ops, smooth)).predict(asked)[0] / timed(asked, smooth)
    np.testing.assert_allclose(ratios, 1, rtol=0.35)


def test_boosted_trees_learn_a_step_and_ignore_a_few_wild_targets():
    rng = np.random.default_rng(0)
    table = rng.random((2000, 3))
    truth = 0.2 * (table[:, 1] > 0.5)
    target = truth + np.where(rng.random(2000) < 0.02, 5.0, 0.0)
    forest = boost.fit(table, target, np.random.default_rng(1), Growth(trees=100, depth=3))
    fresh = rng.random((500, 3))
    far = np.abs(fresh[:, 1] - 0.5) > 0.02  # a cut lies on an edge of a bin
    error = np.abs(forest(fresh) - 0.2 * (fresh[:, 1] > 0.5))[far]
    assert error.max() < 0.05


def test_neither_fitting_nor_predicting_needs_torch():
    code = (
        "import sys, numpy as np; from hw_profiles.models import interpolate; "
        "from hw_profiles.op import Op; "
        "ops = [Op('conv', c, d, 8, 8, 3) for c in (8, 16, 32, 64) for d in (8, 16, 32, 64)]; "
        "ms = [op.macs * 1e-6 for op in ops]; "
        "interpolate.fit(ops, ms, rng=np.random.default_rng(0)).predict(ops); "
        "sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
