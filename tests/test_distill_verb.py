"""`nasctl distill` and `nasctl search --space bert` on a tiny teacher."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import astuple
from pathlib import Path

import numpy as np
import pytest
from texts import prose, save_teacher

from cli import distill, distilling, main, students
from deploy import onnx as files
from hw_profiles.protocol import Timing
from hw_profiles.runtimes import onnxruntime
from nas import checkpoint
from nas.search_spaces.bert import Arch, Frame
from nas.space import arch_from_dict

REPOSITORY = Path(__file__).parents[1]
FLAGS = ["--sequence", "12", "--batch", "8", "--epochs", "0.5", "--threads", "1"]
FLAGS += ["--subspaces", "tiny,base"]
TIMER = students.measuring.timer  # the real one
#: its precision is not that of every file
BOARD = """
name = "quantizing"
summary = "this machine, for networks in INT8"
kind = "cpu"
runtime = "onnxruntime"
precision = "int8"
sources = ["a test"]
local = true
"""


def labelled(n, seed):
    lines = prose(n, seed).splitlines()
    rows = [f"{line} {'good' if at % 2 else 'bad'} film\t{at % 2}" for at, line in enumerate(lines)]
    return "\n".join(["sentence\tlabel", *rows]) + "\n"


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("inputs")
    save_teacher(folder / "teacher")
    (folder / "text.txt").write_text(prose(300))
    (folder / "train.tsv").write_text(labelled(96, 1))
    (folder / "test.tsv").write_text(labelled(40, 2))
    return folder


def words(inputs, run, *more):
    given = ["--teacher", str(inputs / "teacher"), "--text", str(inputs / "text.txt")]
    return ["distill", *given, *FLAGS, "--run", str(run), *more]


def quick_timings(paths):
    """Instead of a minute of measuring: larger files take longer."""
    sizes = [path.stat().st_size / 1e5 for path in paths]
    return [Timing(ms, 0.0, ms, ms, ms, 9) for ms in sizes]


def quick_draft(net, path, example):
    """Instead of half a second of torch's older exporter: as many bytes as the weights."""
    path.write_bytes(bytes(4 * sum(parameter.numel() for parameter in net.parameters())))


@pytest.fixture(autouse=True)
def timed(monkeypatch):
    monkeypatch.setattr(students.measuring, "timer", lambda *_, **__: quick_timings)
    monkeypatch.setattr(students.drafts, "draft", quick_draft)


@pytest.fixture
def nasctl(nasctl):
    """(exit code, stdout, stderr)."""
    return lambda *words: astuple(nasctl(*words))


@pytest.fixture(scope="module")
def finished(inputs, tmp_path_factory):
    """A run without a task, made once; its files are drafted for real."""
    run = tmp_path_factory.mktemp("run") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(students.measuring, "timer", lambda *_, **__: quick_timings)
        assert main.run(words(inputs, run)) == 0
    return run


def test_a_run_that_trained_on_another_device_is_searched_on_this_one(finished, tmp_path):
    run = Path(shutil.copytree(finished, tmp_path / "run"))
    said = json.loads((run / "run.json").read_text())
    said["spec"]["train_on"] = "cuda:7"
    (run / "run.json").write_text(json.dumps(said))
    assert students._opened(run, None).accelerator.type == "cpu"


def test_a_lesson_that_cannot_be_is_refused_before_a_search_does_anything(
    finished, tmp_path, nasctl, monkeypatch
):
    run = Path(shutil.copytree(finished, tmp_path / "run"))
    said = json.loads((run / "run.json").read_text())
    said["spec"]["relation_heads"] = 1000
    (run / "run.json").write_text(json.dumps(said))
    monkeypatch.setattr(students.Run, "done", lambda *_: pytest.fail("it was not said at once"))
    code, _, err = nasctl("search", "--space", "bert", "--supernet", str(run))
    assert code == 2 and "1000" in err


