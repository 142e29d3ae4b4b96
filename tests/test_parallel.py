"""The arithmetic of several processes: shards, their gradients, their notes to each other."""

from __future__ import annotations

import threading
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from cli import torchrun
from cli.torchrun import Group
from nas import gradients as steps
from nas import parallel, supernet
from nas import space as spaces
from nas.errors import NasctlError, UsageError
from nas.parallel import Workers
from nas.sampling import Contest
from nas.supernet import Recipe, batch_indices

SPACE = spaces.load("resnet", channels=1, classes=4, size=8, width=0.25)
RECIPE = Recipe(steps=4, batch=48, lr=1.0, warmup=0.0, weight_decay=0.0, clip_norm=1e9)


def images_of_step(n, step, size, accumulate):
    """Of every process, in the order of their ranks."""
    rows = batch_indices(n, 24, step, 0)
    for rank in range(size):
        for _, part in Workers(rank, size).shards(len(rows), accumulate):
            yield from rows[part].tolist()


@given(st.integers(2, 300), st.integers(1, 9), st.integers(1, 5))
def test_shards_hold_every_image_once_in_order_and_evenly(n, size, accumulate):
    every = size * accumulate
    if n < 2 * every:
        with pytest.raises(UsageError, match=rf"--batch: .*at least {2 * every}"):
            Workers(0, size).shards(n, accumulate)
        return
    each = [Workers(rank, size).shards(n, accumulate) for rank in range(size)]
    assert all(len(shards) == accumulate for shards in each)
    numbered = [shard for shards in each for shard in shards]
    assert [number for number, _ in numbered] == list(range(every))
    assert [i for _, part in numbered for i in range(n)[part]] == list(range(n))
    sizes = [part.stop - part.start for _, part in numbered]
    assert max(sizes) - min(sizes) <= 1


@given(st.lists(st.tuples(st.integers(1, 4), st.integers(1, 3)), min_size=5, max_size=5))
def test_an_epoch_shows_each_image_once_though_processes_come_and_go(groups):
    seen = [
        image
        for step, (size, accumulate) in enumerate(groups)  # 5 steps of 24 are an epoch of 120
        for image in images_of_step(120, step, size, accumulate)
    ]
    assert sorted(seen) == list(range(120))


def test_one_process_exchanges_nothing(monkeypatch):
    for name in ("all_reduce", "broadcast", "init_process_group"):
        monkeypatch.setattr(dist, name, lambda *_, name=name, **__: pytest.fail(name))
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    alone, tensor = parallel.workers(), torch.ones(3)
    assert alone == Workers() and alone.first
    alone.sum_([tensor])
    assert tensor.tolist() == [1, 1, 1] and alone.share(b"x") == b"x"
    assert alone.any(True) and not alone.any(False)
    with torchrun.joined() as group:
        group.agree({"data": "a"})
        assert group == Group(alone) and group.follow_first(lambda: "go") == "go"


# ---- micro-batches -------------------------------------------------------------------------------


def fresh():
    torch.manual_seed(0)
    return SPACE.build(SPACE.decode(SPACE.largest))


def after_one_step(task, recipe, net=None):
    net = net or fresh()
    next(supernet.train(net, supernet.sandwich(SPACE, recipe), task, recipe))
    return net


def gradients(task, recipe):
    """Of the first step, read off what Nesterov's first update did to the weights."""
    before, after = fresh(), after_one_step(task, recipe)
    rate = (2 + recipe.n_random) * recipe.lr
    return {
        name: (old - new) / (rate * (1 + recipe.momentum))
        for (name, old), new in zip(before.named_parameters(), after.parameters(), strict=True)
    }


