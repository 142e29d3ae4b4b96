"""Part `real` of the FBNetV5 benchmark: every method inside the budgets, rows that go on."""

from __future__ import annotations

import numpy as np
import pytest

from benchmarks import contract, fbnetv5_real
from benchmarks.fbnetv5_experiment import Experiment, Setting, own_training, random_one
from nas.multitask_training import Schedule

FEW = Schedule(steps=2, batch=16, lr=0.05)


@pytest.fixture
def experiment(tmp_path):
    setting = Setting("digits", 8, 0.25, FEW, FEW)
    rows = contract.Rows(tmp_path / "rows.jsonl")
    return Experiment(setting, fbnetv5_real.digits(), 0, rows, tmp_path)


def test_random_networks_are_inside_every_tasks_budget(experiment):
    rows = experiment.random(experiment.names, 12)
    assert len(rows) == 12
    for name in experiment.names:
        assert (experiment.of[name].costs(rows)[:, 0] <= experiment.budget(name)).all()
    every = experiment.space.sample(np.random.default_rng(0), 200)
    assert len(experiment.inside(every, experiment.names)) < 200


def test_a_row_is_trained_once_and_shared_by_methods_that_chose_alike(experiment):
    genes = random_one(experiment)["odd"]
    first = own_training(experiment, "odd", genes)
    before = experiment.rows.path.read_text()
    again = Experiment(
        experiment.setting,
        experiment.task,
        0,
        contract.Rows(experiment.rows.path),
        experiment.folder,
    )
    assert own_training(again, "odd", genes) == first
    assert experiment.rows.path.read_text() == before
    assert 0 <= first["test"] <= 1 and first["macs"] <= experiment.budget("odd")
