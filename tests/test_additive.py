"""hw_profiles.models.additive: what a fit gets wrong, learned from whole networks."""

import numpy as np
import pytest

from hw_profiles import chains
from hw_profiles.device import Device
from hw_profiles.models import additive, calibrate
from hw_profiles.models.additive import Additive, Process
from hw_profiles.op import Op

DEVICE = Device(
    name="toy", summary="", kind="cpu", runtime="onnxruntime", precision="fp32", sources=("test",)
)


def conv(c_in, c_out, size=16, **more):
    return Op("conv", c_in, c_out, size, size, 3, norm=True, act="relu", **more)


def shares_of(networks, ops, prior):
    counts = np.array([[ops_.count(one) for one in ops] for ops_ in networks], float)
    times = counts * prior
    return times / times.sum(1, keepdims=True)


def drawn(n, seed=0):
    """Random networks of 12 operators, their shares and how wrong a prior is on each operator."""
    rng = np.random.default_rng(seed)
    ops = [conv(8 * a, 8 * b) for a in (1, 2, 4) for b in (1, 2, 3, 4)]
    networks = [list(rng.choice(len(ops), 6)) for _ in range(n)]
    networks = [[ops[at] for at in picked] for picked in networks]
    wrong = rng.normal(0, 0.2, len(ops))
    return networks, ops, shares_of(networks, ops, rng.uniform(1, 3, len(ops))), wrong


def fitted(shares, ops, residuals):
    process = Process.of(shares, ops)
    return process.fit(process.choose(residuals, np.random.default_rng(0)), residuals)


def test_errors_of_single_operators_are_recovered_from_sums_alone():
    _, ops, shares, wrong = drawn(80)
    noise = np.random.default_rng(1).normal(0, 0.003, 80)
    found = fitted(shares, ops, shares @ wrong + noise)
    assert np.abs(found.correction(ops) - wrong).max() < 0.05


def test_what_is_pure_noise_is_not_learned():
    _, ops, shares, _ = drawn(80)
    found = fitted(shares, ops, np.random.default_rng(1).normal(0, 0.05, 80))
    assert np.abs(found.correction(ops)).max() < 0.03


def test_a_smooth_error_reaches_operators_that_no_network_had():
    rng = np.random.default_rng(0)
    wrong = {one: 0.1 * np.log2(one.c_out / 32) for c in range(8, 136, 8) for one in [conv(32, c)]}
    ops = [one for one in wrong if one.c_out != 64]
    networks = [[ops[at] for at in rng.choice(len(ops), 5)] for _ in range(60)]
    shares = shares_of(networks, ops, np.ones(len(ops)))
    found = fitted(shares, ops, shares @ [wrong[one] for one in ops])
    assert found.correction([conv(32, 64)])[0] == pytest.approx(wrong[conv(32, 64)], abs=0.03)
    assert conv(32, 64) not in found
    assert conv(32, 72) in found


def test_kinds_that_were_not_there_are_left_alone():
    _, ops, shares, wrong = drawn(40)
    found = fitted(shares, ops, shares @ wrong)
    other = Op("dwconv", 8, 8, 16, 16, 3, groups=8)
    assert found.correction([other])[0] == 0


def test_prediction_of_held_out_networks_agrees_with_the_fit_on_the_others():
    _, ops, shares, wrong = drawn(60)
    residuals = shares @ wrong
    process = Process.of(shares, ops)
    hyper = process.choose(residuals, np.random.default_rng(0))
    seen, unseen = np.arange(40), np.arange(40, 60)
    direct = Process.of(shares[seen], ops).fit(hyper, residuals[seen])
    found = process.predict(hyper, residuals[seen], seen, unseen)
    assert found == pytest.approx(shares[unseen] @ direct.correction(ops), abs=1e-4)


def test_json_and_back():
    _, ops, shares, wrong = drawn(30)
    found = fitted(shares, ops, shares @ wrong)
    again = Additive.model_validate_json(found.model_dump_json())
    assert again.ops == found.ops
    assert again.correction(ops) == pytest.approx(found.correction(ops), abs=1e-12)


def staircase(op):
    """A device that computes 16 channels at a time: no linear fit has such steps."""
    padded = 16 * -(-op.c_out // 16) / op.c_out if op.kind in ("conv", "linear") else 1.0
    return 2e-3 + op.macs * padded * 4e-8 + op.bytes() * 2e-8


def test_a_table_of_a_staircase_device_is_much_better_than_its_terms_alone():
    networks = chains.sample(np.random.default_rng(0), 160)
    times = [0.01 + sum(map(staircase, ops)) for ops in networks]
    train, test = list(zip(networks, times, strict=True))[:120], networks[120:]
    table = calibrate.fit(train, DEVICE, space="chains", source_text="made up")
    plain = table.model_copy(update={"learned": None})
    errors = [
        np.mean(
            [
                abs(t.estimate(ops, "chains").value_ms / ms - 1)
                for ops, ms in zip(test, times[120:], strict=True)
            ]
        )
        for t in (table, plain)
    ]
    assert errors[0] < 0.06
    assert errors[0] < errors[1] / 2
    estimate = table.estimate(test[0], "chains")
    assert estimate.source == "interpolated"
    assert set(estimate.shares) <= {"calibrated", "interpolated"}
    assert additive.Additive is type(table.learned)
