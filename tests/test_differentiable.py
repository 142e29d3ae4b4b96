"""Distributions over operators: gradients against autograd, latency against sums, resuming."""

from __future__ import annotations

import choices
import numpy as np
import pytest
import torch
from torch import nn

from hw_profiles import device, latency
from nas import differentiable, strategies
from nas import space as spaces
from nas.differentiable import gumbel, proxyless, reinforce
from nas.differentiable.learning import Goal, Searched, Turn, learn
from nas.differentiable.policy import Latency, Policy, latency_of
from nas.errors import NasctlError
from nas.gradients import Course
from nas.recipe import Recipe
from nas.tasks import Split, Task

METHODS = {"gumbel": gumbel, "proxyless": proxyless, "reinforce": reinforce}
every_method = pytest.mark.parametrize("name", METHODS)
every_space = pytest.mark.parametrize("name", ["choices", "fbnet", "nasbench201"])


def load(name="choices"):
    return (
        spaces.load(name, channels=1, classes=4, size=8, width=0.25)
        if name != "choices"
        else (choices.Space())
    )


def estimates(space, name="choices"):
    return latency_of(space, name, latency.table(device.load("jetson")))


def searched(space, seed=0):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return Searched(space.supernet(), space)


def turn(space, whole, budget_ms=None, seed=0):
    """In double precision, so that only real differences show."""
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(6, 1, 8, 8, generator=generator, dtype=torch.float64)
    labels = torch.arange(6) % 4
    table = estimates(space)
    budget = budget_ms or float(table.of(space.largest[None])[0])
    net = whole.net.double().train()
    return Turn(
        net,
        whole.policy,
        space,
        Goal(table, budget),
        images,
        lambda logits: nn.functional.cross_entropy(logits, labels),
        0.5,
        generator,
    )


def test_every_file_is_a_strategy():
    assert differentiable.names() == sorted(METHODS)
    for name, module in METHODS.items():
        assert strategies.learns(name) and strategies.load(name) is module.propose
    assert not strategies.learns("random")


# ---- latency -------------------------------------------------------------------------------------


@every_space
def test_latency_of_a_row_is_what_the_table_says_of_its_network(name):
    space = load(name)
    table = latency.table(device.load("jetson"))
    rows = space.sample(np.random.default_rng(0), 5)
    found = estimates(space, name).of(rows)
    said = [table.estimate(space.ops(space.decode(row)), name).high_ms for row in rows]
    np.testing.assert_allclose(found, said, rtol=1e-9)


@every_space
def test_expected_latency_is_the_mean_of_draws_and_exact_where_one_option_is_certain(name):
    space = load(name)
    table, rng = estimates(space, name), np.random.default_rng(0)
    logits = torch.from_numpy(rng.normal(size=(len(space.genes), int(space.sizes.max()))))
    probs = logits.softmax(1)
    drawn = torch.multinomial(probs, 4000, replacement=True).T.numpy()
    found = table.of(drawn)
    error = found.std() / np.sqrt(len(found))
    assert abs(float(table.expected(probs)) - found.mean()) < 4 * error
    row = space.sample(rng, 1)[0]
    certain = nn.functional.one_hot(torch.from_numpy(row), probs.shape[1]).double()
    assert float(table.expected(certain)) == pytest.approx(table.of(row[None])[0])


def test_the_gradient_of_expected_latency_is_that_of_finite_differences():
    """Of parts that read one gene and of one that reads two together."""
    pair = ([0, 2], np.array([3, 1]), np.random.default_rng(0).random((9, 1)))
    single = ([1], np.array([1]), np.array([[1.0], [2.0], [5.0]]))
    table = Latency(0.5, [pair, single], np.array([3, 3, 3]))
    rows = np.array([[0, 1, 2], [2, 2, 0]])
    expected = [0.5 + pair[2][2, 0] + 2, 0.5 + pair[2][6, 0] + 5]
    np.testing.assert_allclose(table.of(rows), expected)
    logits = torch.randn(3, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: table.expected(x.softmax(1)), logits)


