import re
import sys

import pytest
import torch
from pictures import message_of

from nas.errors import UsageError
from nas.tasks import load

TASK_MODULE = """
import torch
from nas.tasks import Split, Task

split = Split(torch.arange(192).to(torch.uint8).view(4, 3, 4, 4), torch.tensor([0, 1, 0, 1]))
ready = Task("mine", ("a", "b"), split, split, split, flip=True)
number = 7

def make():
    return ready

def needs(argument):
    return ready

def fails():
    raise KeyError("no such\\ncamera")

def quits():
    raise SystemExit("stop here")

def invalid():
    return Task("mine", ("a", "b"), Split(split.images.float(), split.labels), split, split)
"""


@pytest.fixture
def own(tmp_path, monkeypatch, request):
    """A module in the current folder under a name that no other test has imported."""
    name = "own_" + re.sub(r"\W", "_", request.node.name)
    (tmp_path / f"{name}.py").write_text(TASK_MODULE)
    monkeypatch.chdir(tmp_path)
    return name


def test_module_with_a_task_or_a_callable(own):
    assert load(f"{own}:ready").flip is True
    assert load(f"{own}:make").fingerprint == load(f"{own}:ready").fingerprint
    assert load(f"{own}:make", size=4).size == 4


def test_parts_of_a_modules_images_are_fair_samples(own):
    """Its rows are mixed, each with its own label."""
    images = torch.arange(192).to(torch.uint8).view(4, 3, 4, 4)
    order = load(f"{own}:ready").train
    rows = [int((images == image).flatten(1).all(1).nonzero()) for image in order.images]
    assert sorted(rows) == [0, 1, 2, 3] != rows
    assert order.labels.tolist() == [row % 2 for row in rows]


def test_sys_path_is_left_as_it_was(own):
    before = list(sys.path)
    load(f"{own}:make")
    assert sys.path == before


@pytest.mark.parametrize(
    ("attribute", "expected"),
    [
        ("missing", "has no 'missing'; allowed: Split, Task, fails"),
        ("number", "gave a int; allowed: a nas.tasks.Task"),
        ("fails", "KeyError: 'no such\\ncamera' ("),
        ("quits", "SystemExit: stop here"),
        ("needs", "missing 1 required positional argument: 'argument' (on the call)"),
        ("invalid", "task 'mine' train: images is float32 [4, 3, 4, 4]; allowed: uint8"),
    ],
)
def test_module_that_does_not_give_a_task(own, attribute, expected):
    assert expected in message_of(f"{own}:{attribute}")


def test_module_failure_names_file_and_line(own):
    line = 1 + TASK_MODULE.splitlines().index('    raise KeyError("no such\\ncamera")')
    assert f"{own}.py:{line})" in message_of(f"{own}:fails")


def test_module_not_found_and_module_whose_import_fails(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert "no module named 'absent_pkg'" in message_of("absent_pkg.tasks:make", UsageError)
    (tmp_path / "needs_absent.py").write_text("import absent_dependency\n")
    message = message_of("needs_absent:make")
    assert "No module named 'absent_dependency'" in message
    assert "needs_absent.py:1" in message
    (tmp_path / "wrong_syntax.py").write_text("x = 1\ndef broken(:\n")
    assert "wrong_syntax.py:2" in message_of("wrong_syntax:make")


def test_size_does_not_apply_to_a_module(own):
    assert "--size 9 does not apply" in message_of(f"{own}:ready", UsageError, size=9)


def test_our_own_errors_are_not_blamed_on_the_module(own):
    assert "the module failed" not in message_of(f"{own}:invalid")
    assert "the module failed" in message_of(f"{own}:fails")
