import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pictures import keys, write_folder

from nas.data.split import fractions, shuffled, stratified
from nas.tasks import load

_labels = st.integers(2, 6).flatmap(
    lambda k: st.tuples(st.just(k), st.lists(st.integers(0, k - 1), max_size=120))
)


@given(_labels, st.sampled_from([0.0, 0.1, 0.2]), st.sampled_from([0.0, 0.1, 0.2]))
def test_stratified_partitions_every_class(drawn, val, test):
    k, extra = drawn
    labels = np.array(list(range(k)) * 3 + extra)
    names = [str(i) for i in range(k)]
    parts = stratified(labels, names, val, test)
    assert sorted(np.concatenate(parts).tolist()) == list(range(len(labels)))
    for share, part in zip((val, test), parts[1:], strict=True):
        for label in range(k):
            wanted = share * np.sum(labels == label)
            got = np.sum(labels[part] == label)
            assert abs(got - wanted) <= 1
            assert (got > 0) == (share > 0)
    assert set(labels[parts[0]].tolist()) == set(range(k))


@given(st.lists(st.integers(0, 2), min_size=1, max_size=60))
def test_a_class_is_split_the_same_whatever_the_other_classes_hold(extra):
    """So adding images of one class moves no image of another between train and test."""
    base = np.array([0, 1, 2] * 10)
    grown = np.concatenate([base, [label for label in extra if label]]).astype(int)
    names = ("a", "b", "c")
    before = [set(part[base[part] == 0]) for part in stratified(base, names, 0.2, 0.2)]
    after = [set(part[grown[part] == 0]) for part in stratified(grown, names, 0.2, 0.2)]
    assert before == after


def test_the_permutation_is_pinned():
    """numpy promises the raw words of PCG64 for good; this fails if that promise breaks."""
    assert shuffled(10, 1, 0).tolist() == [6, 9, 3, 2, 1, 7, 5, 8, 4, 0]


@pytest.mark.parametrize(
    ("n", "has_val", "has_test", "expected"),
    [
        (4999, False, False, (0.2, 0.2)),
        (5000, False, False, (0.1, 0.1)),
        (400, False, True, (0.1, 0.0)),
        (400, True, False, (0.0, 0.2)),
        (9000, True, False, (0.0, 0.1)),
        (400, True, True, (0.0, 0.0)),
    ],
)
def test_shares_by_what_the_source_brings(n, has_val, has_test, expected):
    assert fractions(n, has_val, has_test) == expected


def test_loaded_splits_are_disjoint_and_stratified(tmp_path):
    task = load(str(write_folder(tmp_path / "set", {"ant": 10, "bee": 30})))
    found = [set(keys(split)) for split in task.splits.values()]
    assert len(set.union(*found)) == sum(map(len, found)) == 40
    counts = {part: torch.bincount(split.labels).tolist() for part, split in task.splits.items()}
    assert counts == {"train": [6, 18], "val": [2, 6], "test": [2, 6]}
