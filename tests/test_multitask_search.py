"""The search of one supernet for many tasks: what it learns, shares, survives, and refuses."""

from __future__ import annotations

import copy
from dataclasses import replace

import numpy as np
import pytest
import torch

from nas import mixture, multitask_outcome, multitask_search
from nas.data.examples import Examples
from nas.errors import BudgetInfeasible, NasctlError
from nas.goals import UNLABELLED, box, classes
from nas.multitask import MultiTask
from nas.multitask_search import EVERY, Search, Shared, learn, space_for
from nas.multitask_training import Schedule
from nas.search import Limit, Problem
from nas.search_spaces import fbnetv5
from tests.sides import examples

SCHEDULE = Schedule(steps=8, batch=16, lr=0.05, seed=1)
GOALS = (classes("class", target="label", n_classes=2), box("box", target="box"))


def sides(train=None, goals=GOALS):
    return MultiTask("sides", goals, train or examples(80), examples(32, 1), examples(32, 2))


def problem(space, macs=None):
    def latency(genes):
        return np.zeros(len(genes)), np.zeros(len(genes))

    limits = () if macs is None else (Limit("macs", macs, lambda g: space.costs(g)[:, 0]),)
    return Problem(space, latency, lambda genes: (0.0, 0.0), limits=limits)


def search(task=None, budgets=None, schedule=SCHEDULE, samples=2):
    task = task or sides()
    space = space_for(task, 0.25)
    names = [goal.name for goal in task.goals]
    problems = {n: problem(space.only(n), (budgets or {}).get(n)) for n in names}
    return Search(space, task, schedule, problems, samples)


def ended(asked, **kinds):
    shared = Shared(asked)
    steps = list(learn(shared, asked, **kinds))
    return shared, steps


def same(one, two):
    a, b = one.state_dict(), two.state_dict()
    return all(torch.equal(a[name].nan_to_num(), b[name].nan_to_num()) for name in a)


@pytest.mark.slow
def test_both_tasks_are_learned_and_told_apart_from_constant_answers():
    asked = search(schedule=replace(SCHEDULE, steps=40))
    shared, steps = ended(asked)
    found = multitask_outcome.outcomes(shared, asked)
    assert found["class"].constant == pytest.approx(np.log(2), abs=1e-3)
    assert not any(each.collapsed for each in found.values())
    assert [s.step for s in steps if s.report] == list(range(asked.warm + 1, 41, EVERY))
    best = min(multitask_outcome.judged(shared, asked, "class"), key=lambda f: f.loss)
    assert best.score > 0.9


@pytest.mark.parametrize("stop", [3, *(pytest.param(at, marks=pytest.mark.slow) for at in (1, 7))])
def test_a_stopped_search_goes_on_bit_by_bit(stop, tmp_path):
    asked, path = search(), tmp_path / "state.safetensors"
    whole, _ = ended(asked)
    steps = learn(Shared(asked), asked, resume=path)
    for _ in range(stop):
        next(steps)
    steps.close()
    resumed = Shared(asked)
    rest = list(learn(resumed, asked, resume=path))
    assert rest[0].step == stop + 1
    assert same(whole, resumed)
    assert int(resumed.moves) == asked.plan.steps


def test_a_state_of_another_search_is_refused(tmp_path):
    path = tmp_path / "state.safetensors"
    ended(search(), resume=path)
    for other in (search(samples=3), search(sides(goals=GOALS[:1])), search(budgets={"box": 1e7})):
        with pytest.raises(NasctlError, match="another recipe"):
            next(learn(Shared(other), other, resume=path))


@pytest.mark.parametrize("tasks", [1, 2])
def test_the_backbone_runs_once_per_step_however_many_tasks(tasks, monkeypatch):
    asked, runs = search(sides(goals=GOALS[:tasks])), []
    real = fbnetv5.FBNetV5.backbone

    def counted(self, *arguments):
        runs.append(torch.is_grad_enabled())
        return real(self, *arguments)

    monkeypatch.setattr(fbnetv5.FBNetV5, "backbone", counted)
    ended(asked)
    assert runs.count(True) == SCHEDULE.steps
    assert runs.count(False) == asked.plan.steps * (asked.samples + 1)


@pytest.mark.slow
def test_a_tasks_scale_does_not_decide_what_is_learned():
    def times(goal, factor):
        return replace(goal, loss=lambda outputs, targets: factor * goal.loss(outputs, targets))

    one, two = (
        ended(search(sides(goals=(times(GOALS[0], factor), GOALS[1]))))[0] for factor in (1, 1024)
    )
    for a, b in zip(one.net.parameters(), two.net.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)
    assert float(two.level[0] / one.level[0]) == pytest.approx(1024, rel=1e-3)


def test_images_without_labels_are_left_out():
    train = examples(80)
    labels, boxes = train.targets["label"].clone(), train.targets["box"].clone()
    labels[torch.arange(80) % 4 > 0] = UNLABELLED
    boxes[:40] = torch.nan
    asked = search(sides(Examples(train.images, {"label": labels, "box": boxes})))
    shared, _ = ended(asked)
    found = multitask_outcome.outcomes(shared, asked)
    assert found["class"].labelled == 0.25 and found["box"].labelled == 0.5
    assert all(np.isfinite([each.loss, each.entropy]).all() for each in found.values())
    for move in range(3):  # a step of the distributions hears every task
        seen = asked.task.train.at(multitask_search._held_out(asked, move)).targets
        for goal in asked.task.goals:
            assert goal.labelled(seen).sum() >= min(multitask_search.LEAST, 4)


