"""hw_profiles.models.structure, predict and transfer on synthetic devices."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.stats import spearmanr

from hw_profiles.models import kriging, predict, transfer
from hw_profiles.models.kriging import Process
from hw_profiles.models.structure import CHAINS, JOINED, MEASURES, ROLES, WIDTH, WORK, describe
from hw_profiles.op import Op, Tape
from nas.errors import NasctlError

ROLE_MS = {"pointwise": (0.03, 8.0), "spatial": (0.05, 20.0), "dwconv": (0.02, 90.0)}
N_ROLES = len(ROLES)


def network(rng: np.random.Generator) -> list[Op]:
    tape = Tape(3, int(rng.choice([16, 32])))
    x = tape.conv(tape.input, 8 * int(rng.integers(1, 5)), kernel=3, stride=2, norm=True)
    for _ in range(rng.integers(1, 7)):
        y = tape.conv(tape.act(x, "relu"), x.c, kernel=int(rng.choice([1, 3])), norm=True)
        if rng.random() < 0.4:
            y = tape.conv(y, y.c, kernel=3, groups=y.c, norm=True)
        x = tape.add(x, y) if rng.random() < 0.5 else tape.conv(y, 8 * int(rng.integers(1, 9)))
    tape.linear(tape.gap(x), 10)
    return tape.ops


@pytest.fixture(scope="module")
def rows():
    rng = np.random.default_rng(0)
    return describe([network(rng) for _ in range(300)])


def sums(rows):
    return rows[:, : N_ROLES * len(MEASURES)].reshape(len(rows), N_ROLES, len(MEASURES))


def additive_ms(rows, overhead=1.0, rate=1.0):
    """0.3 ms, and per operator an overhead and its GMACs."""
    found = np.full(len(rows), 0.3)
    for role, (each, per_gmac) in ROLE_MS.items():
        ops, gmacs = sums(rows)[:, ROLES.index(role), :2].T
        found += overhead * each * ops + rate * per_gmac * gmacs
    return found


def fusing_ms(rows, overhead=1.0, rate=1.0):
    """The same where an addition to a spatial convolution saves a third of everything."""
    fused = rows[:, CHAINS].reshape(-1, N_ROLES, 2, N_ROLES)[
        :, ROLES.index("spatial"), 0, ROLES.index("add")
    ]
    return additive_ms(rows, overhead, rate) * np.exp(-0.4 * (fused > 0))


def mape(predicted, true):
    return float(np.mean(np.abs(predicted / true - 1)))


@pytest.fixture(scope="module")
def sources(rows):
    rng = np.random.default_rng(1)
    devices = []
    for name, setting in {"lab-a": (1, 1), "lab-b": (0.3, 3), "lab-c": (3, 0.2)}.items():
        ms = fusing_ms(rows[:150], *setting) * np.exp(0.02 * rng.standard_normal(150))
        devices.append(transfer.source(name, name, rows[:150], ms, rng))
    return transfer.learn(devices, rng)


def test_a_hand_counted_network():
    tape = Tape(8, 4)
    left = tape.conv(tape.input, 8, kernel=3)
    a, b = tape.act(left, "relu"), tape.conv(left, 8)
    tape.add(a, b)
    (row,) = describe([tape.ops])
    counts = dict(zip(ROLES, sums(row[None])[0, :, 0], strict=True))
    assert counts == {role: float(role in ("spatial", "act", "pointwise", "add")) for role in ROLES}
    chain = row[WORK][N_ROLES * len(MEASURES) :]
    spatial, pointwise = 8 * 8 * 9 * 16e-9, 8 * 8 * 16e-9
    assert chain[0] == 3  # convolution, activation or convolution, addition
    assert chain[1] == pytest.approx(spatial + pointwise)
    assert tuple(chain[-2:]) == (2, 1)  # two side by side, in one step

    def chains(writer, shared, reader):
        return row[CHAINS].reshape(N_ROLES, 2, N_ROLES)[
            ROLES.index(writer), shared, ROLES.index(reader)
        ]

    assert chains("spatial", 1, "act") == chains("spatial", 1, "pointwise") == 1
    assert chains("act", 0, "add") == chains("pointwise", 0, "add") == 1
    assert row[CHAINS].sum() == 4
    readers, joined = row[JOINED].reshape(2, N_ROLES, N_ROLES)
    pair = sorted(ROLES.index(role) for role in ("act", "pointwise"))
    assert readers[tuple(pair)] == joined[tuple(pair)] == 1
    assert row[JOINED].sum() == 2


def test_wiring_tells_networks_of_equal_work_apart():
    rows = []
    for merge_first in (True, False):
        tape = Tape(8, 4)
        x = tape.conv(tape.input, 8)
        y, z = tape.conv(x, 8), tape.conv(x if merge_first else tape.conv(x, 8), 8)
        w = tape.add(y, z)
        if merge_first:
            tape.conv(w, 8)
        rows.append(describe([tape.ops])[0])
    assert np.array_equal(sums(rows[0][None]), sums(rows[1][None]))
    assert not np.array_equal(rows[0][CHAINS], rows[1][CHAINS])


def test_description_refuses_what_it_does_not_know():
    with pytest.raises(NasctlError, match="network 1: a network without operators"):
        describe([[Op("conv", 3, 8, 4, 4)], []])
    with pytest.raises(NasctlError, match="cannot describe operator 'fft'"):
        describe([[Op("fft", 3, 8, 4, 4)]])


def test_process_interpolates_is_unsure_far_away_and_ignores_a_shift():
    x = np.linspace(-1, 1, 15)[:, None]
    y = np.sin(3 * x[:, 0])
    weights = kriging.learn([(kernels_of(x), y)], np.log([0.1, 0.1, 0.1, 1e-3]), 3.0)
    fitted = Process.fit([x], y, weights)
    asked = np.array([[0.05], [0.55], [4.0]])
    mean, deviation = fitted.predict([asked])
    assert mean[:2] == pytest.approx(np.sin(3 * asked[:2, 0]), abs=0.03)
    assert deviation[2] > 5 * deviation[:2].max()
    assert fitted.mean_at([asked]) == pytest.approx(mean)
    shifted, same = Process.fit([x], y + 7, weights).predict([asked])
    assert shifted == pytest.approx(mean + 7) and same == pytest.approx(deviation)


def kernels_of(x):
    return kriging.kernels([x], [x])


def test_leave_one_out_is_what_leaving_one_out_gives():
    rng = np.random.default_rng(0)
    x, y = rng.standard_normal((12, 2)), rng.standard_normal(12)
    weights = np.log([0.5, 0.3, 0.2, 0.1])
    mean, deviation = Process.fit([x], y, weights).leave_one_out(y)
    rest = np.arange(12) != 4
    one, its = Process.fit([x[rest]], y[rest], weights).predict([x[4:5]])
    assert (mean[4], deviation[4]) == (pytest.approx(one[0]), pytest.approx(its[0]))


def test_the_gradient_of_the_likelihood():
    rng = np.random.default_rng(0)
    x, y = rng.standard_normal((9, 2)), rng.standard_normal(9)
    at, step = np.log([0.5, 0.3, 0.2, 0.1]), 1e-6
    _, gradient = kriging.likelihood(at, kernels_of(x), y)
    for axis, move in enumerate(step * np.eye(4)):
        up = kriging.likelihood(at + move, kernels_of(x), y)[0]
        down = kriging.likelihood(at - move, kernels_of(x), y)[0]
        assert gradient[axis] == pytest.approx((up - down) / (2 * step), rel=1e-4)


def test_an_additive_device_is_recovered_and_called_additive(rows):
    true = additive_ms(rows)
    found = predict.fit(rows[:60], true[:60], np.random.default_rng(0))
    assert found.method == "additive"
    assert mape(found.predict(rows[60:]), true[60:]) < 0.005
    assert found.errors["additive"] < found.errors["ridge"]


def test_a_device_that_fuses_is_not_additive_and_the_process_learns_it(rows):
    true = fusing_ms(rows)
    found = predict.fit(rows[:150], true[:150], np.random.default_rng(0))
    assert found.method == "process"
    assert found.errors["additive"] > 0.08
    assert mape(found.predict(rows[150:]), true[150:]) < 0.04
    assert found.spread < 0.1


def test_a_scaled_copy_of_a_source_needs_few_samples(rows, sources):
    true = 40 * fusing_ms(rows, 0.3, 3)
    ms, deviation = transfer.adapt(sources, rows[150:160], true[150:160]).predict(rows[160:])
    # never better than the source's own predictor, which knows the device up to its speed
    own = np.exp(sources.devices[1].model(rows[160:]))
    assert mape(ms, true[160:]) < 1.5 * mape(40 * own, true[160:])
    assert np.median(deviation) < 0.1


def test_transfer_beats_the_few_samples_alone(rows, sources):
    true = fusing_ms(rows, 0.7, 1.8)
    some = slice(150, 160)
    ms, deviation = transfer.adapt(sources, rows[some], true[some]).predict(rows[160:])
    alone = predict.fit(rows[some], true[some], np.random.default_rng(0)).predict(rows[160:])
    assert mape(ms, true[160:]) < 0.08 < mape(alone, true[160:]) / 1.5
    assert spearmanr(ms, true[160:]).statistic > 0.96
    assert np.mean(np.abs(np.log(ms / true[160:])) < 2 * deviation) > 0.85


def test_a_device_twice_as_slow_is_the_same_problem(rows, sources):
    true = fusing_ms(rows, 0.7, 1.8)
    some = slice(150, 165)
    ms, deviation = transfer.adapt(sources, rows[some], true[some]).predict(rows[160:])
    slow, same = transfer.adapt(sources, rows[some], 2e3 * true[some]).predict(rows[160:])
    assert slow == pytest.approx(2e3 * ms, rel=1e-3)
    assert same == pytest.approx(deviation, rel=1e-3)


def test_same_rng_same_result(rows):
    true = additive_ms(rows)
    first, again = (
        transfer.adapt(
            transfer.learn(
                [transfer.source("a", "a", rows[:40], true[:40], np.random.default_rng(5))],
                np.random.default_rng(6),
            ),
            rows[40:50],
            true[40:50],
        ).predict(rows[50:])
        for _ in range(2)
    )
    assert np.array_equal(first[0], again[0]) and np.array_equal(first[1], again[1])


def test_settings_of_one_board_do_not_vouch_for_one_another(rows):
    """With its own board as the only other source, a device has nobody to learn a prior from."""
    rng = np.random.default_rng(0)
    devices = [
        transfer.source(name, "one", rows[:40], additive_ms(rows[:40]), rng) for name in "ab"
    ]
    alone = transfer.learn(devices, rng)
    assert np.allclose(alone.priors["devices"], predict.start_weights(1))


def test_chosen_networks_are_distinct_and_leave_less_doubt_than_random_ones(rows, sources):
    pool = rows[150:]
    chosen = transfer.choose(sources, pool, 12)
    assert len(set(chosen.tolist())) == 12
    assert np.array_equal(chosen[:5], transfer.choose(sources, pool, 5))
    blocks, weights = sources.blocks(pool)[1:3], sources.priors["structure"]

    def doubt(some):
        known = Process.fit([block[some] for block in blocks], np.zeros(len(some)), weights)
        return float(np.mean(known.predict(blocks)[1] ** 2))

    rng = np.random.default_rng(0)
    at_random = [doubt(rng.permutation(len(pool))[:12]) for _ in range(20)]
    assert doubt(chosen) < min(at_random)
    with pytest.raises(NasctlError, match="0 of 150 networks"):
        transfer.choose(sources, pool, 0)


@pytest.mark.parametrize("bad", [np.nan, 0.0, -1.0, np.inf])
def test_impossible_latencies_are_refused(rows, sources, bad):
    ms = additive_ms(rows[:20])
    ms[3] = bad
    for ask in (
        lambda: transfer.adapt(sources, rows[:20], ms),
        lambda: predict.fit(rows[:20], ms, np.random.default_rng(0)),
    ):
        with pytest.raises(NasctlError, match=r"of network 3.*positive milliseconds"):
            ask()


def test_too_few_and_misshapen_are_refused(rows, sources):
    ms = additive_ms(rows)
    rng = np.random.default_rng(0)
    with pytest.raises(NasctlError, match="4 measured networks are too few; allowed: at least 5"):
        transfer.adapt(sources, rows[:4], ms[:4])
    with pytest.raises(NasctlError, match="source x: 9 measured networks are too few"):
        transfer.source("x", "x", rows[:20], np.where(np.arange(20) < 9, ms[:20], np.nan), rng)
    with pytest.raises(NasctlError, match="no source devices"):
        transfer.learn([], rng)
    for ask in (predict.fit, lambda *given: transfer.source("x", "x", *given)):
        with pytest.raises(NasctlError, match="20 networks but 19 latencies"):
            ask(rows[:20], ms[:19], rng)
    with pytest.raises(NasctlError, match=rf"rows of shape \(20, 3\).*{WIDTH}"):
        transfer.adapt(sources, rows[:20, :3], ms[:20])
