"""`nasctl prune`: a user's own network of two tasks, one of ours, and what is refused."""

from __future__ import annotations

import contextlib
import copy
import importlib
import json
import os
import shutil
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import onnx as onnx_file
import pytest
import torch

from cli import child, main, measuring, prune, pruning
from cli.training import Training, space_for
from compress import losses, norms, room
from compress.history import History
from deploy import bundle as bundles
from deploy import interface, onnx
from hw_profiles import device
from hw_profiles.protocol import Timing
from hw_profiles.runtimes import onnxruntime
from nas import checkpoint, multitask, multitask_training, tasks
from nas import run as runs
from nas.errors import NasctlError, UsageError

pytestmark = pytest.mark.usefixtures("drafts")

REPOSITORY = Path(__file__).parents[1]
MODULE = """
import torch
from torch import nn

from nas.data.examples import Examples
from nas.goals import box, classes
from nas.multitask import MultiTask


class Net(nn.Module):
    def __init__(self, width=16):
        super().__init__()
        self.a = nn.Conv2d(1, width, 3, padding=1)
        self.b = nn.Conv2d(width, width, 3, padding=1)
        self.quadrant = nn.Linear(4 * width, 4)
        self.where = nn.Linear(4 * width, 4)

    def forward(self, x):
        x = self.b(self.a(x).relu()).relu()
        x = nn.functional.adaptive_avg_pool2d(x, 2).flatten(1)
        return {"quadrant": self.quadrant(x), "where": self.where(x)}


class Steps(nn.Module):
    def __init__(self):
        super().__init__()
        self.a = nn.Linear(64, 4)

    def forward(self, x):
        x = x.flatten(1)
        for _ in range(int(x.sum() > 0)):
            x = x * 2
        return {"quadrant": torch.tensor(self.a(x).tolist()), "where": torch.zeros(len(x), 4)}


class Branching(Net):
    def forward(self, x):
        out = super().forward(x)
        return {k: v * 2 for k, v in out.items()} if x.mean() > 100 else out


def branching():
    torch.manual_seed(0)
    return Branching()


def build():
    torch.manual_seed(0)
    return Net()


def untraceable():
    return Steps()


class Normed(Net):
    def __init__(self):
        super().__init__()
        self.a = nn.Sequential(self.a, nn.BatchNorm2d(16))


def normed():
    torch.manual_seed(0)
    return Normed().eval()


def number():
    return 3


def split(n, seed):
    g = torch.Generator().manual_seed(seed)
    labels = torch.arange(n) % 4
    images = torch.randint(0, 160, (n, 1, 8, 8), generator=g)
    boxes = torch.zeros(n, 4)
    for i, label in enumerate(labels.tolist()):
        row, column = 4 * (label // 2), 4 * (label % 2)
        images[i, :, row:row + 4, column:column + 4] += 90
        boxes[i] = torch.tensor([column, row, column + 4, row + 4]) / 8
    return Examples(images.to(torch.uint8), {"label": labels, "box": boxes})


def task():
    goals = (classes("quadrant", target="label"), box("where", target="box"))
    return MultiTask("quadrants", goals, split(256, 0), split(96, 1), split(96, 2), boxes=("box",))
"""
MINE = ("prune", "mine:build", "--weights", "w.safetensors", "--data", "mine:task", "--threads", 1)
LITTLE = (*MINE, "--divisor", 4, "--rounds", 1, "--epochs", 2, "--batch", 32)
WORDS = (*LITTLE, "--target", "macs=-50%", "--max-drop", "quadrant=20%,where=30%")
TIMER, TRACE = measuring.timer, onnx._trace  # the real ones


def by_weights(on, board, seed, rough=False):
    """A clock on which a network of half the weights is twice as fast."""

    def timing(path):
        tensors = onnx_file.load(path).graph.initializer
        ms = float(sum(np.prod(tensor.dims) for tensor in tensors))
        return Timing(ms, ms, ms, ms, 0.0, 9)

    return lambda paths: [timing(path) for path in paths]


def read(bundle, name):
    return json.loads(bundle.path(name).read_text())


