"""The supernet benchmark compares what it says it compares."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from benchmarks import contract, supernet_step
from benchmarks import supernet as benchmark
from benchmarks.supernet_training import Experiment, across, alone, in_bands, inside
from nas import space, supernet
from nas.recipe import Recipe
from nas.search_spaces import resnet


@pytest.fixture
def experiment(tiny, tmp_path):
    found = space.load("resnet", channels=1, classes=4, size=8, width=0.25)
    rows = contract.Rows(tmp_path / "rows.jsonl")
    return Experiment(tiny, found, 6, 32, 0, rows, tmp_path, {"data": "tiny"})


def test_the_set_active_network_is_the_same_network():
    found = resnet.Space(size=16)
    archs = [found.decode(row) for row in (found.largest, found.smallest)]
    ours = found.build(archs[0]).train()
    theirs = supernet_step.ActiveResNet(archs[0]).train()
    theirs.load_state_dict(ours.state_dict())
    x = torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    for arch in (*archs, archs[0]):
        theirs.set_active(arch)
        torch.testing.assert_close(theirs(x), ours(x, arch), rtol=1e-5, atol=1e-5)


def test_inside_and_extracted_agree(experiment):
    net, found = experiment.supernet(), experiment.space
    calibration = supernet.calibration_images(experiment.task)
    images = experiment.task.normalise(experiment.task.val.images)
    for genes in across(experiment, 3):
        with torch.no_grad():
            within = inside(net, found.decode(genes), calibration)(images)
            out = experiment.child(net, genes)(images)
        torch.testing.assert_close(within, out, rtol=1e-4, atol=1e-4)


def test_networks_ascend_and_bands_are_narrow(experiment):
    macs = [experiment.macs(genes) for genes in across(experiment, 5)]
    assert macs == sorted(set(macs))
    for band in in_bands(experiment, 2, 6):
        costs = np.array([experiment.macs(genes) for genes in band], float)
        assert len(band) >= 3 and costs.max() / costs.min() <= 1.1 / 0.9
        assert len({tuple(genes) for genes in band}) == len(band)


def test_same_compute_shares_the_supernets_out(experiment):
    """All networks of a table alone cost what the supernet's training cost."""
    long, networks = 10_000, across(experiment, 5)
    experiment = Experiment(**{**vars(experiment), "steps": long})
    spent = [benchmark.same_compute(experiment, g, 5) * experiment.macs(g) for g in networks]
    np.testing.assert_allclose(spent, spent[0], rtol=0.01)
    pool = experiment.space.sample(np.random.default_rng(3), 500)
    middle = np.mean([experiment.macs(row) for row in pool])
    step = experiment.macs(networks[0]) + experiment.macs(networks[-1]) + 2 * middle
    assert sum(spent) == pytest.approx(long * step, rel=0.05)


def test_a_row_goes_on_in_the_middle_of_its_training(experiment, tmp_path):
    genes, recipe = experiment.space.smallest, Recipe(steps=6, batch=32)
    whole = alone(experiment, genes, recipe, tmp_path / "whole", None)

    def killed(state):
        net = experiment.build(genes)
        steps = supernet.train(
            net, supernet.alone(net), experiment.task, recipe, resume=state, save_every_s=0.0
        )
        for _ in range(3):
            next(steps)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        experiment.row({"network": 0}, killed)
    assert list(tmp_path.glob("*.safetensors")) and not experiment.rows.done
    found = []

    def work(state):
        found.append(alone(experiment, genes, recipe, state, None))
        return {"score": 1.0}

    assert experiment.row({"network": 0}, work)["score"] == 1.0
    assert experiment.row({"network": 0}, work)["score"] == 1.0 and len(found) == 1
    assert torch.equal(found[0].head.weight, whole.head.weight)
    assert not list(tmp_path.glob("*.safetensors"))


@pytest.mark.slow
def test_every_part_runs(capsys):
    assert benchmark.main(["--quick"]) == 0
    record = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert record["benchmark"] == "supernet"
    assert set(record["aims"]) == {"step_resnet_16px", "children", "largest", "extraction"}
    assert record["aims"]["extraction"]["met"]
    assert {"tau_supernet", "ablation_bestup", "child_minus_alone"} <= set(record["figures"])
