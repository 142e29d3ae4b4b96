"""hw_profiles.models.fewshot: tables of two pretended devices help to make a third one's."""

from __future__ import annotations

import numpy as np
import pytest

from hw_profiles import chains, device, op
from hw_profiles.latency import LatencyTable
from hw_profiles.models import calibrate, fewshot, transfer
from hw_profiles.models.structure import describe

DEVICES = {"a": (0.02, 6.0, 1.0), "b": (0.10, 2.0, 0.5), "new": (0.06, 9.0, 1.5)}
KINDS = {"conv": 1.0, "dwconv": 3.0, "linear": 1.0}


def ms(ops, name, rng=None):
    """Milliseconds: so much an operator, a GMAC (depthwise ones cost three times) and a MB."""
    each, gmac, mb = DEVICES[name]
    gmacs = sum(KINDS.get(one.kind, 0.0) * one.macs for one in ops) * 1e-9
    total = 0.2 + each * len(ops) + gmac * gmacs + mb * sum(one.bytes() for one in ops) * 1e-6
    return total if rng is None else total * float(np.exp(0.01 * rng.standard_normal()))


@pytest.fixture(scope="module")
def networks():
    return chains.sample(np.random.default_rng(0), 150)


@pytest.fixture(scope="module")
def known(networks):
    board = device.load("jetson-tx2").model_copy(update={"peak_gmacs_per_s": {}})
    tables = []
    for name in ("a", "b"):
        samples = [(ops, ms(ops, name)) for ops in networks[:80]]
        fitted = calibrate.fit(samples, board, space="s", source_text="made up")
        tables.append(fitted.model_copy(update={"device": name}))
    return fewshot.sources(tables, networks[:110], "s", np.random.default_rng(1))


def test_few_measurements_and_others_tables_make_a_table(networks, known):
    board, rng = device.load("jetson-tx2"), np.random.default_rng(2)
    board = board.model_copy(update={"peak_gmacs_per_s": {}, "bandwidth_gb_per_s": None})
    pool, unseen = networks[:110], networks[110:]
    chosen = transfer.choose(known, describe(pool), 12)
    samples = [(pool[at], ms(pool[at], "new", rng)) for at in chosen]
    table = fewshot.fitter(known, pool)(samples, [], board, "s")
    true = np.array([ms(ops, "new") for ops in unseen])
    estimates = [table.estimate(ops, "s") for ops in unseen]
    off = np.abs(np.array([one.value_ms for one in estimates]) / true - 1)
    alone = calibrate.fit(samples, board, space="s", source_text="")
    off_alone = np.abs([alone.estimate(ops, "s").value_ms for ops in unseen] / true - 1)
    macs = np.array([op.macs(ops) for ops in unseen])
    off_macs = np.abs(np.median(true / macs) * macs / true - 1)
    assert off.mean() < 0.05
    assert off.mean() < off_macs.mean() / 2
    assert off.mean() < 1.2 * off_alone.mean()
    inside = [one.low_ms <= t <= one.high_ms for one, t in zip(estimates, true, strict=True)]
    assert np.mean(inside) > 0.75


def test_the_table_says_whose_help_it_had(networks, known, tmp_path):
    board = device.load("jetson-tx2")
    samples = [(ops, ms(ops, "new")) for ops in networks[:10]]
    table = fewshot.fitter(known, networks[:60])(samples, [], board, "s")
    assert table.origin == "few-shot, with the tables of a, b"
    assert "10 measurements" in table.intervals["same"].how
    assert table.intervals["same"].n == 10
    assert table.fitted_on == ("s",)
    table.save(tmp_path / "t.json")
    assert LatencyTable.load(tmp_path / "t.json").estimate(networks[0], "s") == table.estimate(
        networks[0], "s"
    )
