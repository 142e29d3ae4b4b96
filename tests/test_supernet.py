from __future__ import annotations

import errno
import math
import resource
import signal
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import nn

from nas import checkpoint, supernet
from nas import space as spaces
from nas.errors import NasctlError
from nas.supernet import Recipe, batch_indices
from nas.tasks import Task

RECIPE = Recipe(steps=6, batch=32, lr=0.1)
SPACE = spaces.load("resnet", channels=1, classes=4, size=8, width=0.25)


def fresh(seed=0):
    torch.manual_seed(seed)
    return SPACE.build(SPACE.decode(SPACE.largest))


def steps_of(net, task, recipe=RECIPE, **options):
    return supernet.train(net, supernet.sandwich(SPACE, recipe), task, recipe, **options)


def trained(task, recipe=RECIPE):
    net = fresh()
    steps = list(steps_of(net, task, recipe))
    return net, steps


def assert_same_weights(a, b):
    theirs = b.state_dict()
    for name, tensor in a.state_dict().items():
        assert torch.equal(tensor, theirs[name]), name


# ---- what a step does ----------------------------------------------------------------------------


@given(st.integers(1, 40), st.integers(1, 12), st.integers(0, 5), st.integers(0, 3))
def test_an_epoch_shows_every_image_once(n, batch, epoch, seed):
    per_epoch = n // min(batch, n)
    first = epoch * per_epoch
    seen = [batch_indices(n, batch, first + i, seed).tolist() for i in range(per_epoch)]
    assert all(len(rows) == min(batch, n) for rows in seen)
    every = [at for rows in seen for at in rows]
    assert len(set(every)) == len(every) and set(every) <= set(range(n))
    assert len(every) > n - min(batch, n)  # what is left out is less than a batch


def test_epochs_and_seeds_differ():
    orders = {tuple(batch_indices(50, 50, e, s).tolist()) for e in range(3) for s in range(3)}
    assert len(orders) == 9


@pytest.mark.parametrize("steps", [1, 2, 10, 137])
def test_the_learning_rate_rises_to_its_peak_and_falls_towards_zero(steps):
    recipe = Recipe(steps=steps, lr=0.5)
    rates = np.array([recipe.lr_at(step) for step in range(steps)])
    peak = int(rates.argmax())
    assert rates[peak] == pytest.approx(0.5)
    assert peak <= max(1, round(0.1 * steps))
    assert (np.diff(rates[: peak + 1]) >= 0).all() and (np.diff(rates[peak:]) <= 0).all()
    assert rates[-1] > 0 and (steps < 10 or rates[-1] < 0.06)


def test_a_sandwich_is_largest_smallest_and_random():
    archs = supernet.sandwich(SPACE, replace(RECIPE, n_random=3))
    found = archs(0)
    assert found[:2] == [SPACE.decode(SPACE.largest), SPACE.decode(SPACE.smallest)]
    assert len(found) == 5 and found == archs(0) and found[2:] != archs(1)[2:]


class Two(nn.Module):
    """A teacher and a child with a matrix each, so that their gradients can be told apart."""

    def __init__(self):
        super().__init__()
        generator = torch.Generator().manual_seed(3)
        self.teacher, self.child = nn.Linear(64, 4), nn.Linear(64, 4)
        for parameter in self.parameters():
            parameter.data.normal_(0, 0.1, generator=generator)

    def forward(self, x, arch):
        return getattr(self, arch.part)(x.flatten(1))


TEACHER = SimpleNamespace(resolution=8, part="teacher")
CHILD = SimpleNamespace(resolution=8, part="child")
FREE = Recipe(
    steps=4, batch=200, lr=0.1, warmup=0.0, clip_norm=math.inf, weight_decay=0.01, loss="kl"
)


def after_one_step(task, archs, recipe=FREE):
    net = Two()
    next(supernet.train(net, lambda step: archs, task, recipe))
    return net


def test_one_step_is_nesterov_sgd_by_hand_on_the_mean_of_the_losses(tiny):
    before, archs = Two(), [TEACHER, CHILD, CHILD]
    x = tiny.normalise(tiny.train.images)
    taught = before(x, TEACHER)
    loss = F.cross_entropy(taught, tiny.train.labels, label_smoothing=0.1)
    loss = loss + 2 * F.cross_entropy(before(x, CHILD), taught.detach().softmax(1))
    (loss / 3).backward()
    after = dict(after_one_step(tiny, archs).named_parameters())
    for name, old in before.named_parameters():
        decay = 0.01 if old.ndim > 1 else 0.0  # once, however many networks ran
        expected = old - 3 * 0.1 * 1.9 * (old.grad + decay * old)  # the rate of each of three
        torch.testing.assert_close(after[name], expected, rtol=1e-5, atol=1e-6, msg=name)


