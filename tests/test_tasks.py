import dataclasses
import os
from pathlib import Path

import pytest
import torch
from pictures import message_of

from nas.errors import NasctlError, UsageError
from nas.tasks import Split, Task, load, top1

DATA = os.environ.get("NASCTL_DATA", "")
CIFAR10 = Path(DATA) / "cifar10"


def _task(**changes):
    images = torch.arange(4 * 3 * 4 * 4).remainder(256).to(torch.uint8).view(4, 3, 4, 4)
    split = Split(images, torch.tensor([0, 1, 0, 1]))
    fields = {"name": "mine", "classes": ("a", "b"), "train": split, "val": split, "test": split}
    return Task(**(fields | changes))


@pytest.fixture(scope="module")
def digits():
    return load("digits")


def test_digits_are_what_scikit_learn_bundles(digits):
    assert (digits.name, digits.channels, digits.size, digits.n_classes) == ("digits", 1, 8, 10)
    assert digits.classes == tuple("0123456789")
    assert sum(len(split) for split in digits.splits.values()) == 1797
    assert digits.train.images.max() == 255
    assert digits.train.images.dtype == torch.uint8
    assert digits.train.labels.dtype == torch.int64


def test_digits_are_not_mirrored(digits):
    assert digits.flip is False
    assert digits.pad == 1


def test_digits_resized():
    task = load("digits", size=16)
    assert task.size == 16
    assert task.pad == 2


def test_loading_twice_gives_the_same_bytes(digits):
    again = load("digits")
    assert again.fingerprint == digits.fingerprint
    assert torch.equal(again.test.images, digits.test.images)


def test_the_split_of_digits_is_pinned(digits):
    """Changes only when somebody changes the split, which invalidates every reported number."""
    assert [len(split) for split in digits.splits.values()] == [1079, 359, 359]
    assert digits.test.labels[:12].tolist() == [3, 0, 9, 2, 6, 9, 1, 6, 0, 8, 5, 9]


def test_a_prefix_is_a_fair_sample(digits):
    assert len(set(digits.train.labels[:100].tolist())) == 10


def test_mean_and_std_are_those_of_train_alone(digits):
    pixels = digits.train.images.double() / 255
    assert digits.mean == pytest.approx((pixels.mean().item(),), abs=1e-12)
    assert digits.std == pytest.approx((pixels.std(correction=0).item(),), abs=1e-12)
    dark = Split(torch.zeros_like(digits.val.images), digits.val.labels)
    other = dataclasses.replace(digits, val=dark, test=dark)
    assert (other.mean, other.std) == (digits.mean, digits.std)


def test_normalised_train_has_mean_0_and_std_1_per_channel():
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(256, (50, 3, 6, 6), generator=generator, dtype=torch.uint8)
    images[:, 1] //= 4
    labels = torch.arange(50) % 2
    task = _task(train=Split(images, labels), val=Split(images, labels), test=Split(images, labels))
    out = task.normalise(images)
    assert out.dtype == torch.float32
    assert out.mean((0, 2, 3)).tolist() == pytest.approx([0, 0, 0], abs=1e-5)
    assert out.std((0, 2, 3), correction=0).tolist() == pytest.approx([1, 1, 1], abs=1e-5)


def test_a_channel_that_never_varies_stays_finite():
    images = torch.full((4, 3, 4, 4), 7, dtype=torch.uint8)
    split = Split(images, torch.tensor([0, 1, 0, 1]))
    task = _task(train=split, val=split, test=split)
    assert task.normalise(images).abs().max() < 1e-6


@pytest.mark.parametrize("part", ["train", "val", "test"])
def test_the_fingerprint_sees_one_pixel_and_one_label(part):
    task = _task()
    split = getattr(task, part)
    images, labels = split.images.clone(), split.labels.clone()
    images[-1, -1, -1, -1] ^= 1
    labels[0] = 1
    prints = {
        task.fingerprint,
        dataclasses.replace(task, **{part: Split(images, split.labels)}).fingerprint,
        dataclasses.replace(task, **{part: Split(split.images, labels)}).fingerprint,
    }
    assert len(prints) == 3
    assert all(len(value) == 64 for value in prints)


def test_the_fingerprint_sees_class_names_and_augmentation_but_not_the_name():
    task = _task()
    others = [{"classes": ("a", "c")}, {"flip": True}, {"pad": 1}]
    assert (
        len({dataclasses.replace(task, **o).fingerprint for o in others} | {task.fingerprint}) == 4
    )
    assert dataclasses.replace(task, name="other").fingerprint == task.fingerprint


