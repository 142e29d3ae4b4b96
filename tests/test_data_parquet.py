import hashlib

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pictures import chw, keys, message_of, picture, png, write_parquet

from nas.tasks import load


def test_parquet_file_is_split_and_labels_with_gaps_close_up(tmp_path):
    path = write_parquet(tmp_path / "set.parquet", [10, 2, 7] * 10)
    task = load(str(path))
    assert (task.name, task.classes) == ("set", ("2", "7", "10"))
    assert [len(split) for split in task.splits.values()] == [18, 6, 6]
    sevens = {hashlib.sha256(chw(picture(i))).hexdigest() for i in range(2, 30, 3)}
    for key, label in zip(keys(task.train), task.train.labels.tolist(), strict=True):
        assert (key in sevens) == (task.classes[label] == "7")


def test_parquet_folder_joins_shards_and_keeps_its_splits(tmp_path):
    write_parquet(tmp_path / "train-0.parquet", ["a", "b"] * 5)
    write_parquet(tmp_path / "train-1.parquet", ["b", "a"] * 5)
    write_parquet(tmp_path / "my_test.parquet", ["a", "b"])
    write_parquet(tmp_path / "validation.parquet", ["a", "b", "b"])
    task = load(str(tmp_path))
    assert [len(split) for split in task.splits.values()] == [20, 3, 2]


def test_parquet_columns_by_type_when_the_names_say_nothing(tmp_path):
    path = write_parquet(tmp_path / "set.parquet", ["x", "y"] * 5, names=("blob", "what"))
    assert load(str(path)).classes == ("x", "y")


def test_parquet_struct_images_and_dictionary_labels(tmp_path):
    table = pa.table(
        {
            "image": pa.array([{"bytes": png(i), "path": None} for i in range(10)]),
            "label": pa.array(["x", "y"] * 5).dictionary_encode(),
        }
    )
    pq.write_table(table, tmp_path / "set.parquet")
    assert load(str(tmp_path / "set.parquet")).classes == ("x", "y")


@pytest.mark.parametrize(
    ("columns", "expected"),
    [
        (
            {"a": [1.0], "label": [1]},
            "no clear image column; columns are a (double), label (int64)",
        ),
        ({"image": [b"x"], "y": [0.5]}, "no clear label column; columns are image (binary), y"),
        ({"a": [b"x"], "b": [b"x"], "label": [1]}, "several could be: a, b"),
        ({"image": [b"x"], "y": [1], "z": [1]}, "several could be: y, z"),
    ],
)
def test_parquet_without_clear_columns(tmp_path, columns, expected):
    pq.write_table(pa.table(columns), tmp_path / "set.parquet")
    message = message_of(tmp_path / "set.parquet")
    assert expected in message
    assert "Rename the" in message


def test_parquet_corrupt_truncated_and_empty(tmp_path):
    path = write_parquet(tmp_path / "set.parquet", [0, 1] * 5)
    whole = path.read_bytes()
    for broken in (b"", b"PAR1 nonsense PAR1", whole[: len(whole) // 2], b"\0" * 200 + whole[200:]):
        path.write_bytes(broken)
        message = message_of(path)
        assert str(path) in message
    pq.write_table(
        pa.table({"image": pa.array([], pa.binary()), "label": pa.array([], pa.int64())}), path
    )
    assert "no rows" in message_of(path)


def test_parquet_null_labels_are_counted(tmp_path):
    message = message_of(write_parquet(tmp_path / "set.parquet", [0, 1, None, 1, None]))
    assert "2 of 5 labels are null, the first in row 2" in message
    assert "column 'label'" in message


def test_parquet_unreadable_rows_are_named(tmp_path):
    images = [png(i) for i in range(6)]
    images[3], images[5] = b"junk", None
    message = message_of(write_parquet(tmp_path / "set.parquet", [0, 1] * 3, images))
    assert "set.parquet row 3: unreadable image" in message
    assert "and 1 other unreadable of 6" in message


def test_parquet_folder_with_names_that_say_no_or_two_splits(tmp_path):
    write_parquet(tmp_path / "train.parquet", [0, 1] * 5)
    write_parquet(tmp_path / "more.parquet", [0, 1] * 5)
    assert "the name says no split" in message_of(tmp_path)
    (tmp_path / "more.parquet").rename(tmp_path / "train_test.parquet")
    assert "the name says train and test" in message_of(tmp_path)


def test_parquet_folder_without_train(tmp_path):
    write_parquet(tmp_path / "test.parquet", [0, 1] * 5)
    assert "no *train*.parquet" in message_of(tmp_path)