def test_children_learn_from_the_largest_and_not_from_labels(tiny):
    wrong = replace(tiny.train, labels=(tiny.train.labels + 1) % 4)
    other = Task("wrong", tiny.classes, wrong, tiny.val, tiny.test)
    a, b = (after_one_step(task, [TEACHER, CHILD]) for task in (tiny, other))
    torch.testing.assert_close(a.child.weight, b.child.weight, rtol=0, atol=1e-7)
    assert not torch.allclose(a.teacher.weight, b.teacher.weight, atol=1e-4)


def test_the_largest_learns_nothing_from_its_children(tiny):
    recipe = replace(FREE, weight_decay=0.0)
    alone = after_one_step(tiny, [TEACHER], recipe)
    with_child = after_one_step(tiny, [TEACHER, CHILD], recipe)
    torch.testing.assert_close(alone.teacher.weight, with_child.teacher.weight)
    assert torch.equal(alone.child.weight, Two().child.weight)


def test_gradients_are_clipped_to_a_norm(tiny):
    recipe = replace(FREE, clip_norm=1e-3, weight_decay=0.0)
    before, after = Two(), after_one_step(tiny, [TEACHER, CHILD], recipe)
    old, new = (nn.utils.parameters_to_vector(net.parameters()).detach() for net in (before, after))
    assert float((new - old).norm()) == pytest.approx(2 * 0.1 * 1.9e-3, rel=0.01)


def test_a_diverging_loss_is_one_clear_error(tiny):
    recipe = replace(FREE, lr=1e30)
    with pytest.raises(
        NasctlError, match="--lr: training diverged at step [23]:.*1/8.*Try --lr 4.2e"
    ):
        list(supernet.train(Two(), lambda step: [TEACHER, CHILD], tiny, recipe))


def test_it_learns_and_so_do_its_sub_networks(tiny):
    net, steps = trained(tiny, Recipe(steps=40, batch=50, lr=0.1))
    assert [step.step for step in steps] == list(range(1, 41))
    largest = [step.losses[0] for step in steps]
    assert np.mean(largest[-4:]) < 0.6 * np.mean(largest[:4])
    calibration = supernet.calibration_images(tiny)
    for genes in (SPACE.largest, SPACE.smallest):
        child = supernet.child(net, SPACE, genes, calibration)
        assert not child.training
        score = supernet.evaluate(child, tiny, tiny.val, 8)
        assert score.accuracy > 0.7 and score.cross_entropy < 1.0


def test_evaluation_does_not_depend_on_its_batches(tiny, monkeypatch):
    net, _ = trained(tiny)
    child = supernet.child(net, SPACE, SPACE.largest, supernet.calibration_images(tiny))
    whole = supernet.evaluate(child, tiny, tiny.val, 8)
    monkeypatch.setattr("nas.judge.BATCH_EVAL", 7)
    parts = supernet.evaluate(child, tiny, tiny.val, 8)
    assert parts.cross_entropy == pytest.approx(whole.cross_entropy, rel=1e-5)
    assert parts.accuracy == whole.accuracy


# ---- the same again ------------------------------------------------------------------------------


def test_same_seed_same_weights_bit_for_bit(tiny):
    (a, first), (b, second) = trained(tiny), trained(tiny)
    assert first == second
    assert_same_weights(a, b)
    c, _ = trained(tiny, replace(RECIPE, seed=1))
    assert not torch.equal(a.stem.weight, c.stem.weight)


def test_training_ignores_and_keeps_the_global_generators(tiny):
    a, _ = trained(tiny)
    net = fresh()
    torch.manual_seed(123)
    np.random.seed(7)
    state = torch.get_rng_state()
    list(steps_of(net, tiny))
    assert torch.equal(torch.get_rng_state(), state)
    assert_same_weights(a, net)


@pytest.mark.parametrize("stop", range(1, 7))
def test_a_run_stopped_at_any_step_goes_on_to_the_same_weights(stop, tiny, tmp_path):
    file = tmp_path / "state.safetensors"
    steps = steps_of(fresh(), tiny, resume=file)
    for _ in range(stop):
        next(steps)
    steps.close()  # saves
    net = fresh(seed=5)  # another initialisation: everything comes from the file
    rest = [step.step for step in steps_of(net, tiny, resume=file)]
    assert rest == list(range(stop + 1, 7))
    assert_same_weights(net, trained(tiny)[0])