@contextlib.contextmanager
def at_home(folder):
    """In that folder with a network and its data in a module, which it gives, and a pretended
    clock."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.syspath_prepend(str(folder))
        (folder / "mine.py").write_text(MODULE)
        sys.modules.pop("mine", None)
        patch.setattr(measuring, "timer", by_weights)
        yield importlib.import_module("mine")
        sys.modules.pop("mine", None)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A folder with the weights of the network trained."""
    folder = tmp_path_factory.mktemp("trained")
    torch.set_num_threads(1)
    with at_home(folder) as mine:
        net = mine.build()
        schedule = multitask_training.Schedule(steps=120, batch=32, lr=0.1)
        for _ in multitask_training.train(net, mine.task(), schedule):
            pass
    checkpoint.write(folder / "w.safetensors", net.state_dict(), {})
    return folder


@pytest.fixture(scope="module")
def pruned(trained):
    """The same folder with a finished run `r` of WORDS."""
    with at_home(trained):
        assert main.run([str(word) for word in (*WORDS, "--run", "r")]) == 0
    return trained


@pytest.fixture
def mine(trained, workdir):
    """The module, beside the trained weights in a folder of the test's own."""
    shutil.copy(trained / "w.safetensors", workdir)
    with at_home(workdir) as module:
        yield module


def test_a_network_of_two_tasks_of_ones_own(pruned, mine, nasctl, workdir):
    shutil.copytree(pruned / "r", workdir / "r")
    outcome = nasctl(*WORDS, "--run", "r", "--json")  # not repeated
    assert outcome.code == 0, outcome.err
    report = json.loads(outcome.out)
    assert report["counts"]["MACs"]["after"] <= 0.5 * report["counts"]["MACs"]["before"]
    assert [row["task"] for row in report["tasks"]] == ["quadrant", "where"]
    for row in report["tasks"]:
        assert row["val"]["change"]["value"] >= -row["max_drop"]
        assert row["test"]["images"] == 96 and row["val"]["images"] == 48
    assert report["latency"]["after"]["median_ms"] > 0
    # what came out needs no code but the builder: history, weights and file agree
    history = History.from_json((workdir / "r/history.json").read_text())
    images = mine.task().normalise(mine.split(5, 3).images)
    net = history.replay(mine.build(), images[:1])
    weights = workdir / "r/model.safetensors"
    checkpoint.fill(net, checkpoint.read(weights)[0], weights)
    session = onnxruntime.load(workdir / "r/bundle/model.onnx")
    found = onnxruntime.run(session, {"input": images.numpy()})
    for name, value in zip(session.outputs, found, strict=True):
        with torch.no_grad():
            assert np.abs(value - net.eval()(images)[name].numpy()).max() < 1e-4
    made = bundles.read(workdir / "r/bundle")
    assert set(made.of("model")) == {"model.onnx", "unpruned.onnx"}
    for name, which in (("unpruned.onnx", "before"), ("model.onnx", "after")):
        told = {p.key: p.value for p in onnx_file.load(made.path(name)).metadata_props}
        assert {"commit", "run", "input", "data_sha256"} < set(told)
        scores = {row["task"]: row["val"][which] for row in report["tasks"]}
        assert json.loads(told["validation"]) == pytest.approx(scores)
        assert json.loads(told["arch"]) | {"pruned": 0} == read(made, "arch.json") | {"pruned": 0}
    said = interface.read(made.path("task.json"))
    assert list(said.outputs) == list(session.outputs) and said.shape == tuple(images.shape[1:])
    assert said.data_sha256 == multitask.load("mine:task").fingerprint
    assert report == json.loads((pruned / "r/report.json").read_text())
    shown = nasctl("report", "r")
    assert shown.code == 0 and "quadrant, test" in shown.out
    left = {path.name for path in (workdir / "r").iterdir()} - {".lock"}
    assert left == {"run.json", "report.json", "history.json", "model.safetensors", "bundle"}


