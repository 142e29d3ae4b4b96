"""`nasctl search --tasks`: a verified file per task inside its budget, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import onnx
import pytest
from test_multitask_search import sides
from torch import nn

from cli import many_tasks
from cli import many_tasks_delivery as delivery
from cli import many_tasks_stages as stages
from deploy import verify
from hw_profiles import device, latency
from nas import checkpoint
from nas.multitask_outcome import Finalist
from nas.multitask_search import space_for
from nas.run import Run

DATA = "from test_multitask_search import examples, sides\ndef task():\n    return sides()\n"
SEARCH = ["search", "--tasks", "class,box", "--data", "two_sides:task", "--hw", "jetson-tx2"]
LITTLE = ["--epochs", "1.6", "--finetune", "0.4", "--batch", "16", "--width", "0.25"]
LITTLE += ["--threads", "1", "--run", "run"]


@pytest.fixture
def data(workdir):
    (workdir / "two_sides.py").write_text(DATA)
    return workdir


def budgets():
    """A little above each task's smallest network, in ms on the device."""
    space = space_for(sides(), 0.25)
    table = latency.table(device.load("jetson-tx2"))
    found = {}
    for name in ("class", "box"):
        own = space.only(name)
        ends = [own.smallest, own.largest]
        low, high = (table.estimate(own.ops(own.decode(g)), "fbnetv5").high_ms for g in ends)
        found[name] = low + 0.4 * (high - low)
    return found


def words(most):
    return ["--latency", ",".join(f"{name}={ms:.4f}ms" for name, ms in most.items())]


@pytest.mark.slow
def test_it_ends_in_a_verified_file_per_task_inside_its_budget(nasctl, data):
    most = budgets()
    first = nasctl(*SEARCH, *LITTLE, *words(most), "--json")
    assert first.code == 0, first.err
    found = json.loads(first.out)
    task = sides()
    for name, row in found["tasks"].items():
        assert row["predicted"]["high_ms"] <= most[name] + 1e-4
        assert row["parity_error"] < 1e-4
        sealed = json.loads((data / "run" / name / "bundle" / "report.json").read_text())
        assert sealed["device"] == {"name": "jetson-tx2"}
        assert not (data / "run" / name / delivery.PICK).exists()
        path = data / "run" / row["file"]["path"]
        said = {p.key: p.value for p in onnx.load(path).metadata_props}
        assert said["task"] == name and json.loads(said["genes"]) == row["genes"]
        assert "commit" in said and json.loads(said["validation"]) == {name: row["val"]}
        images = task.normalise(task.test.images[:3]).numpy()
        (output,) = verify.outputs(path, images).values()
        assert output.shape == (3, {"class": 2, "box": 4}[name]) and np.isfinite(output).all()
    assert set(found["convergence"]) == {"class", "box"}
    before = {p: p.read_bytes() for p in (data / "run").glob("*/bundle/model.onnx")}
    again = nasctl(*SEARCH, *LITTLE, *words(most))
    assert again.code == 0 and "one supernet" not in again.err
    assert {p: p.read_bytes() for p in before} == before
    shown = nasctl("report", "run")
    assert shown.code == 0 and "box" in shown.out and "not measured" in shown.out


OWN = """
from pathlib import Path
import torch
def train(net, task):
    if not Path("licence").exists():
        raise OSError("no licence")
    (goal,) = task.goals
    same = task.test is task.val
    Path(f"{goal.name}.txt").write_text(f"{net.training} {len(task.train)} {same}")
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.fill_(0.01)
"""


@pytest.mark.slow
def test_the_users_own_training_takes_the_place_of_ours(nasctl, data):
    (data / "pipeline.py").write_text(OWN)
    words = [*SEARCH, *LITTLE, "--trainer", "pipeline:train"]
    first = nasctl(*words)
    assert first.code == 1 and "--trainer: the module failed with OSError: no licence" in first.err
    (data / "licence").touch()
    result = nasctl(*words)
    assert result.code == 0, result.err
    for name in ("class", "box"):
        assert (data / f"{name}.txt").read_text() == "True 80 True"
        tensors, _ = checkpoint.read(data / "run" / name / "model.safetensors")
        assert all((t == 0.01).all() for key, t in tensors.items() if key.endswith(".weight"))