def test_a_killed_run_goes_on_from_its_last_save(tiny, tmp_path):
    file, left = tmp_path / "state.safetensors", tmp_path / "left.safetensors"
    steps = steps_of(fresh(), tiny, resume=file, save_every_s=0.0)
    for _ in range(3):
        next(steps)
    left.write_bytes(file.read_bytes())  # what a kill would leave
    steps.close()
    net = fresh(seed=5)
    assert next(steps_of(net, tiny, resume=left)).step == 4
    assert len(list(steps_of(net, tiny, resume=left))) == 2  # the generator above saved at 4
    assert_same_weights(net, trained(tiny)[0])


def test_a_finished_state_is_not_trained_again(tiny, tmp_path):
    net = fresh()
    list(steps_of(net, tiny, resume=tmp_path / "s"))
    again = fresh(seed=5)
    assert list(steps_of(again, tiny, resume=tmp_path / "s")) == []
    assert_same_weights(net, again)


# ---- files that cannot be read or written --------------------------------------------------------


@pytest.fixture
def saved(tiny, tmp_path):
    """A state of two steps."""
    steps = steps_of(fresh(), tiny, resume=tmp_path / "state.safetensors")
    next(steps), next(steps)
    steps.close()
    return tmp_path / "state.safetensors"


@pytest.mark.parametrize("kept", [0, 1, 7, 8, 100, 0.5, -1])
def test_a_truncated_state_is_one_clear_error(kept, saved, tiny):
    data = saved.read_bytes()
    size = kept if isinstance(kept, int) else int(kept * len(data))
    saved.write_bytes(data[:size])
    with pytest.raises(NasctlError, match="state.safetensors: damaged.*delete it") as caught:
        next(steps_of(fresh(), tiny, resume=saved))
    assert "\n" not in str(caught.value)


def test_a_file_of_something_else_is_one_clear_error(saved, tiny):
    saved.write_bytes(b"PK\x03\x04 not a tensor file" * 50)
    with pytest.raises(NasctlError, match="damaged or not a safetensors file"):
        next(steps_of(fresh(), tiny, resume=saved))
    saved.unlink()
    saved.mkdir()
    with pytest.raises(NasctlError, match="damaged or not a safetensors file"):
        next(steps_of(fresh(), tiny, resume=saved))


def test_a_state_of_another_recipe_or_task_is_refused(saved, tiny):
    with pytest.raises(NasctlError, match="another recipe or other data"):
        next(steps_of(fresh(), tiny, replace(RECIPE, lr=0.3), resume=saved))
    other = Task("other", tiny.classes, tiny.val, tiny.train, tiny.test)
    with pytest.raises(NasctlError, match="another recipe or other data"):
        next(steps_of(fresh(), other, resume=saved))
    save_file({"x": torch.zeros(2)}, saved)  # a file without our metadata
    with pytest.raises(NasctlError, match="another recipe or other data"):
        next(steps_of(fresh(), tiny, resume=saved))


def test_weights_of_another_network_name_the_tensor_that_does_not_fit(saved):
    tensors, _ = checkpoint.read(saved)
    with pytest.raises(NasctlError, match=r"tensor bias: found nothing, the network needs \(2,\)"):
        checkpoint.fill(nn.Linear(3, 2, bias=True), {"weight": torch.zeros(2, 3)}, saved)
    with pytest.raises(NasctlError, match="tensor weight: found nothing"):
        checkpoint.fill(nn.Linear(3, 2), tensors, saved)


def refuse(*_):
    raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize("where", ["nas.file.os.fsync", "nas.file.os.replace"])
def test_a_full_disk_is_one_clear_error_and_harms_nothing(where, saved, tiny, monkeypatch):
    before = saved.read_bytes()
    monkeypatch.setattr(where, refuse)
    with pytest.raises(NasctlError, match="cannot write: .*No space left.*there before is intact"):
        list(steps_of(fresh(), tiny, resume=saved, save_every_s=0.0))
    assert saved.read_bytes() == before
    assert list(saved.parent.iterdir()) == [saved]


def test_a_file_that_the_system_really_cuts_short_harms_nothing(saved):
    """A limit on file size stands in for a full disk: the failing write is the library's own."""
    before = saved.read_bytes()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))
    try:
        with pytest.raises(NasctlError, match="state.safetensors: cannot write"):
            checkpoint.write(saved, {"x": torch.zeros(100_000)}, {})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert saved.read_bytes() == before
    assert list(saved.parent.iterdir()) == [saved]