def test_interrupted_in_its_training_it_goes_on_there(pruned, mine, nasctl, monkeypatch):
    whole = json.loads((pruned / "r/report.json").read_text())
    begun = []

    def interrupted(*arguments, original=multitask_training.goal_losses):
        begun.append(arguments)
        if len(begun) == 5:
            os.kill(os.getpid(), 2)
        return original(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(multitask_training, "goal_losses", interrupted)
        assert nasctl(*WORDS, "--run", "r").code == 130
        assert len(begun) == 5
        resumed = json.loads(nasctl(*WORDS, "--run", "r", "--json").out)
    assert len(begun) == 16  # two epochs of eight steps
    for name in ("tasks", "counts", "units"):
        assert resumed[name] == whole[name]


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(2))
def test_killed_at_random_moments_it_ends_the_same(mine, workdir, seed):
    words = [str(word) for word in (*LITTLE, "--target", "macs=-50%", "--max-drop", "40%")]
    words += ["--rounds", "2", "--json", "--run"]
    environment = {**os.environ, "PYTHONPATH": f"{REPOSITORY}:{workdir}"}

    def start(folder):
        command = [sys.executable, "-m", "cli.main", *words, folder]
        return subprocess.Popen(command, stdout=subprocess.PIPE, env=environment)

    began = time.monotonic()
    whole = json.loads(start("whole/run").communicate()[0])
    took, kills = time.monotonic() - began, 0
    for share in np.random.default_rng(seed).uniform(0.3, 0.9, 5):
        process = start("killed/run")
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(share * took)
        kills += process.poll() is None
        process.kill()
        process.communicate()
    found = json.loads(start("killed/run").communicate()[0])
    assert kills > 0
    for name in ("tasks", "counts", "units"):
        assert found[name] == whole[name]
    files = ("model.safetensors", "history.json", "bundle/model.onnx")
    for name in files:
        assert (workdir / "killed/run" / name).read_bytes() == (
            workdir / "whole/run" / name
        ).read_bytes()


@pytest.mark.slow  # a file for each width of each unit
def test_a_target_in_milliseconds(mine, nasctl):
    words = (*LITTLE, "--target", "latency=-40%", "--max-drop", "90%")
    outcome = nasctl(*words, "--run", "r", "--json")
    assert outcome.code == 0, outcome.err
    timings = json.loads(outcome.out)["latency"]
    assert timings["after"]["median_ms"] <= 0.6 * timings["before"]["median_ms"]


def test_files_are_timed_in_turn_on_this_machine(mine, workdir, monkeypatch):
    monkeypatch.setattr(measuring, "FILES_S", 0.5)
    paths = []
    for width in (4, 64):
        paths.append(workdir / f"{width}.onnx")
        onnx.draft(mine.Net(width).eval(), paths[-1], torch.zeros(1, 1, 32, 32))
    narrow, wide = TIMER("local", device.load("cpu"), 0)(paths)
    assert 0 < narrow.median_ms < wide.median_ms


def test_a_target_beyond_the_bounds_says_how_far_it_got(mine, nasctl):
    outcome = nasctl(*LITTLE, "--target", "macs=-93%", "--max-drop", "1%", "--run", "r")
    assert outcome.code == 3
    assert "as far as it goes within the bounds" in outcome.err
    assert len(outcome.err.splitlines()[-1]) < 400


def test_a_task_that_lost_too_much_is_exit_3_and_the_files_are_kept(mine, nasctl, workdir):
    harsh = ("--epochs", 0, "--method", "random", "--max-drop", "quadrant=0.01%,where=0.01%")
    outcome = nasctl(*MINE, "--divisor", 1, *harsh, "--target", "macs=-90%", "--run", "r")
    assert outcome.code == 3, outcome.err
    assert "lost" in outcome.err and "0.01 % may go" in outcome.err
    assert (workdir / "r/bundle/model.onnx").is_file()