class Killed(BaseException):
    """What no code of ours catches: as kill -9, but at a place of our choosing."""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("where", "place"), [(stages, "chosen"), (delivery, "_pick"), (delivery, "_rows")]
)
def test_killed_anywhere_the_same_command_goes_on_to_the_same_files(
    nasctl, data, where, place, monkeypatch
):
    words = [*SEARCH, *LITTLE, "--tasks", "box"]
    whole = nasctl(*words, "--run", "whole")
    assert whole.code == 0, whole.err

    def killed(*arguments):
        raise Killed

    with monkeypatch.context() as patched:
        patched.setattr(where, place, killed)
        with pytest.raises(Killed):
            nasctl(*words)
    assert nasctl(*words).code == 0
    one, two = (data / run / "box" / "model.safetensors" for run in ("whole", "run"))
    assert one.read_bytes() == two.read_bytes()


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (["--tasks", "class,boxes"], 2, "unknown task 'boxes'; allowed: box, class. Did you mean"),
        (["--tasks", "class,class"], 2, "--tasks: a task is named twice"),
        (["--space", "resnet"], 2, "space 'resnet' answers one task; allowed: fbnetv5"),
        (["--strategy", "random"], 2, "--strategy: is of searches for one task"),
        (["--latency", "class=1ms,seg=2ms"], 2, "--latency: unknown task 'seg'"),
        (["--latency", "class=5"], 2, "'5' has no unit"),
        (["--latency", "1ms", "--macs", "box=1MMACs"], 2, "two budgets for box"),
        (["--latency", "1us"], 3, "task 'class': no network fits 0.001ms: the smallest needs"),
        (["--latency", "1us", "--dry-run"], 3, "task 'class': no network fits 0.001ms"),
        (["--latency", "class=1ms,class=9ms"], 2, "--latency: names class twice"),
        (["--macs", "box=1kMACs"], 3, "task 'box': no network fits 1000 MACs: the smallest"),
        (["--batch", "32"], 2, "--batch: 32 images per step, but 80 training images"),
        (["--trainer", "train.py"], 2, "--trainer: 'train.py'; allowed: my_pkg.my_mod:train"),
        (["--trainer", "two_sides:fit"], 2, "module 'two_sides' has no 'fit'"),
        (["--data", "digits"], 2, "--data: no such data 'digits'"),
    ],
)
def test_what_is_refused_before_any_training(nasctl, data, arguments, code, said):
    result = nasctl(*SEARCH, *LITTLE, *arguments)
    assert result.code == code, result.err
    assert said in " ".join(result.err.split())
    assert not (data / "run" / "shared.safetensors").exists()


@pytest.mark.parametrize(
    ("flag", "words"), [("together", []), ("trainer", ["two_sides:fit"])], ids=lambda of: str(of)
)
def test_flags_of_several_tasks_need_them(nasctl, workdir, flag, words):
    result = nasctl("search", "--hw", "jetson-tx2", f"--{flag}", *words, "--dry-run")
    assert result.code == 2
    assert f"--{flag}: is of searches for several tasks. Name them" in " ".join(result.err.split())


def test_a_table_that_lacks_an_operator_is_told(nasctl, data, monkeypatch):
    table = latency.table(device.load("jetson-tx2"))
    lacking = table.model_copy(
        update={"terms": {k: v for k, v in table.terms.items() if k != "pool"}}
    )
    monkeypatch.setattr(latency, "table", lambda board: lacking)
    result = nasctl(*SEARCH, *LITTLE)
    assert result.code == 1
    assert "no latency for operator 'avgpool'" in result.err


def test_images_without_a_label_of_a_task_are_told(nasctl, data):
    code = DATA.replace(
        "return sides()",
        "two = examples(80)\n    two.targets['box'][:] = float('nan')\n    return sides(two)",
    )
    (data / "no_boxes.py").write_text(code)
    result = nasctl(*SEARCH, *LITTLE, "--data", "no_boxes:task")
    assert result.code == 1
    assert "task 'box': none of the 64 training images" in " ".join(result.err.split())


def test_a_dry_run_says_how_long(nasctl, data):
    result = nasctl(*SEARCH, *LITTLE, "--dry-run", "--json")
    assert result.code == 0, result.err
    assert json.loads(result.out)["estimated_seconds"]["search"] > 0
    assert not (data / "run").exists()


