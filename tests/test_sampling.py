from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from nas import sampling, supernet
from nas import space as spaces
from nas.recipe import Recipe
from nas.sampling import BINS, Contest, cost_bins, sandwich

SPACE = spaces.load("resnet", channels=1, classes=4, size=8)
BIN_OF = cost_bins(SPACE)
RECIPE = Recipe(steps=10, n_random=3)
BEST = replace(RECIPE, policy="bestup")


def recorded(recipe, steps=range(20)):
    """The rows that a predictor is shown, one group per contest."""
    groups = []

    def predict(rows):
        groups.append(rows)
        return BIN_OF(rows) * 1.0

    archs = sandwich(SPACE, recipe, predict)
    found = [archs(step) for step in steps]
    return groups, found


def test_bins_cover_the_space_from_the_smallest_to_the_largest():
    rows = SPACE.sample(np.random.default_rng(0), 3000)
    assert BIN_OF(SPACE.smallest[None]) == 0 and BIN_OF(SPACE.largest[None]) == BINS - 1
    assert len(np.unique(BIN_OF(rows))) > BINS / 2


@pytest.mark.parametrize("candidates", [2, 5])
def test_candidates_cost_the_same_and_are_no_more_than_asked_for(candidates):
    groups, _ = recorded(replace(BEST, candidates=candidates), range(100))
    for rows in groups:
        assert 2 <= len(rows) <= candidates
        assert len(set(BIN_OF(rows).tolist())) == 1


def test_nearly_every_place_gets_all_its_candidates():
    groups, found = recorded(BEST, range(200))
    full = sum(len(rows) == 3 for rows in groups)
    assert full > 0.95 * 3 * len(found)


def test_one_candidate_is_uniform_sampling():
    for policy in ("bestup", "worstup"):
        one = sandwich(SPACE, replace(RECIPE, policy=policy, candidates=1))
        uniform = sandwich(SPACE, RECIPE)
        assert [one(step) for step in range(30)] == [uniform(step) for step in range(30)]


def test_given_the_cost_candidates_are_drawn_uniformly():
    """Against rejection sampling from the space in the fullest bin."""
    groups, _ = recorded(replace(BEST, candidates=4), range(1000))
    ours = np.concatenate(groups)
    plain = SPACE.sample(np.random.default_rng(1), len(ours))
    fullest = np.bincount(BIN_OF(plain)).argmax()
    ours, plain = (rows[BIN_OF(rows) == fullest] for rows in (ours, plain))
    gap = np.abs(SPACE.encode(ours).mean(0) - SPACE.encode(plain).mean(0))
    assert len(ours) > 1000 and gap.max() < 0.06
    # and bins occur as often as under uniform sampling
    first = np.stack([rows[0] for rows in groups])
    share = np.bincount(BIN_OF(first), minlength=BINS) / len(first)
    rows = SPACE.sample(np.random.default_rng(2), 20_000)
    wanted = np.bincount(BIN_OF(rows), minlength=BINS) / len(rows)
    assert np.abs(share - wanted).max() < 0.03


@pytest.mark.parametrize(("policy", "picks"), [("bestup", np.argmin), ("worstup", np.argmax)])
def test_a_predictor_decides_before_the_step(policy, picks):
    def predict(rows):
        return rows @ np.arange(rows.shape[1], dtype=float)

    shown = []

    def spy(rows):
        shown.append(rows)
        return predict(rows)

    found = sandwich(SPACE, replace(BEST, policy=policy), spy)(3)
    assert found[:2] == [SPACE.decode(SPACE.largest), SPACE.decode(SPACE.smallest)]
    assert found[2:] == [SPACE.decode(rows[picks(predict(rows))]) for rows in shown]


def test_without_a_predictor_the_step_decides():
    for policy in ("bestup", "worstup"):
        found = sandwich(SPACE, replace(RECIPE, policy=policy))
        contests = found(0)[2:]
        assert len(contests) == 3 and found(0) == found(0) and found(0)[2:] != found(1)[2:]
        for contest in contests:
            assert isinstance(contest, Contest) and contest.worst == (policy == "worstup")


class Rated(nn.Module):
    """Networks whose logits are right, or wrong, with certainty `arch.sure`."""

    def __init__(self, task):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))
        self.answers = {}
        self.ran = []
        for image, label in zip(task.train.images, task.train.labels, strict=True):
            self.answers[float(image.sum())] = int(label)
        self.task = task

    def forward(self, x, arch):
        self.ran.append((arch, torch.is_grad_enabled()))
        scale = self.task.std[0] * 255
        raw = x * scale + self.task.mean[0] * 255
        sums = raw.sum((1, 2, 3)).round().tolist()
        labels = torch.tensor([self.answers[s] for s in sums])
        return arch.sure * nn.functional.one_hot(labels, 4).float() + self.weight


@pytest.mark.parametrize("worst", [False, True])
def test_a_contest_trains_the_winner_alone(worst, tiny):
    archs = [SimpleNamespace(resolution=8, sure=sure) for sure in (1.0, 5.0, -3.0)]
    net = Rated(tiny)
    entries = [archs[0], Contest(tuple(archs), worst)]
    recipe = Recipe(steps=1, batch=16)
    step = next(supernet.train(net, lambda step: entries, tiny, recipe))
    assert len(step.losses) == 2
    trained = [arch for arch, gradients in net.ran if gradients]
    assert trained == [archs[0], archs[2] if worst else archs[1]]
    assert [arch for arch, gradients in net.ran if not gradients] == archs


def test_predicting_costs_no_draws_of_the_global_generators():
    before = np.random.get_state()[2]
    sandwich(SPACE, BEST)(5)
    assert np.random.get_state()[2] == before


def test_alone_runs_the_network_itself():
    net = SimpleNamespace(arch="its own")
    assert sampling.alone(net)(7) == ["its own"]