@pytest.mark.parametrize(
    ("words", "code", "fragments"),
    [
        (("--target", "macs=-50%", "--max-drop", "0%"), 2, ("of 0% nothing", "above zero")),
        (("--target", "macs=-50%", "--max-drop", "quadrant=1%"), 2, ("where=2%",)),
        (("--target", "macs=-50%", "--max-drop", "wher=1%"), 2, ("'wher'", "mean where")),
        (("--target", "macs=-50%", "--tasks", "quadrnt"), 2, ("--tasks", "mean quadrant")),
        (("--target", "macs=50"), 2, ("--target", "MMACs")),
        (("--target", "latency=-100%"), 2, ("leaves nothing",)),
        (("--target", "macs=-0%"), 2, ("leaves everything",)),
        (("--target", "latency=3"), 2, ("--target: '3' has no unit",)),
        (("--target", "flops=-50%"), 2, ("macs=-60%",)),
        (("--target", "macs=100GMACs"), 2, ("less than it has",)),
        (("--target", "macs=-50%", "--method", "pacgp"), 2, ("mean pagcp",)),
        (("--target", "latency=-50%", "--hw", "jetson"), 2, ("is not this machine",)),
        (("--target", "macs=-50%", "--rounds", "0"), 2, ("--rounds",)),
        (("--target", "macs=-50%", "--method", "halp", "--rounds", "2"), 2, ("one round",)),
        (("--target", "macs=-50%", "--batch", "1"), 2, ("--batch",)),
    ],
)
def test_bad_words_are_one_line(mine, nasctl, words, code, fragments):
    outcome = nasctl(*MINE, *words, "--run", "r")
    assert outcome.code == code, outcome.err
    line = outcome.err.splitlines()[-1]
    assert line.startswith("nasctl: ")
    for fragment in fragments:
        assert fragment in line


def test_a_network_that_knows_nothing_has_nothing_to_lose(mine, nasctl, workdir):
    net = mine.build()
    net.where.bias.data[:] = torch.tensor([9.0, 9.0, -30.0, -30.0])  # a point
    net.where.weight.data[:] = 0
    checkpoint.write(workdir / "w.safetensors", net.state_dict(), {})
    outcome = nasctl(*LITTLE, "--target", "macs=-50%", "--run", "r")
    assert outcome.code == 1
    assert "task 'where': the unpruned network scores" in outcome.err


@pytest.mark.parametrize(
    ("model", "fragments"),
    [
        ("mine:number", ("gave a int", "a torch module")),
        ("mine:untraceable", ("operation 'tolist' cuts it",)),
        ("mine:nothing", ("no 'nothing'",)),
        ("elsewhere.safetensors", ("no model",)),
    ],
)
def test_models_that_cannot_be_pruned(mine, nasctl, model, fragments):
    outcome = nasctl("prune", model, "--data", "mine:task", "--target", "macs=-50%", "--run", "r")
    assert outcome.code in (1, 2)
    assert "Traceback" not in outcome.err
    for fragment in fragments:
        assert fragment in outcome.err.splitlines()[-1]


@pytest.mark.parametrize("method", ["pagcp", "magnitude"])
def test_a_dry_run_says_how_long(mine, nasctl, workdir, method):
    words = (*LITTLE, "--target", "macs=-50%", "--method", method, "--dry-run", "--json")
    outcome = nasctl(*words, "--run", "r")
    assert outcome.code == 0, outcome.err
    found = json.loads(outcome.out)["estimated_seconds"]
    assert ("pruning, at most" in found) is (method == "pagcp")
    assert all(seconds > 0 for seconds in found.values()) and not (workdir / "r").exists()


@pytest.mark.parametrize("words", [[], ["--dry-run"]])
def test_what_cannot_be_exported_is_told_before_any_work(mine, nasctl, monkeypatch, words):
    monkeypatch.setattr(onnx, "_trace", TRACE)  # the drafts of these tests follow one branch
    for place in ("trained", "pruned"):
        monkeypatch.setattr(pruning, place, lambda *_: pytest.fail("work was begun"))
    outcome = nasctl("prune", "mine:branching", *LITTLE[2:], "--target", "macs=-50%", *words)
    assert outcome.code == 1
    assert "torch cannot export Branching" in outcome.err.splitlines()[-1]