def test_micro_batches_give_the_mean_gradient_of_shards_with_norms_of_their_own(tiny):
    found = gradients(tiny, replace(RECIPE, accumulate=3))
    net, archs = fresh(), supernet.sandwich(SPACE, RECIPE)(0)
    rows = batch_indices(len(tiny.train), 48, 0, 0)
    for at in rows.split(16):
        x, target = tiny.normalise(tiny.train.images[at]), None
        for arch in archs:
            logits = net(x, arch)
            labels, smoothing = tiny.train.labels[at], RECIPE.label_smoothing
            loss = F.cross_entropy(logits, labels, label_smoothing=smoothing)
            if target is None:
                target = logits.detach().softmax(1)
            else:
                loss = (loss + F.cross_entropy(logits, target)) / 2
            (loss / len(archs) / 3).backward()
    for name, parameter in net.named_parameters():
        torch.testing.assert_close(found[name], parameter.grad, rtol=1e-4, atol=1e-6, msg=name)
    whole = gradients(tiny, RECIPE)  # norms over the whole batch: the same images, another gradient
    assert not torch.allclose(found["stem.weight"], whole["stem.weight"], rtol=1e-2)


def test_micro_batches_report_the_mean_loss_and_unequal_ones_count_by_their_images(tiny):
    recipe = replace(RECIPE, batch=50, lr=1e-6)
    archs = [SPACE.decode(SPACE.largest)]
    losses = []
    for at in batch_indices(len(tiny.train), 50, 0, 0).split([16, 17, 17]):
        logits = fresh()(tiny.normalise(tiny.train.images[at]), archs[0])
        labels = tiny.train.labels[at]
        loss = F.cross_entropy(logits, labels, label_smoothing=0.1)
        losses.append(loss.item() * len(at) / 50)
    steps = supernet.train(fresh(), lambda step: archs, tiny, replace(recipe, accumulate=3))
    assert next(steps).losses[0] == pytest.approx(sum(losses), rel=1e-5)


def test_shards_are_augmented_differently_and_repeatably(tiny):
    def inputs(shard):
        generator = steps._generator(RECIPE, 5, shard, steps.AUGMENT)
        shifted, images = replace(tiny, pad=2), tiny.train.images[:16]
        return steps._inputs(shifted, RECIPE, images, generator)

    assert torch.equal(inputs(0), inputs(0)) and not torch.equal(inputs(0), inputs(1))


def test_steps_shards_and_streams_have_random_numbers_of_their_own():
    drawn = {
        float(torch.rand(1, generator=steps._generator(RECIPE, step, shard, stream)))
        for step in range(40)
        for shard in range(16)
        for stream in (steps.AUGMENT, steps.NOISE)
    }
    assert len(drawn) == 40 * 16 * 2