def test_a_table_that_lacks_an_operator_is_refused():
    with pytest.raises(NasctlError, match="latency table: an operator without a latency"):
        Latency(0.0, [([0], np.array([1]), np.array([1.0, np.nan]))], np.array([2]))


def test_inside_the_budget_latency_counts_for_nothing():
    goal = Goal(estimates(load()), 2.0)
    loss = torch.tensor(1.0)
    assert goal.objective(loss, torch.tensor(1.9)) == 1
    assert goal.objective(loss, torch.tensor(4.0)) > goal.objective(loss, torch.tensor(3.0)) > 1


# ---- the methods ---------------------------------------------------------------------------------


@every_space
def test_gates_have_the_gradient_of_a_full_mixture_at_the_active_path(name):
    """In double precision to 1e-8, though only one path has a graph."""
    space = load(name)
    whole = searched(space)
    now = turn(space, whole)
    sizes = torch.from_numpy(space.sizes)
    row = torch.from_numpy(space.sample(np.random.default_rng(3), 1)[0])
    compared = torch.arange(int(sizes.max())).expand(len(sizes), -1)
    gates = proxyless.Gates(row, compared, compared.shape[1])
    loss = now.loss(now.net(now.images, blend=gates))
    torch.autograd.grad(loss, gates.first)
    open_ = nn.functional.one_hot(row, compared.shape[1]).double().requires_grad_()
    mixed = now.loss(now.net(now.images, blend=gumbel.mixture(open_)))
    (truth,) = torch.autograd.grad(mixed, open_)
    assert float(loss.detach()) == pytest.approx(float(mixed.detach()), abs=1e-12)
    assert truth.abs().max() > 1e-3
    torch.testing.assert_close(gates.gradient, truth, rtol=1e-8, atol=1e-10)


def test_the_softmax_formula_is_autograds():
    logits = torch.randn(4, 5, dtype=torch.float64, requires_grad=True)
    gates = torch.randn(4, 5, dtype=torch.float64)
    (truth,) = torch.autograd.grad((logits.softmax(1) * gates).sum(), logits)
    found = proxyless.through_softmax(gates, logits.detach().softmax(1))
    torch.testing.assert_close(found, truth)


def test_a_comparison_moves_two_candidates_and_keeps_their_share():
    space = load()
    whole = searched(space)
    now = turn(space, whole, budget_ms=1e-3)
    before = whole.policy.probs.clone()
    proxyless.architecture(now)
    after = whole.policy.probs
    moved = (after - before).abs() > 1e-9
    assert (moved.sum(1) == 2).all()
    torch.testing.assert_close((after * moved).sum(1), (before * moved).sum(1))


def test_a_cold_mixture_is_its_likeliest_path():
    space = load()
    now = turn(space, searched(space))
    generator = torch.Generator().manual_seed(5)
    hard = gumbel.sample(now.policy.logits, 1e-4, generator)
    torch.testing.assert_close(hard.max(1).values, torch.ones(3, dtype=torch.float64))
    with torch.no_grad():
        mixed = now.net(now.images, blend=gumbel.mixture(hard))
        path = now.net(now.images, space.decode(hard.argmax(1).numpy()))
    torch.testing.assert_close(mixed, path)


def test_gumbel_draws_follow_the_distribution():
    logits = torch.tensor([[0.0, 1.0, -torch.inf]], dtype=torch.float64)
    generator = torch.Generator().manual_seed(0)
    picks = [int(gumbel.sample(logits, 0.1, generator).argmax()) for _ in range(2000)]
    share = np.bincount(picks, minlength=3) / 2000
    np.testing.assert_allclose(share, logits.softmax(1)[0], atol=0.04)