def test_what_older_code_reported_is_delivered_again_and_nothing_trained(
    finished, inputs, tmp_path, nasctl, monkeypatch
):
    run = Path(shutil.copytree(finished, tmp_path / "run"))
    before = {path: path.stat().st_mtime_ns for path in run.glob("*.safetensors")}
    monkeypatch.setattr(distilling, "REPORTED", distilling.REPORTED + 1)
    (run / "report.json").write_text(json.dumps({"students": [{"files": {"int8": {}}}]}))
    code, _, err = nasctl(*words(inputs, run))
    assert code == 0, err
    assert len(json.loads((run / "report.json").read_text())["students"]) == 3
    assert before == {path: path.stat().st_mtime_ns for path in run.glob("*.safetensors")}


def test_a_run_ends_in_a_ranking_and_a_student_of_each_sub_space(finished):
    report = json.loads((finished / "report.json").read_text())
    assert [row["name"] for row in report["students"]] == ["teacher", "tiny", "base"]
    tiny, base = report["students"][1:]
    for name, front in report["fronts"].items():
        assert report["subspaces"][name]["students"] >= len(front) > 0
        costs, losses = ([one[what] for one in front] for what in ("macs", "loss"))
        assert costs == sorted(costs) and losses == sorted(losses, reverse=True)
    assert tiny["macs"] < base["macs"] and tiny["loss"] > base["loss"] >= 0
    assert all(row["latency_ms"] > 0 and row["accuracy"] is None for row in report["students"])
    assert "no --finetune" in report["notes"][0]
    for name in ("tiny", "base"):
        listed = (finished / f"{name}.members.jsonl").read_text().splitlines()
        assert len(listed) == report["subspaces"][name]["students"]
        assert (finished / "students" / f"{name}.safetensors").is_file()
        tensors, _ = checkpoint.read(finished / f"{name}.safetensors")
        assert not tensors["head.weight"].any()  # which nothing trains: not a process's own draw
    assert not list(finished.glob("*.state"))


def test_a_finished_run_is_not_repeated(finished, inputs, nasctl):
    before = {path: path.stat().st_mtime_ns for path in finished.rglob("*.safetensors")}
    code, out, _ = nasctl(*words(inputs, finished))
    assert code == 0 and "teacher" in out
    assert before == {path: path.stat().st_mtime_ns for path in finished.rglob("*.safetensors")}


@pytest.mark.slow
def test_with_a_task_it_ends_in_files_that_do_what_the_report_says(
    inputs, tmp_path, nasctl, monkeypatch
):
    monkeypatch.setattr(students.measuring, "timer", TIMER)
    monkeypatch.setattr(students.measuring, "FILES_S", 2.0)
    run, board = tmp_path / "run", tmp_path / "board.toml"
    board.write_text(BOARD)
    more = ["--finetune", str(inputs / "train.tsv"), "--test", str(inputs / "test.tsv")]
    more += ["--tuning-epochs", "6", "--tuning-lr", "0.001", "--hw", str(board)]
    code, _, err = nasctl(*words(inputs, run, *more))
    assert code == 0, err
    for row in json.loads((run / "report.json").read_text())["students"]:
        assert row["accuracy"] > 0.8
        assert 0 < row["files"]["int8"]["latency_ms"] < 1000 > row["latency_ms"] > 0
        assert row["files"]["differs_by"] < 1e-4
        assert row["files"]["int8"]["bytes"] < row["files"]["onnx"]["bytes"]
        session = onnxruntime.load(run / "students" / f"{row['name']}.onnx")
        assert session.inputs == {"input": ("batch", "tokens")}


def test_a_search_takes_the_best_student_inside_the_budget(finished, tmp_path, nasctl):
    run = tmp_path / "run"
    shutil.copytree(finished, run)
    listed = [
        (space, json.loads(line)["loss"])
        for space in ("tiny", "base")
        for line in (run / f"{space}.members.jsonl").read_text().splitlines()
    ]
    search = ["search", "--space", "bert", "--supernet", str(run), "--json"]
    code, out, _ = nasctl(*search, "--macs", "9MMACs")
    chosen = json.loads(out)["students"][1]
    assert code == 0 and chosen["name"] == "chosen"
    assert chosen["loss"] == min(loss for _, loss in listed)
    limit = (chosen["macs"] - 1) / 1e6
    code, out, _ = nasctl(*search, "--macs", f"{limit:.6f}MMACs")
    cheaper = json.loads(out)["students"][1]
    assert cheaper["macs"] <= limit * 1e6 and cheaper["loss"] >= chosen["loss"]
    code, _, err = nasctl(*search, "--macs", "0.001MMACs")
    assert code == 3 and "the cheapest costs" in err
    code, out, _ = nasctl(*search, "--hw", "jetson-tx2")
    assert code == 0 and "latency on jetson-tx2: not measured" in json.loads(out)["notes"][0]
    code, out, _ = nasctl(*search, "--latency", "100ms")
    assert code == 0 and json.loads(out)["students"][1]["loss"] <= cheaper["loss"]


