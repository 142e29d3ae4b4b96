"""`nasctl search` killed at any moment ends, when repeated, as if it had never been killed."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest

COMMAND = [
    sys.executable,
    "-m",
    "cli.main",
    "search",
    "--no-alone",
    "--hw",
    "jetson",
    "--width",
    "0.25",
]
COMMAND += ["--threads", "1", "--batch", "64"]
TINY = ["--epochs", "0.5", "--evaluations", "5"]
SHORT = ["--epochs", "3", "--evaluations", "20"]
LONG = ["--epochs", "12", "--evaluations", "40"]
LIMIT_S = 180


def start(folder, words):
    program = [*COMMAND, *words, "--run", str(folder)]
    return subprocess.Popen(program, stderr=subprocess.PIPE, text=True, cwd=folder.parent)


def finish(folder, words):
    process = start(folder, words)
    _, err = process.communicate(timeout=LIMIT_S)
    assert process.returncode == 0, err


def killed_when(process, reached, number=signal.SIGKILL):
    """Send a signal as soon as `reached(lines of stderr)`; return the exit code and those lines.

    A thread drains the pipe, so that the process never waits for us.
    """
    said: list[str] = []
    reader = threading.Thread(target=lambda: said.extend(process.stderr))
    reader.start()
    deadline = time.monotonic() + LIMIT_S
    while process.poll() is None and not reached(said):
        assert time.monotonic() < deadline
        os.sched_yield()
    if process.poll() is None:
        process.send_signal(number)
    code = process.wait(timeout=LIMIT_S)
    reader.join()
    process.stderr.close()
    return code, said


def lines(path):
    return path.read_bytes().count(b"\n") if path.exists() else 0


def sha256(path):
    return hashlib.sha256(path.read_bytes()).hexdigest()


def outcome(folder):
    """All of a run that must not depend on its interruptions."""
    report = json.loads((folder / "report.json").read_text())
    chosen = report["chosen"]
    return {
        "arch": chosen["arch"],
        "val_ce": chosen["val_ce"],
        "test_accuracy": chosen["test_accuracy"],
        "evaluated": report["evaluated"],
        "front": report["front"],
        "supernet": sha256(folder / "supernet.safetensors"),
        "model": sha256(folder / "model.safetensors"),
    }


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole") / "run"
    finish(folder, SHORT)
    return outcome(folder)


@pytest.mark.slow
def test_killed_while_searching_it_ends_the_same(tmp_path):
    whole, folder = tmp_path / "whole", tmp_path / "run"
    journal = folder / "study.journal"
    code, _ = killed_when(start(folder, TINY), lambda _: lines(journal) > 30)
    assert code == -signal.SIGKILL and not (folder / "pareto.json").exists()
    finish(folder, TINY)
    finish(whole, TINY)
    assert outcome(folder) == outcome(whole)


@pytest.mark.slow
def test_interrupted_while_training_it_says_so_saves_and_goes_on(uninterrupted, tmp_path):
    folder = tmp_path / "run"
    code, said = killed_when(
        start(folder, SHORT),
        lambda said: any(line.startswith("supernet ") for line in said),
        signal.SIGINT,
    )
    assert code == 130
    assert said[-1] == "nasctl: interrupted; the same command goes on from here\n"
    assert not any("Traceback" in line for line in said)
    finish(folder, SHORT)
    assert outcome(folder) == uninterrupted


# ---- at many moments -----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def uninterrupted_long(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole") / "run"
    began = time.monotonic()
    finish(folder, LONG)
    return outcome(folder), time.monotonic() - began


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3))
def test_killed_again_and_again_at_random_moments_it_ends_the_same(
    seed, uninterrupted_long, tmp_path
):
    expected, whole_s = uninterrupted_long
    rng, folder, kills = np.random.default_rng(seed), tmp_path / "run", 0
    for wait_s in rng.uniform(0.2, 0.9, 6) * whole_s:
        end = time.monotonic() + wait_s
        code, _ = killed_when(start(folder, LONG), lambda _, end=end: time.monotonic() > end)
        kills += code == -signal.SIGKILL
    finish(folder, LONG)
    assert kills > 0
    assert outcome(folder) == expected


@pytest.mark.slow
@pytest.mark.parametrize(
    "reached",
    [
        pytest.param(lambda run: (run / ".lock").exists(), id="as it takes the lock"),
        pytest.param(lambda run: (run / "supernet.safetensors").exists(), id="as training ends"),
        pytest.param(lambda run: lines(run / "study.journal") > 0, id="as the study begins"),
        pytest.param(lambda run: lines(run / "study.journal") > 60, id="in a later generation"),
        pytest.param(lambda run: (run / "pareto.json").exists(), id="as the search ends"),
        pytest.param(lambda run: (run / "bundle/model.onnx").exists(), id="as it exports"),
        pytest.param(lambda run: (run / "report.json").exists(), id="as it reports"),
    ],
)
def test_killed_at_a_stage_it_ends_the_same(reached, uninterrupted, tmp_path):
    folder = Path(tmp_path / "run")
    killed_when(start(folder, SHORT), lambda _: reached(folder))
    finish(folder, SHORT)
    assert outcome(folder) == uninterrupted
