"""Several real processes under torchrun, talking over gloo: their gradients, deaths and words."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil
import pytest
from safetensors.torch import load_file

from nas import file
from tests.texts import prose, save_teacher

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[1]
LAUNCH = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--no-python"]
TRAIN = [sys.executable, "-m", "cli.main", "train", "--width", "0.25", "--threads", "2"]
TRAIN += ["--batch", "64", "--run", "run"]
LONG = [sys.executable, "-m", "tests.often", *TRAIN[3:], "--epochs", "30"]
LIMIT_S = 300


def environment():
    return {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}


def launched(n, words):
    # without the "--", torchrun takes --run for an abbreviation of an option of its own
    return [*LAUNCH, "--nproc-per-node", str(n), "--", *words] if n > 1 else list(words)


def finish(n, words, folder):
    """Run to the end; (exit code, stdout, stderr)."""
    done = subprocess.run(
        launched(n, words),
        cwd=folder,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=LIMIT_S,
    )
    return done.returncode, done.stdout, done.stderr


def some_steps(folder, n, stop, accumulate):
    """What each process saw."""
    folder.mkdir(exist_ok=True)
    words = [sys.executable, "-m", "tests.some_steps", folder, stop, accumulate]
    code, _, err = finish(n, [str(word) for word in words], folder)
    assert code == 0, err
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(n)]


def momenta(folder):
    """After one step without decay: the gradients."""
    tensors = load_file(folder / "state.safetensors")
    return {name: t for name, t in tensors.items() if name.startswith("momentum.")}


def weights(folder):
    """Without the running statistics, which are the first process's shard's own."""
    tensors = load_file(folder / "state.safetensors")
    return {
        name: tensor
        for name, tensor in tensors.items()
        if name.startswith("net.") and "running" not in name and "batches" not in name
    }


def assert_close(a, b, tolerance):
    assert a.keys() == b.keys() and a
    for name, tensor in a.items():
        error = float((tensor - b[name]).abs().max() / b[name].abs().max().clamp_min(1e-3))
        assert error <= tolerance, (name, error)


# ---- gradients -----------------------------------------------------------------------------------


def test_two_processes_have_the_gradients_of_one_that_accumulates_their_shards(tmp_path):
    first, second = some_steps(tmp_path / "two", n=2, stop=1, accumulate=1)
    (alone,) = some_steps(tmp_path / "one", n=1, stop=1, accumulate=2)
    assert first["archs"] == second["archs"] == alone["archs"]
    assert first["weights"] == second["weights"]  # bit for bit
    assert first["losses"] == second["losses"]
    assert first["losses"][0] == pytest.approx(alone["losses"][0], rel=1e-5)
    assert_close(momenta(tmp_path / "two"), momenta(tmp_path / "one"), 1e-5)
    some_steps(tmp_path / "whole", n=1, stop=1, accumulate=1)  # norms over the whole batch differ
    with pytest.raises(AssertionError):
        assert_close(momenta(tmp_path / "two"), momenta(tmp_path / "whole"), 1e-2)


def test_a_training_goes_on_with_another_number_of_processes(tmp_path):
    some_steps(tmp_path / "mixed", n=2, stop=2, accumulate=1)
    (seen,) = some_steps(tmp_path / "mixed", n=1, stop=4, accumulate=2)
    assert len(seen["losses"]) == 2  # steps 3 and 4
    some_steps(tmp_path / "mixed", n=2, stop=6, accumulate=1)
    some_steps(tmp_path / "one", n=1, stop=6, accumulate=2)
    assert_close(weights(tmp_path / "mixed"), weights(tmp_path / "one"), 1e-3)


# ---- deaths --------------------------------------------------------------------------------------


class Started:
    """A launcher in a session of its own, as in a terminal of its own; its stderr line by line."""

    def __init__(self, words, folder):
        self.lines = []
        self.process = subprocess.Popen(
            launched(2, words),
            cwd=folder,
            env=environment(),
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        self.reader = threading.Thread(target=lambda: self.lines.extend(self.process.stderr))
        self.reader.start()

    def until(self, reached):
        deadline = time.monotonic() + LIMIT_S
        while not reached():
            assert self.process.poll() is None, "".join(self.lines)
            assert time.monotonic() < deadline
            time.sleep(0.05)

    def worker(self, rank):
        (found,) = [
            child
            for child in psutil.Process(self.process.pid).children()
            if child.environ().get("RANK") == str(rank)
        ]
        return found

    def end(self):
        """(exit code, our own lines of error, which may follow a bar on its line)."""
        code = self.process.wait(timeout=LIMIT_S)
        self.reader.join()
        self.process.stderr.close()
        said = "".join(self.lines)
        assert f"{ROOT / 'cli'}" not in said and "cli/main.py" not in said, said  # no traceback
        return code, re.findall("nasctl: .*", said)


def saved_again(path, since):
    return lambda: path.exists() and path.stat().st_mtime_ns > since


def step_of(state):
    header = state.read_bytes()
    size = int.from_bytes(header[:8], "little")
    return int(json.loads(header[8 : 8 + size])["__metadata__"]["step"])


@pytest.mark.parametrize("rank", [0, 1])
def test_a_killed_process_ends_the_others_with_one_line_and_costs_no_saved_work(rank, tmp_path):
    state = tmp_path / "run" / "training.safetensors"
    started = Started(LONG, tmp_path)
    started.until(saved_again(state, 0))
    saved = step_of(state)
    started.worker(rank).send_signal(signal.SIGKILL)
    code, said = started.end()
    assert code != 0 and len(said) == 1
    assert "another process of this training ended" in said[0] or "interrupted" in said[0]
    assert step_of(state) >= saved > 0
    code, out, err = finish(1, [*LONG, "--json"], tmp_path)
    assert code == 0, err
    assert json.loads(out)["trained_now"] and not state.exists()


def test_an_interrupt_stops_all_at_one_step_saves_and_says_so_once(tmp_path):
    state = tmp_path / "run" / "training.safetensors"
    started = Started(LONG, tmp_path)
    started.until(saved_again(state, 0))
    saved = step_of(state)
    os.killpg(started.process.pid, signal.SIGINT)  # a terminal's Ctrl-C goes to every process
    code, said = started.end()
    assert code != 0
    assert said == ["nasctl: interrupted; the same command goes on from here"]
    assert step_of(state) > saved


# ---- words ---------------------------------------------------------------------------------------

TASK = """
import os
import torch
from nas.errors import NasctlError
from nas.tasks import Split, Task