def test_a_budget_that_the_delivered_file_misses_has_exit_code_4(
    finished, tmp_path, nasctl, monkeypatch
):
    run = Path(shutil.copytree(finished, tmp_path / "run"))
    sessions = iter([0.01, 1000.0])  # the drafts are fast, what is delivered is not

    def timings(paths):
        ms = next(sessions)
        return [Timing(ms, 0.0, ms, ms, ms, 9) for _ in paths]

    monkeypatch.setattr(students.measuring, "timer", lambda *_, **__: timings)
    search = ["search", "--space", "bert", "--supernet", str(run), "--latency", "9ms", "--json"]
    code, out, err = nasctl(*search)
    assert code == 4 and "took 1 s, the budget is 9 ms" in err
    assert json.loads(out) == json.loads((run / "search.json").read_text())


def given_of(inputs):
    given = {"teacher": str(inputs / "teacher"), "text": [str(inputs / "text.txt")], "hw": "cpu"}
    given |= {"subspaces": ["tiny"], "sequence": 12, "threads": 1, "tuning_epochs": 1}
    return given | {"finetune": str(inputs / "train.tsv"), "test": str(inputs / "test.tsv")}


def test_every_delivered_file_is_itself_timed_and_judged(inputs, tmp_path, monkeypatch):
    job = distill.prepare(given_of(inputs), tmp_path)
    (tmp_path / "students").mkdir()
    space = job.spaces["tiny"]
    net = space.build(space.decode(space.smallest)).eval()
    judged = iter([0.75, 0.5])
    precisions = []

    def timings(paths):
        for path in paths:
            session = onnxruntime.load(path)
            assert session.inputs == {"input": (1, 12)}
            precisions.append(onnxruntime.observed_precision(session))
        return [Timing(ms, 0.0, ms, ms, ms, 9) for ms in (3, 2)]

    def timer(on, board, seed, *, as_written):
        assert as_written
        return timings

    monkeypatch.setattr(students.measuring, "timer", timer)
    monkeypatch.setattr(students, "_accuracy", lambda path, task: next(judged))
    found = students._files(job, {"chosen": net}, job.task)["chosen"]
    assert ["int8" in precision for precision in precisions] == [False, True]
    figures = [
        (found[k]["path"], found[k]["latency_ms"], found[k]["accuracy"]) for k in students.KINDS
    ]
    for figure in figures:
        said = files.read(tmp_path / "students" / figure[0]).metadata_props
        told = {each.key: each.value for each in said}
        assert {"nasctl", "commit", "run"} <= set(told) and told["space"] == "bert"
        arch = arch_from_dict(Arch, json.loads(told["arch"]))
        assert (arch, Frame(**json.loads(told["frame"]))) == (net.arch, net.frame)
    assert figures == [("chosen.onnx", 3, 0.75), ("chosen.int8.onnx", 2, 0.5)]


def interrupted(description, total):
    def update(done, note):
        raise KeyboardInterrupt

    return contextlib.nullcontext(update)


def test_a_stopped_fine_tuning_is_in_no_other_students_way(inputs, tmp_path, monkeypatch):
    job = distill.prepare(given_of(inputs), tmp_path)
    space = job.spaces["tiny"]
    one, other = (space.build(space.decode(genes)) for genes in (space.smallest, space.largest))

    def stopped(net):
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(students.console, "bar", interrupted)
            students._tune(job, "chosen", {"chosen": net}, job.task)
        return list(tmp_path.glob("*.state"))

    assert len(stopped(one)) == 1
    students._tune(job, "chosen", {"chosen": other}, job.task)
    assert not list(tmp_path.glob("*.state"))
    assert len(stopped(one)) == 1
    distilling.forget(job)
    assert not list(tmp_path.glob("*.state"))