@pytest.mark.parametrize("name", ["proxyless", "reinforce"])
def test_a_step_of_the_weights_touches_one_path(name):
    space = load()
    whole = searched(space)
    now = turn(space, whole)
    METHODS[name].weights(now)
    again = torch.Generator().manual_seed(0)
    torch.randn(6, 1, 8, 8, generator=again, dtype=torch.float64)
    arch = space.decode(whole.policy.draw(again))
    held = set(dict(space.build(arch).named_parameters()))
    touched = {key for key, p in whole.net.named_parameters() if p.grad is not None}
    assert touched == held


@every_method
def test_a_budget_that_only_skips_meet_pulls_latency_down(name):
    space = load()
    whole = searched(space)
    least = float(estimates(space).of(space.smallest[None])[0])
    expected = []
    for step in range(12):
        now = turn(space, whole, budget_ms=least / 4, seed=step)
        METHODS[name].architecture(now)
        expected.append(float(now.goal.latency.expected(whole.policy.probs)))
    assert expected[-1] < expected[0]


# ---- the search ----------------------------------------------------------------------------------


def steps(space, task, method, whole, path=None, save_every_s=1e9, count=6):
    goal = Goal(estimates(space), 1.0)
    recipe = Recipe(steps=count, batch=16, lr=0.05)
    course = Course(task, recipe)
    return learn(whole, course, method=method, goal=goal, resume=path, save_every_s=save_every_s)


@every_method
def test_killed_anywhere_it_goes_on_to_the_same_result(name, tiny, tmp_path):
    space, method = load(), METHODS[name]
    straight = searched(space)
    said = list(steps(space, tiny, method, straight))
    assert [each.step for each in said] == list(range(1, 7))
    stopped = steps(space, tiny, method, searched(space), tmp_path / "state")
    for _ in range(3):
        next(stopped)
    stopped.close()
    resumed = searched(space, seed=9)
    rest = list(steps(space, tiny, method, resumed, tmp_path / "state"))
    assert [each.step for each in rest] == [4, 5, 6]
    for key, tensor in straight.state_dict().items():
        assert torch.equal(resumed.state_dict()[key], tensor), key
    assert not torch.equal(straight.policy.logits, Policy(space.sizes).logits)


def textures(n, seed):
    """Stripes and boards of one brightness: nothing that is linear tells them apart once pooled."""
    generator = torch.Generator().manual_seed(seed)
    row, column = torch.meshgrid(torch.arange(8), torch.arange(8), indexing="ij")
    kinds = (row % 2, column % 2, (row + column) % 2, (row // 2 + column // 2) % 2)
    labels = torch.randint(4, (n,), generator=generator)
    noise = torch.randint(0, 120, (n, 1, 8, 8), generator=generator)
    images = 80 * torch.stack([kinds[label] for label in labels.tolist()])[:, None] + noise
    return Split(images.to(torch.uint8), labels)


@pytest.mark.slow
@every_method
def test_the_distribution_finds_the_operators_that_the_task_needs(name):
    task = Task(
        "textures", ("r", "c", "b", "w"), textures(400, 0), textures(64, 1), textures(64, 2)
    )
    space = load()
    whole = searched(space)
    recipe = Recipe(steps=150, batch=32, lr=0.1)
    goal = Goal(estimates(space), 10.0)
    *_, last = learn(whole, Course(task, recipe), method=METHODS[name], goal=goal)
    skip, one, three = whole.policy.probs[-1].tolist()
    assert three > 0.6 and skip < 0.2 and last.entropy < 0.9


def test_another_searchs_state_is_refused(tiny, tmp_path):
    space = load()
    first = steps(space, tiny, reinforce, searched(space), tmp_path / "state")
    next(first)
    first.close()
    with pytest.raises(NasctlError, match="another recipe"):
        next(steps(space, tiny, proxyless, searched(space), tmp_path / "state"))


def test_a_space_of_sizes_has_no_distribution_over_operators():
    space = spaces.load("resnet", channels=1, size=8, width=0.25)
    with pytest.raises(NasctlError, match="--space: this space chooses sizes.*fbnet"):
        Searched(space.supernet(), space)