def test_a_contest_is_decided_by_all_shards_together(tiny):
    """Of two networks, each better on one of two shards."""
    rows = batch_indices(len(tiny.train), 48, 0, 0)
    recipe = replace(RECIPE, accumulate=2)

    class Rated(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.logits = torch.nn.Parameter(torch.zeros(1))
            self.ran = []

        def forward(self, x, arch):
            if torch.is_grad_enabled():
                self.ran.append(arch.name)
            first = bool(torch.equal(x, images.split(24)[0]))
            right = {"even": (3.0, 3.0), "uneven": (4.0, 0.0)}[arch.name][0 if first else 1]
            labels = tiny.train.labels[rows.split(24)[0 if first else 1]]
            return F.one_hot(labels, 4) * right + self.logits

    images = tiny.normalise(tiny.train.images[rows])
    archs = tuple(SimpleNamespace(resolution=8, name=name) for name in ("even", "uneven"))
    for worst, winner in ((False, "even"), (True, "uneven")):
        net = Rated()
        next(supernet.train(net, lambda step, w=worst: [Contest(archs, w)], tiny, recipe))
        assert net.ran == [winner, winner]


def test_what_identifies_a_training_is_not_how_it_was_split(tiny, tmp_path):
    """A state goes on with other micro-batches."""
    state, archs = tmp_path / "state.safetensors", supernet.sandwich(SPACE, RECIPE)
    first = supernet.train(fresh(), archs, tiny, RECIPE, resume=state)
    next(first)
    first.close()
    other = replace(RECIPE, accumulate=2)
    assert [s.step for s in supernet.train(fresh(), archs, tiny, other, resume=state)] == [2, 3, 4]


def test_too_many_micro_batches_are_one_clear_error(tiny):
    recipe = replace(RECIPE, batch=6, accumulate=4)
    with pytest.raises(UsageError, match="--batch: 6 images per step in 4 shards.*at least 8"):
        after_one_step(tiny, recipe)


# ---- notes ---------------------------------------------------------------------------------------


def together(work, size=3):
    """`work(group)` in `size` threads that share a store; what each returned or raised."""
    store, found = dist.HashStore(), [None] * size

    def one(rank):
        group = Group(Workers(rank, size), size, store)
        try:
            found[rank] = work(group)
        except NasctlError as error:
            found[rank] = error
            group.fail(error)

    threads = [threading.Thread(target=one, args=(rank,)) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return found


def test_the_first_process_decides():
    def work(group):
        group.agree({"data": "a"})
        return group.follow_first(lambda: f"from {group.workers.rank}")

    assert together(work) == ["from 0"] * 3


def test_a_process_with_other_inputs_stops_all_and_names_the_difference():
    found = together(lambda group: group.agree({"data": "b" if group.workers.rank == 1 else "a"}))
    assert all(isinstance(error, NasctlError) for error in found)
    # in the words of whoever compared first: the others may hear of it through somebody's failure
    for error in found:
        assert "has data a" in str(error) or "has data b" in str(error)
        assert "\n" not in str(error)


@pytest.mark.parametrize("failing", [0, 2])
def test_a_process_that_fails_before_the_others_have_asked_ends_them_all(failing):
    def work(group):
        if group.workers.rank == failing:
            raise NasctlError("no such data", where="--data")
        group.agree({"data": "a"})

    found = together(work)
    assert str(found[failing]) == "--data: no such data"
    for rank in {0, 1, 2} - {failing}:
        assert "--data: no such data" in str(found[rank]) and "\n" not in str(found[rank])


def test_of_one_error_one_process_tells_per_machine(monkeypatch):
    store = dist.HashStore()
    groups = [Group(Workers(rank, 4), 2, store) for rank in range(4)]
    told = []
    for group in groups:
        monkeypatch.setenv("GROUP_RANK", str(group.workers.rank // 2))
        told.append(group.fail(NasctlError("lost")))
    assert told == [True, False, True, False]
    for local, speaks in (("0", True), ("1", False)):  # of a Ctrl-C, the one with the bar
        monkeypatch.setenv("LOCAL_RANK", local)
        assert groups[0].fail(KeyboardInterrupt()) == speaks


@pytest.mark.parametrize(
    ("variables", "said"),
    [
        ({"WORLD_SIZE": "2"}, "the launcher's variables are incomplete.*RANK"),
        ({"WORLD_SIZE": "two"}, "the launcher's variables are incomplete"),
    ],
)
def test_half_a_launcher_is_one_clear_error(variables, said, monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UsageError, match=said), torchrun.joined():
        pass


def test_gradients_are_summed_in_one_all_reduce(monkeypatch):
    calls = []
    monkeypatch.setattr(dist, "all_reduce", lambda flat: calls.append(flat.mul_(2).shape))
    tensors = [torch.ones(2, 3, 1, 1).contiguous(memory_format=torch.channels_last), torch.ones(4)]
    Workers(0, 2).sum_(tensors)
    assert calls == [torch.Size([10])]
    assert all(bool((tensor == 2).all()) for tensor in tensors)


def test_a_broken_connection_is_one_clear_error(monkeypatch):
    def broken(*_, **__):
        raise RuntimeError("[gloo/transport/tcp/pair.cc] Connection closed by peer [::1]:1")

    monkeypatch.setattr(dist, "all_reduce", broken)
    with pytest.raises(NasctlError, match="another process of this training ended") as caught:
        Workers(1, 2).sum_([torch.ones(1)])
    assert "gloo" not in str(caught.value)