@pytest.mark.parametrize(
    "verb",
    [
        ["extract", "--arch", "smallest"],
        ["evaluate"],
        ["export", "--latency", "9ms", "--out", "a.onnx"],
        ["prune", "--target", "macs=-50%"],
    ],
    ids=lambda words: words[0],
)
def test_verbs_of_other_runs_say_where_the_students_are(verb, finished, nasctl):
    code, _, err = nasctl(verb[0], str(finished), *verb[1:])
    assert code == 1 and f"this is a distillation. Its students are in {finished}/students" in err


def test_its_report_is_shown_again(finished, nasctl):
    code, out, err = nasctl("report", str(finished))
    assert code == 0 and "relation loss" in out and "no --finetune" in err


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--space", "bert"], "--supernet: the space bert is searched in a finished distillation"),
        (["--space", "bert", "--epochs", "3"], "--epochs: means nothing for --space bert"),
        (["--space", "bert", "--supernet", "/nowhere"], "no distillation"),
        (["--space", "bert", "--run", "there"], "--run: means nothing for --space bert"),
        (["--space", "bert", "--quick"], "--quick: means nothing for --space bert"),
        (["--space", "bert", "--force"], "--force: means nothing for --space bert"),
        (["--space", "bert", "--dry-run"], "--dry-run: means nothing for --space bert"),
        (["--space", "bert", "--latency", "1ms,2ms"], "--latency: 2 budgets for one student"),
    ],
)
def test_what_a_search_of_students_cannot_be_asked(more, message, nasctl):
    code, _, err = nasctl("search", *more)
    assert code in (1, 2) and message in err and len(err.splitlines()) == 1


def test_images_are_not_for_text(nasctl):
    code, _, err = nasctl("train", "--space", "bert", "--dry-run")
    assert code == 2 and "bert reads text, not images. See nasctl distill" in err


def test_a_dry_run_names_the_sub_spaces_and_writes_nothing(inputs, tmp_path, nasctl):
    own = tmp_path / "own.toml"
    own.write_text("[mine]\nlayers = [2]\nhidden = [32, 48]\nheads = [2, 3]\nhalves = [4]\n")
    more = ["--dry-run", "--json", "--subspaces", f"small,{own}"]
    code, out, err = nasctl(*words(inputs, tmp_path / "run", *more))
    content = json.loads(out)
    found, took = content["subspaces"], content["estimated_seconds"]
    stages = [f"{what} {name}" for name in ("small", "mine") for what in ("training", "ranking")]
    assert list(took) == ["text", *stages] and min(took.values()) >= 0
    assert 0 < content["estimated_total_seconds"] < 600 and "in all" in err
    assert code == 0 and found["mine"]["students"] == 4 and "small" in found and "MMACs" in err
    assert not (tmp_path / "run").exists()


