"""What a recipe can switch on: regularisation, teachers, averages, precision; memory that ends."""

from __future__ import annotations

import copy
import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from nas import distillation, supernet
from nas import space as spaces
from nas.distillation import Lesson
from nas.elastic import Noise
from nas.errors import NasctlError
from nas.recipe import Recipe

SPACE = spaces.load("resnet", channels=1, classes=4, size=8, width=0.25)
LARGEST, SMALLEST = SPACE.decode(SPACE.largest), SPACE.decode(SPACE.smallest)
RECIPE = Recipe(steps=4, batch=16, lr=0.1)


def fresh(seed=0):
    torch.manual_seed(seed)
    return SPACE.build(LARGEST)


def trained(task, recipe=RECIPE, archs=None, net=None, **options):
    net = net or fresh()
    archs = archs or supernet.sandwich(SPACE, recipe)
    steps = list(supernet.train(net, archs, task, recipe, **options))
    return net, steps


def same_weights(a, b):
    theirs = b.state_dict()
    return all(torch.equal(tensor, theirs[name]) for name, tensor in a.state_dict().items())


# ---- distillation --------------------------------------------------------------------------------


def lesson(task, recipe=RECIPE, taught=None):
    return Lesson(task, recipe, torch.tensor([0, 1, 2, 3]), taught)