@pytest.mark.parametrize("tasks", ["3", '[["class"]]', "true"])
def test_a_specs_tasks_are_a_list_of_names(nasctl, data, tasks):
    (data / "spec.toml").write_text(f"tasks = {tasks}")
    result = nasctl("search", "--data", "my_sides:task", "--spec", "spec.toml")
    assert result.code == 2 and "allowed: a list, as" in " ".join(result.err.split())


@pytest.mark.parametrize(
    ("content", "more", "said"),
    [
        ("[latency_ms]\nseg = 2.0", [], "--latency: unknown task 'seg'; allowed: box, class"),
        ("[macs]\nseg = 1e6", [], "--macs: unknown task 'seg'"),
        ("[macs]\nbox = 1e6", ["--latency", "1ms"], "--latency, --macs: two budgets for box"),
    ],
)
def test_a_specs_budgets_are_checked_like_typed_ones(nasctl, data, content, more, said):
    (data / "spec.toml").write_text(content)
    result = nasctl(*SEARCH, *LITTLE, *more, "--spec", "spec.toml")
    assert result.code == 2 and said in " ".join(result.err.split())


@pytest.mark.parametrize(
    "verb",
    [
        ["export", "--latency", "9ms", "--out", "a.onnx"],
        ["extract", "--arch", "smallest"],
        ["prune", "--target", "macs=-50%"],
    ],
    ids=lambda words: words[0],
)
def test_verbs_of_other_runs_say_where_the_files_are(nasctl, workdir, verb):
    many = {"tasks": ["class", "box"]}
    for spec, said in (
        (many, "this search has a network for each of class, box. Their files are in run/class"),
        ({**many, "max_drop": {}}, "this is a pruning. Its file is in run/bundle"),
    ):
        (workdir / "run").mkdir(exist_ok=True)
        (workdir / "run" / "run.json").write_text(json.dumps({"spec": spec, "stages": {}}))
        result = nasctl(verb[0], "run", *verb[1:])
        assert result.code == 1 and said in " ".join(result.err.split())


def test_json_is_all_that_stdout_gets(nasctl, data, monkeypatch):
    content = {"tasks": {}, "convergence": {}}
    monkeypatch.setattr(many_tasks, "execute", lambda job, force: content)
    assert json.loads(nasctl(*SEARCH, *LITTLE, "--json").out) == content
    assert "predicted" in nasctl(*SEARCH, *LITTLE).out


def test_a_doubtful_measurement_is_told_as_one(capsys):
    row = {"macs": 1e6, "budget": None, "val": 0.9, "test": None, "file": {"path": "model.onnx"}}
    row["predicted"] = {"value_ms": 0.9, "high_ms": 1.1, "source": "table"}
    row["measured"] = {"median_ms": 1.0, "noisy": "other programs were running"}
    many_tasks.say_outcome({"tasks": {"class": row}, "convergence": {}}, Path("run"))
    assert "in doubt: other programs" in " ".join(capsys.readouterr().err.split())


def test_a_pick_holds_for_its_own_key_only(tmp_path, monkeypatch):
    """The first of two is too slow at first, and then no more."""
    (tmp_path / "box").mkdir()
    job = SimpleNamespace(
        budget_ms=lambda part: 2.0,
        device=SimpleNamespace(local=True),
        task=SimpleNamespace(shape=(3, 8, 8)),
        own=lambda part: Run(tmp_path / part.folder),
    )
    two = [Finalist((0, 1), 0.1, 0.9), Finalist((1, 1), 0.2, 0.8)]
    took = iter([3.0, 1.0, 1.0])
    monkeypatch.setattr(delivery, "child", lambda *_: nn.Identity())
    monkeypatch.setattr(delivery.onnx, "export", lambda *_, **__: None)
    monkeypatch.setattr(delivery, "_timed", lambda *_: SimpleNamespace(median_ms=next(took)))

    def picked(finalists, key):
        return delivery._pick(job, None, None, finalists, stages.Part("box", ("box",)), key)

    assert picked(two, "a") == two[1] == picked(two, "a")
    (tmp_path / "box" / delivery.OWN_STATE).touch()
    assert picked(two, "b") == two[0]
    assert not (tmp_path / "box" / delivery.OWN_STATE).exists()