@pytest.mark.parametrize(("typed", "goes_on"), [([], "MIT"), (["--licence", "BSD"], "BSD")])
def test_the_licence_of_a_search_goes_on_unless_another_is_stated(nasctl, workdir, typed, goes_on):
    fields = {"space": "resnet", "width": 0.25, "epochs": 1, "threads": 1, "licence": "MIT"}
    spec, task = runs.make_spec({**fields, "alone": True}), tasks.load("digits")
    searched = Training(spec, runs.Run(workdir), task, space_for(spec, task))
    genes = searched.space.smallest
    net = searched.space.build(searched.space.decode(genes))
    path = workdir / "model.safetensors"
    checkpoint.write_described(path, net, child.describe(searched, genes))
    outcome = nasctl("prune", path, "--target", "macs=-10%", "--dry-run", "--json", *typed)
    assert outcome.code == 0, outcome.err
    assert json.loads(outcome.out)["spec"]["licence"] == goes_on


def test_drops_as_typed():
    assert prune.parse_drops("2%", ["a", "b"]) == {"a": 0.02, "b": 0.02}
    assert prune.parse_drops("b=1.5%, a=3%", ["a", "b"]) == {"a": 0.03, "b": 0.015}
    for text, said in {
        "a=1%,b=0.0%": "bound of 0.0% nothing may change",
        "200%": "bound of 200% everything may go",
        "a=1%,b=2%,a=20%": "names a twice",
    }.items():
        with pytest.raises(UsageError, match=said):
            prune.parse_drops(text, ["a", "b"])


def row(task, change, max_drop=0.1):
    return {"task": task, "max_drop": max_drop, "val": {"change": {"value": change}}}


@pytest.mark.parametrize(
    ("rows", "ms", "code", "said"),
    [
        ([row("class", -0.01), row("box", float("nan"))], 1.0, 3, "box scores no number any more"),
        ([row("class", -0.01), row("box", -0.11)], 1.0, 3, "box lost 11.0 %"),
        ([row("class", -0.01), row("box", -0.1)], 1.015, 4, "the target is 1 ms: 1.5 % over"),
        ([row("class", -0.01), row("box", -0.1)], 1.0, 0, ""),
    ],
)
def test_the_last_word_is_of_what_was_measured(rows, ms, code, said):
    spec = SimpleNamespace(quantity="latency", target=1.0, relative=False)
    pruning = SimpleNamespace(spec=spec, run=runs.Run(Path("r")))
    timed = {"before": {"median_ms": 2.0}, "after": {"median_ms": ms}}
    with contextlib.nullcontext() if code == 0 else pytest.raises(NasctlError, match=said) as error:
        prune._require_bounds(pruning, {"tasks": rows, "latency": timed})
    assert code == 0 or error.value.exit_code == code


WANTED = dict(model="mine:build", data="mine:task", weights="w.safetensors", threads=1)
WANTED |= dict(hw="cpu", on="local", epochs=1.0, divisor=4)


@pytest.mark.parametrize("network", [{}, {"model": "mine:normed", "weights": None}])
def test_a_pruning_killed_afterwards_is_read_again(mine, workdir, monkeypatch, network):
    words = {**WANTED, **network, "method": "uniform", **prune.parse_target("macs=-50%")}
    first = pruning.pruned(prune.prepare(dict(words), None, "20%", workdir / "r"))
    with monkeypatch.context() as patch:
        patch.setattr(pruning, "job", lambda *_: pytest.fail("pruned again"))
        again = pruning.pruned(prune.prepare(dict(words), None, "20%", workdir / "r"))
    assert again.history == first.history and repr(again.rows) == repr(first.rows)
    for name, tensor in first.net.state_dict().items():
        assert torch.equal(tensor, again.net.state_dict()[name])
    (workdir / "r/prune-0.jsonl").unlink()
    other = {**words, **prune.parse_target("macs=-20%")}  # another key
    milder = pruning.pruned(prune.prepare(other, None, "20%", workdir / "r"))
    assert milder.cost > first.cost