BAD = {
    "huge": ("[huge]\nlayers=[9]\nhidden=[32]\nheads=[2]\nhalves=[4]", "the teacher has 4"),
    "typo": ("[a]\nlayer=[1]\nhidden=[32]\nheads=[2]\nhalves=[4]", "Each is a table with lists"),
    "teacher": (
        "[teacher]\nlayers=[2]\nhidden=[32]\nheads=[2]\nhalves=[4]",
        "--subspaces teacher: other files have this name",
    ),
    "a path": ("['a/b']\nlayers=[2]\nhidden=[32]\nheads=[2]\nhalves=[4]", "cannot name files"),
    "nothing": ("", "cannot read sub-spaces"),
    "a fraction": (
        "[a]\nlayers=[2.5]\nhidden=[32]\nheads=[2]\nhalves=[4]",
        "ascending whole numbers above zero",
    ),
    "odd": ("[a]\nlayers=[1]\nhidden=[33]\nheads=[2]\nhalves=[3]", "no whole number"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_sub_spaces_are_one_line(name, inputs, tmp_path, nasctl):
    content, message = BAD[name]
    (tmp_path / "own.toml").write_text(content)
    more = ["--subspaces", str(tmp_path / "own.toml")]
    code, _, err = nasctl(*words(inputs, tmp_path / "run", *more))
    assert code == 2 and message in err


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--subspaces", "tinny"], "unknown sub-space 'tinny'"),
        (["--subspaces", "tiny,tiny"], "--subspaces tiny: there are two of it"),
        (["--loss", "l2"], "allowed: kl, mse, scores"),
        (["--sequence", "33"], "33 tokens, but positions for 32"),
        (["--relation-heads", "7", "--dry-run"], "of 64 channels (the narrowest student has 48)"),
        (["--relation-heads", "64"], "allowed: 1, 2, 4, 8, 16, 32"),
        (["--batch", "9999"], "a step takes 9999"),
        (["--text", "absent.txt"], "no such file"),
        (["--finetune", "a.tsv"], "one without the other"),
        (["--hw", "nothing"], "unknown device"),
        (["--epochs", "0"], "--epochs"),
        (["--teacher", "/nowhere/at/all"], "no configuration to read"),
    ],
)
def test_bad_input_is_one_line(flags, message, inputs, tmp_path, nasctl):
    code, _, err = nasctl(*words(inputs, tmp_path / "run", *flags))
    assert code in (1, 2) and message in err
    assert err.splitlines()[-1].startswith("nasctl: ")


def test_channels_that_relation_heads_leave_out_are_said(inputs, tmp_path, nasctl):
    flags = ["--relation-heads", "32", "--dry-run", "--json"]
    code, out, err = nasctl(*words(inputs, tmp_path / "run", *flags))
    assert code == 0
    said = "32 relation heads leave out up to 16 of 48 channels"
    assert said in " ".join(err.split()) and said in json.loads(out)["notes"][0]


def test_judging_on_what_was_trained_on_is_refused_and_a_part_of_it_is_said(
    inputs, tmp_path, nasctl
):
    rows = (inputs / "train.tsv").read_text().splitlines()
    (tmp_path / "same.csv").write_text("sentence,label\n" + rows[1].replace("\t", ",") + "\n")
    fresh = "a dull film and not so good dog\t0"
    (tmp_path / "mixed.tsv").write_text("\n".join([*rows[:4], fresh]) + "\n")
    for name, exit_code, said in (
        ("same.csv", 2, "same.csv: every sentence is among the training sentences"),
        ("mixed.tsv", 0, "3 of 4 test sentences are among the training sentences too"),
    ):
        task = ["--finetune", str(inputs / "train.tsv"), "--test", str(tmp_path / name)]
        code, _, err = nasctl(*words(inputs, tmp_path / "run", *task, "--dry-run"))
        assert code == exit_code and said in " ".join(err.split())


def test_a_label_that_training_lacks_is_one_line(inputs, tmp_path, nasctl):
    (tmp_path / "test.tsv").write_text("sentence\tlabel\nthe cat\tneutral\n")
    task = ["--finetune", str(inputs / "train.tsv"), "--test", str(tmp_path / "test.tsv")]
    code, _, err = nasctl(*words(inputs, tmp_path / "run", *task))
    assert code == 1 and "row 1 has the label 'neutral'" in err


@pytest.mark.slow
def test_killed_anywhere_the_same_command_ends_in_the_same_bytes(inputs, tmp_path):
    def command(run):
        return [sys.executable, "-m", "cli.main", *words(inputs, run, "--epochs", "8")]

    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    subprocess.run(command(tmp_path / "whole"), env=environment, check=True, capture_output=True)
    killed = tmp_path / "killed"
    for seconds in (7, 9, 11, 14):
        process = subprocess.Popen(command(killed), env=environment, stderr=subprocess.DEVNULL)
        time.sleep(seconds)
        process.send_signal(signal.SIGKILL)
        process.wait()
    subprocess.run(command(killed), env=environment, check=True, capture_output=True)
    for name in ("tiny.safetensors", "base.safetensors", "students/tiny.safetensors"):
        assert (killed / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    losses = [
        [json.loads(line)["loss"] for line in (run / "base.members.jsonl").read_text().splitlines()]
        for run in (tmp_path / "whole", killed)
    ]
    assert np.array_equal(*losses)
