import hashlib
from pathlib import Path

import numpy as np
import pytest
import torch
from pictures import chw, keys, message_of, picture, png, write_folder
from PIL import Image

from nas.tasks import load


def test_folder_names_classes_in_order_and_pairs_images_with_labels(tmp_path):
    task = load(str(write_folder(tmp_path / "set", {"bee": 5, "ant": 5})))
    assert (task.name, task.classes, task.flip, task.pad) == ("set", ("ant", "bee"), True, 1)
    bees = {hashlib.sha256(chw(picture(i))).hexdigest() for i in range(5)}
    for split in task.splits.values():
        for key, label in zip(keys(split), split.labels.tolist(), strict=True):
            assert (key in bees) == (task.classes[label] == "bee")


def test_folder_does_not_depend_on_the_order_on_disk(tmp_path, monkeypatch):
    root = str(write_folder(tmp_path / "set", {"ant": 6, "bee": 6}))
    expected = load(root).fingerprint
    iterdir, rglob = Path.iterdir, Path.rglob
    monkeypatch.setattr(Path, "iterdir", lambda self: reversed(sorted(iterdir(self))))
    monkeypatch.setattr(Path, "rglob", lambda self, p: reversed(sorted(rglob(self, p))))
    assert load(root).fingerprint == expected


def test_folder_honours_train_val_and_test(tmp_path):
    for start, (part, n) in enumerate({"train": 4, "val": 2, "test": 3}.items()):
        write_folder(tmp_path / part, {"ant": n, "bee": n}, start=100 * start)
    task = load(str(tmp_path))
    assert [len(split) for split in task.splits.values()] == [8, 4, 6]
    assert set(keys(task.test)) == set(keys(load(str(tmp_path)).test))
    given_test = {hashlib.sha256(chw(picture(200 + i))).hexdigest() for i in range(3)}
    assert given_test < set(keys(task.test))


def test_folder_with_train_and_test_takes_a_tenth_of_train(tmp_path):
    write_folder(tmp_path / "train", {"ant": 20, "bee": 20})
    write_folder(tmp_path / "test", {"ant": 2, "bee": 2}, start=500)
    task = load(str(tmp_path))
    assert [len(split) for split in task.splits.values()] == [36, 4, 4]


def test_a_class_may_be_called_train(tmp_path):
    task = load(str(write_folder(tmp_path / "set", {"train": 5, "tram": 5})))
    assert task.classes == ("train", "tram")


def test_grey_stays_one_channel_unless_a_colour_image_joins(tmp_path):
    root = write_folder(tmp_path / "set", {"ant": 5, "bee": 5}, mode="L")
    grey = load(str(root))
    assert (grey.channels, grey.flip) == (1, False)
    (root / "bee" / "new.png").write_bytes(png(99))
    mixed = load(str(root))
    assert mixed.channels == 3
    ants = mixed.train.images[mixed.train.labels == 0]
    assert torch.equal(ants[:, 0], ants[:, 2])


def test_sixteen_bit_grey_is_scaled_not_clipped(tmp_path):
    root = write_folder(tmp_path / "set", {"ant": 3, "bee": 3}, mode="L")
    for path in root.rglob("*.png"):
        Image.fromarray(np.full((8, 8), 0x8000, np.uint16)).save(path)
    assert set(load(str(root)).train.images.flatten().tolist()) == {0x80}


def test_transparent_palette_and_cmyk_become_rgb(tmp_path):
    root = write_folder(tmp_path / "set", {"ant": 4, "bee": 4})
    picture(1).quantize(8).save(root / "ant" / "000.png", transparency=bytes([0, 128, 255]))
    picture(2).convert("CMYK").save(root / "bee" / "000.jpg")
    assert load(str(root)).channels == 3


def test_a_rotated_photo_is_turned_upright(tmp_path):
    root = write_folder(tmp_path / "set", {"ant": 3, "bee": 3}, mode="L")
    exif = Image.Exif()
    exif[0x0112] = 3  # upside down
    half = np.zeros((8, 8), np.uint8)
    half[4:] = 255
    for path in root.rglob("*.png"):
        Image.fromarray(half).save(path, exif=exif)
    image = load(str(root)).train.images[0, 0]
    assert image[0, 0] == 255
    assert image[7, 0] == 0