def test_statistics_of_batch_norms_are_of_training_images(mine, workdir):
    words = {**WANTED, "method": "pagcp", **prune.parse_target("macs=-50%")}
    bare = prune.prepare(dict(words), None, "20%", workdir / "r")
    assert pruning.job(bare, bare.subject.net).calibration is None
    words |= {"model": "mine:normed", "weights": None}
    asked = prune.prepare(words, None, "20%", workdir / "r")
    job = pruning.job(asked, asked.subject.net)
    own = mine.task()
    known = {image.numpy().tobytes() for image in own.normalise(own.train.images)}
    taken = {image.numpy().tobytes() for image in job.calibration}
    assert taken < known and len(taken) == norms.IMAGES
    assert torch.equal(job.calibration, pruning.job(asked, asked.subject.net).calibration)
    # ceilings are of the network as it is judged
    whole = job.renewed(copy.deepcopy(job.net))
    bound = pruning.settings(asked.spec, job).bound
    drops = dict.fromkeys(bound.shares, 0.2)
    assert bound == room.of(whole, job.objectives, job.batches, drops)
    assert bound != room.of(job.net, job.objectives, job.batches, drops)


def test_trainings_between_rounds_begin_with_other_images(mine, workdir, monkeypatch):
    words = {**WANTED, "method": "pagcp", "seed": 7, **prune.parse_target("macs=-50%")}
    asked = prune.prepare(words, None, "20%", workdir / "r")
    seeds = [asked.schedule.seed]
    monkeypatch.setattr(
        pruning, "trained", lambda p, net, schedule, *_: seeds.append(schedule.seed)
    )
    for number in range(3):
        pruning._recover(asked, None, number)
    assert seeds == [7, 8, 9, 10]


def test_a_start_after_a_kill_has_the_same_target_in_milliseconds(mine, workdir, monkeypatch):
    """Whatever the clock says then, of the whole network or of others."""
    words = {**WANTED, "method": "uniform", **prune.parse_target("latency=-40%")}
    (workdir / "r").mkdir()
    found = []
    for slower in (1.0, 1.3):

        def timer(*_, slower=slower, **__):
            clock = by_weights(None, None, 0)

            def times(paths):
                timings = enumerate(clock(paths))
                return [replace(t, median_ms=slower ** (at + 1) * t.median_ms) for at, t in timings]

            return times

        monkeypatch.setattr(measuring, "timer", timer)
        asked = prune.prepare(dict(words), None, "20%", workdir / "r")
        found.append(pruning.pruned(asked))
        assert pruning.job(asked, asked.subject.net).target == found[0].cost_before * 0.6 / 1.02
        (workdir / "r/pruned.safetensors").unlink()
    assert found[0].history == found[1].history and found[0].cost == found[1].cost


def test_bounds_follow_what_may_drop_even_where_drops_are_equal(mine, workdir):
    """6 for every task, whether 1 % or 50 % was typed: that steered nothing."""
    words = {**WANTED, "method": "pagcp", **prune.parse_target("macs=-50%")}
    found = {}
    for drop in ("1%", "50%"):
        asked = prune.prepare(dict(words), None, drop, workdir / "r")
        job = pruning.job(asked, asked.subject.net)
        settings = pruning.settings(asked.spec, job)
        before = losses.measure(job.net, job.objectives, job.batches).values
        found[drop] = settings.bounds(before)
        assert all(
            bound * before[t] < settings.bound.ceilings[t] for t, bound in found[drop].items()
        )
    assert all(found["50%"][task] > bound > 1 for task, bound in found["1%"].items())


def test_what_was_trained_for_other_inputs_is_not_taken(trained, mine, workdir, monkeypatch):
    """A kill before the delivery leaves the file of a training; then the images change."""
    words = {**WANTED, "method": "random", **prune.parse_target("macs=-50%")}
    told = []
    images, train = mine.split, multitask_training.train
    monkeypatch.setattr(
        multitask_training, "train", lambda *a, **k: told.append(1) or train(*a, **k)
    )
    for change in (0, 0, 1):
        with monkeypatch.context() as patch:
            patch.setattr(mine, "split", lambda n, seed, by=change: images(n, seed + by * (n > 99)))
            found = prune.prepare(dict(words), None, "20%", workdir / "r")
        net = pruning.trained(found, mine.build(), found.schedule, pruning.TUNED, "training")
        assert not net.training
    assert len(told) == 2