rank = int(os.environ["RANK"])

def split(n, bright):
    labels = torch.arange(n) % 4
    images = torch.full((n, 1, 8, 8), bright, dtype=torch.uint8) + labels[:, None, None, None]
    return Split(images.to(torch.uint8), labels)

def task():
    if {fails} and rank == 1:
        raise NasctlError("no data on this machine", where="--data")
    shown = 100 + ({differs} and rank)
    return Task("mine", ("a", "b", "c", "d"), split(256, shown), split(16, 100), split(16, 100))
"""


@pytest.mark.parametrize(
    ("module", "said"),
    [
        ({"fails": False, "differs": True}, "process [01] has data "),
        ({"fails": True, "differs": False}, "no data on this machine"),
    ],
)
def test_what_one_process_finds_wrong_ends_all_with_one_line(module, said, tmp_path):
    (tmp_path / "mine.py").write_text(TASK.format(**module))
    started = Started([*TRAIN, "--epochs", "1", "--data", "mine:task"], tmp_path)
    code, lines = started.end()
    assert code != 0 and len(lines) == 1, lines
    assert re.search(said, lines[0])
    assert not (tmp_path / "run").exists()


def test_a_mistyped_word_is_said_once(tmp_path):
    code, out, err = finish(2, [*TRAIN, "--epoch", "1"], tmp_path)
    assert code != 0 and out == ""
    assert len([line for line in err.splitlines() if line.startswith("nasctl: ")]) == 1


def test_a_supernet_of_two_processes_is_as_any_other(tmp_path):
    words = [*TRAIN, "--epochs", "0.5"]
    code, out, err = finish(2, [*words, "--json"], tmp_path)
    assert code == 0, err
    assert "2 processes, 1 micro-batches each: batch norms see 32 of a step's 64 images" in err
    assert err.count("run       run") == 1  # the first process alone talks
    before = file.sha256(tmp_path / "run/supernet.safetensors")
    assert json.loads(out)["trained_now"]
    code, out, err = finish(1, [*words, "--json"], tmp_path)  # finished, for one process too
    assert code == 0 and not json.loads(out)["trained_now"], err
    assert file.sha256(tmp_path / "run/supernet.safetensors") == before
    judge = [sys.executable, "-m", "cli.main", "evaluate", "run", "--arch", "largest", "--json"]
    code, out, err = finish(1, judge, tmp_path)
    assert code == 0, err
    assert 0 <= json.loads(out)["accuracy"] <= 1


# ---- distillation --------------------------------------------------------------------------------


def test_a_distillation_ends_alike_on_two_processes_and_one(tmp_path):
    save_teacher(tmp_path / "teacher")
    (tmp_path / "text.txt").write_text(prose(200))
    words = [sys.executable, "-m", "cli.main", "distill", "--teacher", "teacher"]
    words += ["--text", "text.txt", "--sequence", "12", "--batch", "8", "--epochs", "0.5"]
    words += ["--subspaces", "tiny", "--threads", "2", "--hw", "jetson-tx2", "--json", "--run"]
    alone, both = (finish(n, [*words, f"run{n}"], tmp_path) for n in (1, 2))
    assert (alone[0], both[0]) == (0, 0), both[2]
    told = [json.loads(out)["students"][1] for _, out, _ in (alone, both)]  # one voice: one JSON
    assert told[1]["arch"] == told[0]["arch"]
    assert told[1]["loss"] == pytest.approx(told[0]["loss"], rel=1e-3)
    again = finish(2, [*words, "run2"], tmp_path)
    assert again[1] == both[1] and "tiny" not in again[2]  # nothing is trained twice