def test_default_loss_and_metric():
    logits, labels = torch.tensor([[9.0, 0.0], [9.0, 0.0], [0.0, 9.0]]), torch.tensor([0, 1, 1])
    task = _task()
    assert task.metric(logits, labels) == top1(logits, labels) == pytest.approx(2 / 3)
    assert task.loss(logits, labels).item() == pytest.approx(3.0, abs=1e-3)
    assert _task(metric=lambda logits, labels: 0.25).metric(logits, labels) == 0.25


_LABELS = torch.tensor([0, 1, 0, 1])
_IMAGES = torch.zeros(4, 3, 4, 4, dtype=torch.uint8)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"train": Split(_IMAGES.float(), _LABELS)}, "train: images is float32 [4, 3, 4, 4]"),
        ({"train": Split(_IMAGES[0], _LABELS)}, "train: images is uint8 [3, 4, 4]"),
        ({"val": Split(_IMAGES[:0], _LABELS[:0])}, "val: images is uint8 [0, 3, 4, 4]"),
        ({"val": Split(_IMAGES, _LABELS.int())}, "val: labels is int32 [4]"),
        ({"val": Split(_IMAGES, _LABELS[:3])}, "val: 4 images and 3 labels"),
        ({"test": Split(_IMAGES, _LABELS + 1)}, "labels from 1 to 2; allowed: 0 to 1"),
        ({"test": Split(_IMAGES, _LABELS - 1)}, "labels from -1 to 0; allowed: 0 to 1"),
        ({"test": Split(_IMAGES.numpy(), _LABELS)}, "test: images is a ndarray"),
        ({"test": None}, "test: images is a NoneType"),
        ({"test": Split(_IMAGES[:, :1], _LABELS)}, "images are {'train': (3, 4, 4)"),
        ({"train": Split(_IMAGES, _LABELS * 0)}, "val has classes that train lacks: b"),
        ({"classes": ("a",)}, "1 classes"),
        ({"classes": ("a", "a")}, "two classes have the same name"),
        ({"classes": ["a", "b"]}, "classes is ['a', 'b']"),
        ({"pad": 4}, "pad is 4; allowed: 0 to 3"),
    ],
)
def test_a_task_is_valid_once_it_exists(changes, expected):
    with pytest.raises(NasctlError) as caught:
        _task(**changes)
    assert expected in str(caught.value)
    assert "task 'mine'" in str(caught.value)


def test_oblong_tensors_are_refused():
    oblong = Split(torch.zeros(4, 3, 4, 5, dtype=torch.uint8), _LABELS)
    with pytest.raises(NasctlError, match="square"):
        _task(train=oblong, val=oblong, test=oblong)


@pytest.mark.parametrize("typed", ["digit", "Digits", "digts"])
def test_near_misses_of_digits(typed):
    assert "Did you mean digits?" in message_of(typed, UsageError)


@pytest.mark.parametrize("typed", ["", "/no/such/folder", "~nobody_here/data", "a" * 5000, "x:y:z"])
def test_what_does_not_exist(typed):
    message = message_of(typed, UsageError)
    assert "no such data" in message
    assert "my_pkg.my_mod:task" in message


def test_a_file_that_is_no_data_set(tmp_path):
    (tmp_path / "set.csv").write_text("a,b")
    assert "cannot read 'set.csv'" in message_of(tmp_path / "set.csv", UsageError)


@pytest.mark.parametrize("size", [0, -3])
def test_size_out_of_range(size):
    assert "--size" in message_of("digits", UsageError, size=size)


@pytest.mark.skipif(not (DATA and CIFAR10.is_dir()), reason="NASCTL_DATA has no cifar10")
def test_cifar10_test_file_alone():
    task = load(str(CIFAR10 / "cifar10_test.parquet"))
    assert [len(split) for split in task.splits.values()] == [8000, 1000, 1000]
    assert torch.bincount(task.val.labels).tolist() == [100] * 10
    assert (task.channels, task.size, task.flip, task.pad) == (3, 32, True, 4)


@pytest.mark.slow
@pytest.mark.skipif(not (DATA and CIFAR10.is_dir()), reason="NASCTL_DATA has no cifar10")
def test_cifar10_whole():
    """Moments as its SOURCE.md states them, to the digits given there."""
    task = load(str(CIFAR10))
    assert [len(split) for split in task.splits.values()] == [45000, 5000, 10000]
    assert task.mean == pytest.approx((0.4914, 0.4822, 0.4465), abs=4e-3)
    assert task.std == pytest.approx((0.246, 0.244, 0.262), abs=4e-3)