LOGITS = torch.randn(2, 4, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def test_a_child_equal_to_its_teacher_has_the_loss_of_its_entropy(tiny):
    p = LOGITS[0].softmax(1)
    entropy = -(p * p.log()).sum(1).mean()
    kl = lesson(tiny, replace(RECIPE, loss="kl")).loss(LOGITS[0], LOGITS[0])
    assert torch.isclose(kl, entropy)
    alpha = lesson(tiny, replace(RECIPE, loss="alpha")).loss(LOGITS[0], LOGITS[0])
    assert alpha.item() == pytest.approx(0, abs=1e-12)


def test_without_distillation_children_learn_from_labels(tiny):
    found = lesson(tiny, replace(RECIPE, loss="labels"))
    hard = F.cross_entropy(LOGITS[0], found.labels, label_smoothing=0.1)
    assert found.loss(LOGITS[0], LOGITS[1]) == hard == found.loss(LOGITS[0], None)


def test_mixed_takes_labels_and_the_largest_in_equal_parts(tiny):
    parts = [lesson(tiny, replace(RECIPE, loss=name)) for name in ("labels", "kl", "mixed")]
    hard, soft, mixed = (part.loss(LOGITS[0], LOGITS[1]) for part in parts)
    assert torch.isclose(mixed, (hard + soft) / 2)
    assert parts[2].loss(LOGITS[0], None) == hard


def test_with_a_frozen_teacher_labels_and_teacher_count_the_same(tiny):
    found = lesson(tiny, taught=LOGITS[1])
    hard = F.cross_entropy(LOGITS[0], found.labels, label_smoothing=0.1)
    soft = F.cross_entropy(LOGITS[0], LOGITS[1].softmax(1))
    for largest in (None, LOGITS[0]):
        assert torch.isclose(found.loss(LOGITS[0], largest), (hard + soft) / 2)


def test_the_first_of_a_step_teaches_even_where_all_are_the_largest(tiny, monkeypatch):
    """With every place the largest and no noise, the children's loss is the teacher's entropy."""
    recipe = replace(RECIPE, steps=1, loss="kl")
    _, steps = trained(tiny, recipe, lambda step: [LARGEST] * 3)
    seen = []
    soft = distillation.Lesson._soft
    monkeypatch.setattr(
        distillation.Lesson,
        "_soft",
        lambda self, logits, target: seen.append((logits, target)) or soft(self, logits, target),
    )
    trained(tiny, recipe, lambda step: [LARGEST] * 3)
    assert len(seen) == 2
    for logits, target in seen:
        assert torch.equal(logits, target) and logits.requires_grad and not target.requires_grad
        entropy = -(target.softmax(1) * target.log_softmax(1)).sum(1).mean()
        assert steps[0].losses[1] == pytest.approx(float(entropy), rel=1e-6)


@pytest.mark.parametrize("loss", ["kl", "alpha", "labels"])
def test_every_loss_trains(loss, tiny):
    _, steps = trained(tiny, Recipe(steps=15, batch=16, loss=loss))
    assert steps[-1].losses[0] < 0.7 * steps[0].losses[0]


# ---- regularisation ------------------------------------------------------------------------------


def noise(dropout=0.0, drop_connect=0.0, seed=0):
    return Noise(dropout, drop_connect, torch.Generator().manual_seed(seed))


def test_dropout_keeps_the_mean_and_drops_its_share():
    x = torch.ones(400, 50)
    dropped = noise(dropout=0.3).features(x)
    torch.testing.assert_close(dropped.unique(), torch.tensor([0.0, 1 / 0.7]))
    assert (dropped == 0).float().mean() == pytest.approx(0.3, abs=0.02)


def test_drop_connect_takes_whole_images_and_more_of_them_in_depth():
    x = torch.ones(2000, 3, 2, 2)
    for depth in (0.25, 1.0):
        kept = noise(drop_connect=0.4).branch(x, depth)
        images = kept.flatten(1)
        assert (images == images[:, :1]).all()
        assert (images[:, 0] == 0).float().mean() == pytest.approx(0.4 * depth, abs=0.04)


def test_only_the_largest_is_regularised(tiny, monkeypatch):
    """Whatever the passes before: noise is an argument, so nothing is there to restore."""
    seen = []
    forward = type(fresh()).forward

    def spy(self, x, arch=None, noise=None):
        seen.append((arch, noise))
        return forward(self, x, arch, noise)

    monkeypatch.setattr(type(fresh()), "forward", spy)
    trained(tiny, replace(RECIPE, dropout=0.5, drop_connect=0.3, steps=2))
    assert len(seen) == 8
    for at, (arch, given) in enumerate(seen):
        assert (given is not None) == (at % 4 == 0) == (arch == LARGEST)
        assert given is None or (given.dropout, given.drop_connect) == (0.5, 0.3)


def test_noise_is_a_function_of_seed_and_step_and_no_noise_is_none(tiny):
    noisy = replace(RECIPE, dropout=0.5, drop_connect=0.5)
    (a, _), (b, _), (c, _) = trained(tiny, noisy), trained(tiny, noisy), trained(tiny)
    assert same_weights(a, b) and not same_weights(a, c)
    x = torch.randn(4, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    net = fresh()
    nn.init.ones_(net.stages[0][0].norm2.weight)
    assert torch.equal(net(x, LARGEST, noise()), net(x, LARGEST))
    assert not torch.equal(net(x, LARGEST, noise(0.5)), net(x, LARGEST))
    assert not torch.equal(net(x, LARGEST, noise(0.0, 0.9)), net(x, LARGEST))


# ---- augmentation, average, precision ------------------------------------------------------------


@pytest.mark.parametrize("change", [{"operations": 2}, {"cutout": 0.5}], ids=["ops", "cutout"])
def test_augmentation_is_switched_by_the_recipe(change, tiny):
    recipe = replace(RECIPE, **change)
    (a, _), (b, _), (c, _) = trained(tiny, recipe), trained(tiny, recipe), trained(tiny)
    assert same_weights(a, b) and not same_weights(a, c)


def test_the_average_of_the_weights_by_hand(tiny):
    """Momentum and data see the plain weights; only the end result is the average."""
    plain, average = [], None
    net = fresh()
    for at, _ in enumerate(trainer(net, tiny, RECIPE)):
        plain.append(net.head.weight.detach().clone())
        decay = min(0.8, (1 + at) / (10 + at))
        average = plain[-1] if average is None else decay * average + (1 - decay) * plain[-1]
    averaged, _ = trained(tiny, replace(RECIPE, ema=0.8))
    torch.testing.assert_close(averaged.head.weight.detach(), average)
    assert not torch.allclose(average, plain[-1])


def trainer(net, task, recipe, **options):
    return supernet.train(net, supernet.sandwich(SPACE, recipe), task, recipe, **options)


@pytest.mark.parametrize("stop", [2, 4])
def test_an_average_survives_a_stop(stop, tiny, tmp_path):
    recipe = replace(RECIPE, ema=0.8, dropout=0.2, operations=1, policy="bestup")
    whole, _ = trained(tiny, recipe)
    steps = trainer(fresh(), tiny, recipe, resume=tmp_path / "state")
    for _ in range(stop):
        next(steps)
    steps.close()
    net = fresh(seed=5)
    list(trainer(net, tiny, recipe, resume=tmp_path / "state"))
    assert same_weights(net, whole)


def test_bfloat16_trains_and_keeps_full_weights(tiny):
    net, steps = trained(tiny, Recipe(steps=8, batch=16, lr=0.1, bf16=True))
    full, wanted = trained(tiny, Recipe(steps=8, batch=16, lr=0.1))
    assert all(parameter.dtype == torch.float32 for parameter in net.parameters())
    assert not same_weights(net, full)
    assert steps[-1].losses[0] == pytest.approx(wanted[-1].losses[0], abs=0.2)


# ---- resolution and memory -----------------------------------------------------------------------


def test_every_child_sees_the_images_at_its_own_resolution(tiny):
    space = spaces.load("mobilenet", channels=1, classes=4, size=8, width=0.05)
    sizes = []

    class Spy(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(1, 4)

        def forward(self, x, arch):
            sizes.append((x.shape[-1], arch.resolution))
            return self.linear(x.mean((2, 3)))

    recipe = replace(RECIPE, steps=8)
    list(supernet.train(Spy(), supernet.sandwich(space, recipe), tiny, recipe))
    assert all(found == wanted for found, wanted in sizes)
    assert len({found for found, _ in sizes}) > 1


class Hungry(nn.Module):
    """Runs out of memory on more images than `most`."""

    def __init__(self, most):
        super().__init__()
        self.linear, self.most, self.arch = nn.Linear(64, 4), most, LARGEST

    def forward(self, x, arch):
        if len(x) > self.most:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.\nAnd more")
        return self.linear(x.flatten(1))


@pytest.mark.parametrize(
    ("most", "said"),
    [(100, "--batch 64 fits"), (7, "--batch 4 fits"), (1, "Not even a batch of 2")],
)
def test_too_large_a_batch_says_which_one_fits(most, said, tiny):
    net = Hungry(most)
    before = copy.deepcopy(net)
    with pytest.raises(NasctlError, match=f"--batch: .*not hold a batch of 128.*{said}") as caught:
        next(supernet.train(net, supernet.alone(net), tiny, Recipe(steps=3)))
    assert "\n" not in str(caught.value)
    assert same_weights(net, before), "a probe must not train"


def test_a_task_without_a_chance_level_is_not_watched_for_it(tiny):
    def loss(logits, labels):
        return F.cross_entropy(logits, labels) * 0 + math.log(4)

    task = replace(tiny, loss=loss)
    _, steps = trained(task, Recipe(steps=60, batch=8), lambda step: [LARGEST])
    assert steps[-1].halvings == 0