def test_a_task_without_any_label_is_named():
    train = examples(80)
    none = Examples(train.images, {**train.targets, "label": torch.full((80,), UNLABELLED)})
    with pytest.raises(NasctlError, match="task 'class': none of the 64 training images"):
        search(sides(none))


def test_a_task_without_a_label_to_choose_by_is_named():
    val = examples(32, 1)
    none = Examples(val.images, {**val.targets, "label": torch.full((32,), UNLABELLED)})
    with pytest.raises(NasctlError, match="task 'class': none of the 32 validation images"):
        search(replace(sides(), val=none))


def test_the_best_constant_answer_knows_all_classes_however_images_are_sorted():
    labels = torch.arange(2000) // 100
    goal = classes("class", target="label", n_classes=20)
    sorted_ = Examples(torch.zeros(2000, 1, 8, 8, dtype=torch.uint8), {"label": labels})
    task = MultiTask("sorted", (goal,), sorted_, sorted_, sorted_)
    assert multitask_outcome.constant_loss(task, goal) == pytest.approx(np.log(20), abs=1e-3)


def test_what_is_said_of_a_budget_is_of_the_task_that_has_one():
    space = space_for(sides(), 0.25).only("box")
    low, high = (float(space.costs(row[None])[0, 0]) for row in (space.smallest, space.largest))
    asked = search(budgets={"box": (low + high) / 2})
    shared, _ = ended(asked)
    found = multitask_outcome.outcomes(shared, asked)
    assert found["class"].expected is None and found["class"].inside is None
    assert low <= found["box"].expected <= high and 0 < found["box"].inside < 1


def test_a_task_that_learns_nothing_is_named():
    train = examples(80)
    generator = torch.Generator().manual_seed(0)
    noise = torch.randint(0, 2, (80,), generator=generator)
    asked = search(sides(Examples(train.images, {**train.targets, "label": noise})))
    shared = Shared(asked)
    shared.level[:] = torch.tensor([0.7, 0.2])
    found = multitask_outcome.outcomes(shared, asked)
    assert found["class"].collapsed and not found["box"].collapsed


def test_a_loss_that_is_no_number_names_its_task():
    goal = replace(GOALS[1], loss=lambda outputs, targets: outputs["box"].sum() * torch.inf)
    with pytest.raises(NasctlError, match=r"--lr: the loss of box is (nan|inf|-inf) at step 1"):
        ended(search(sides(goals=(GOALS[0], goal))))


def test_a_budget_that_nothing_meets_is_told_before_any_work():
    with pytest.raises(BudgetInfeasible, match="task 'box': no network fits 10 MACs: the smallest"):
        search(budgets={"box": 10.0})


def test_every_tasks_networks_are_inside_its_own_budget():
    space = space_for(sides(), 0.25).only("box")
    low, high = (float(space.costs(row[None])[0, 0]) for row in (space.smallest, space.largest))
    most = low + 0.3 * (high - low)
    asked = search(budgets={"box": most})
    shared, _ = ended(asked)
    rows = multitask_outcome.proposed(shared, asked, "box")
    assert len(rows) > 4 and (space.costs(rows)[:, 0] <= most).all()
    free = multitask_outcome.proposed(shared, asked, "class")
    assert (space.costs(free)[:, 0] > most).any()


@pytest.mark.slow
def test_a_tight_budget_moves_its_task_alone():
    """Where all networks are as good, the hinge alone says what to leave out."""

    def even(goal):
        return replace(goal, loss=lambda outputs, targets: outputs[goal.name].sum() * 0 + 1)

    space = space_for(sides(), 0.25).only("box")
    most = 1.02 * float(space.costs(space.smallest[None])[0, 0])
    task, schedule = sides(goals=tuple(map(even, GOALS))), replace(SCHEDULE, steps=32)
    shared, _ = ended(search(task, {"box": most}, schedule, samples=8))
    free, tight = shared.state.policies.probs[:, :, 1].mean(1)
    assert tight < free - 0.1


def test_one_task_alone_weighs_every_network_as_it_is():
    asked = search(sides(goals=GOALS[:1]))
    shared, _ = ended(asked)
    policies = shared.state.policies
    rows = mixture.draw(policies, np.random.default_rng(0), 8)
    np.testing.assert_allclose(mixture.weights(policies, rows), 1.0)


def test_a_tasks_network_does_what_the_supernet_does_for_it():
    asked = search()
    shared, _ = ended(asked)
    row = asked.space.sample(np.random.default_rng(0), 1)[0]
    before = copy.deepcopy(shared.state_dict())
    net = multitask_outcome.child(shared, asked, ("box",), row)
    images = asked.task.normalise(asked.task.val.images[:8])
    shared.train(), net.train()
    with torch.no_grad():
        wanted = shared.net(images, asked.space.decode(row))["box"]
        torch.testing.assert_close(net(images), wanted, rtol=0, atol=1e-5)
    assert before.keys() == shared.state_dict().keys()


def test_goals_that_say_nothing_of_their_head_and_odd_images_are_told():
    plain = classes("class", target="label")
    with pytest.raises(NasctlError, match="task 'class': says nothing of the head.*n_classes=20"):
        space_for(sides(goals=(plain,)))
    task = sides()
    cut = {n: Examples(s.images[..., :7], s.targets) for n, s in task.splits.items()}
    with pytest.raises(NasctlError, match="--size: images of 8 x 7.*multiples of 8"):
        space_for(replace(task, **cut))
