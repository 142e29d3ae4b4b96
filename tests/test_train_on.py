"""`--train-on`: every verb that trains, on a device that refuses what is not on it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from cli import accelerator
from nas.errors import UsageError

ROOT = Path(__file__).parents[1]


def compared(folder, *verbs):
    """What `tests.on_a_pretended_device` found."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.on_a_pretended_device", str(folder), *verbs],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def assert_alike(found, least):
    for verb, outcome in found.items():
        assert outcome["codes"] == [0, 0], verb
        assert outcome["operations"] > least, verb  # it was the device that worked
        assert outcome["tensors"] > 0 and outcome["differ"] == [], verb


def test_a_supernet_is_trained_there_and_is_the_same(tmp_path):
    assert_alike(compared(tmp_path, "train"), least=1_000)


@pytest.mark.slow
@pytest.mark.parametrize(
    "verbs",
    [
        ("search", "alone"),
        ("gumbel", "proxyless", "reinforce"),
        ("tasks", "prune"),
        ("together", "prune-together"),
        ("distill",),
    ],
)
def test_so_does_every_verb_that_trains(tmp_path, verbs):
    assert_alike(compared(tmp_path, *verbs), least=1_000)


@pytest.mark.parametrize("name", ["cuda", "cuda:7", "gpu", "", "cuda:x", "meta"])
def test_what_is_not_here_is_told_with_what_is(name):
    assert accelerator.named("cpu").type == "cpu"
    if torch.accelerator.is_available() and name == "cuda":
        pytest.skip("there is one")
    with pytest.raises(UsageError) as told:
        accelerator.named(name)
    assert "--train-on" in str(told.value) and "allowed: cpu" in str(told.value)


@pytest.mark.parametrize("verb", ["train", "search", "search --tasks a,b"])
def test_it_is_told_before_any_work(nasctl, verb):
    outcome = nasctl(*verb.split(), "--train-on", "cuda:63", "--data", "digits")
    assert outcome.code == 2
    assert outcome.err.splitlines()[-1].startswith("nasctl: --train-on: no cuda:63 here")