def test_size_resizes_the_shorter_side_and_keeps_the_centre(tmp_path):
    wide = np.zeros((10, 30), np.uint8)
    wide[:, 10:20] = 200  # the centre square is bright, both sides are dark
    root = tmp_path / "set"
    for name in ("ant", "bee"):
        (root / name).mkdir(parents=True)
        for i in range(3):
            Image.fromarray(wide).save(root / name / f"{i}.png")
    task = load(str(root), size=5)
    assert tuple(task.train.images.shape[1:]) == (1, 5, 5)
    assert task.train.images.min() > 150


def test_sizes_that_differ_need_size(tmp_path):
    root = write_folder(tmp_path / "set", {"ant": 3, "bee": 3})
    (root / "bee" / "big.png").write_bytes(png(9, size=(12, 10)))
    message = message_of(root)
    assert "8x8 (6), 12x10 (1)" in message
    assert "--size N" in message
    assert load(str(root), size=8).size == 8


def test_oblong_images_need_size(tmp_path):
    message = message_of(write_folder(tmp_path / "set", {"ant": 3, "bee": 3}, size=(9, 8)))
    assert "9x8 (6)" in message
    assert "square" in message


def test_unreadable_images_name_the_first_and_count_the_rest(tmp_path):
    root = write_folder(tmp_path / "set", {"ant": 4, "bee": 4})
    (root / "ant" / "001.png").write_bytes(b"not an image")
    (root / "ant" / "002.png").write_bytes((root / "ant" / "002.png").read_bytes()[:60])
    (root / "bee" / "003.png").write_bytes(b"")
    message = message_of(root)
    assert str(root / "ant" / "001.png") in message
    assert "and 2 other unreadable of 8" in message


def test_float_pixels_are_refused_rather_than_guessed(tmp_path):
    root = write_folder(tmp_path / "set", {"ant": 4, "bee": 4})
    Image.fromarray(np.ones((8, 8), np.float32)).save(root / "ant" / "x.tiff")
    assert "'F' is neither 8 nor 16 bit" in message_of(root)


def test_files_that_are_not_images_are_passed_over(tmp_path):
    root = write_folder(tmp_path / "set", {"ant": 4, "bee": 4})
    (root / "ant" / "notes.txt").write_text("hello")
    (root / "ant" / ".DS_Store").write_bytes(b"x")
    (root / "README.md").write_text("hello")
    assert sum(len(split) for split in load(str(root)).splits.values()) == 8


def test_more_images_than_memory_is_said_before_they_are_decoded(tmp_path, monkeypatch):
    root = write_folder(tmp_path / "set", {"ant": 4, "bee": 4})
    monkeypatch.setattr("psutil.virtual_memory", lambda: type("Free", (), {"available": 1000}))
    assert "--size" in message_of(root)


@pytest.mark.parametrize(
    ("counts", "expected"),
    [
        ({}, "no class folders"),
        ({"ant": 5}, "only one class, 'ant'"),
        ({"ant": 5, "bee": 0}, "class folder without images"),
        ({"ant": 5, "bee": 2}, "too few images to split in class 'bee' (2); allowed: at least 3"),
    ],
)
def test_folders_that_are_no_data_set(tmp_path, counts, expected):
    root = tmp_path / "set"
    root.mkdir()
    message = message_of(write_folder(root, counts))
    assert expected in message
    assert "allowed:" in message


def test_images_beside_class_folders_are_not_lost(tmp_path):
    root = write_folder(tmp_path / "set", {"ant": 4, "bee": 4})
    (root / "stray.png").write_bytes(png())
    message = message_of(root)
    assert "1 images outside a class folder" in message
    assert "stray.png" in message


def test_a_label_only_in_test_is_named(tmp_path):
    write_folder(tmp_path / "train", {"ant": 4, "bee": 4})
    write_folder(tmp_path / "test", {"ant": 4, "cow": 4})
    assert "test has labels that train lacks: cow" in message_of(tmp_path)


def test_two_folders_for_one_split(tmp_path):
    for part in ("train", "val", "valid"):
        write_folder(tmp_path / part, {"ant": 4, "bee": 4})
    assert "two folders for one split: train, val, valid" in message_of(tmp_path)
