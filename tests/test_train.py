"""`nasctl train`, `extract` and `evaluate`, in this process."""

from __future__ import annotations

import contextlib
import json
import shutil
from itertools import count
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from cli import console, main
from nas import checkpoint
from tests.test_cli import assert_one_line

FLAGS = ("--width", 0.25, "--threads", 1, "--epochs", 0.2, "--batch", 64)
TRAIN = ("train", *FLAGS)
SEARCH = ("search", "--no-alone", "--hw", "jetson", "--evaluations", 3, *FLAGS)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A finished training, to be copied by whoever changes it."""
    folder = tmp_path_factory.mktemp("trained") / "run"
    assert main.run([str(word) for word in (*TRAIN, "--run", folder)]) == 0
    return folder


@pytest.fixture
def copied(trained, workdir):
    return Path(shutil.copytree(trained, workdir / "run"))


@pytest.fixture
def model(nasctl, copied, workdir):
    """A network's file and its architecture beside it."""
    outcome = nasctl("extract", copied, "--arch", "smallest")
    assert outcome.code == 0, outcome.err
    return workdir / "model.safetensors"


def weights(folder):
    return load_file(folder / "supernet.safetensors")


def said_by(path):
    return json.loads(checkpoint.read(path)[1]["nasctl"])


def rewrite(path, **changes):
    """Another description, the same weights."""
    tensors, _ = checkpoint.read(path)
    checkpoint.write(path, tensors, {"nasctl": json.dumps({**said_by(path), **changes})})


# ---- train ---------------------------------------------------------------------------------------


def test_a_finished_training_is_not_repeated_unless_forced(nasctl, copied):
    before = (copied / "supernet.safetensors").stat().st_mtime_ns
    again = nasctl(*TRAIN, "--run", copied, "--json")
    assert again.code == 0, again.err
    found = json.loads(again.out)
    assert (found["trained_now"], found["steps"], found["space"]) == (False, 3, "resnet")
    assert (copied / "supernet.safetensors").stat().st_mtime_ns == before
    forced = nasctl(*TRAIN, "--run", copied, "--json", "--force")
    assert json.loads(forced.out)["trained_now"]
    assert (copied / "supernet.safetensors").stat().st_mtime_ns > before


@pytest.mark.parametrize("own", [True, False], ids=["in its directory", "elsewhere"])
def test_a_search_takes_a_trained_supernet(own, nasctl, copied, monkeypatch):
    def reached(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("nas.supernet.train", lambda *_, **__: pytest.fail("it trained again"))
    monkeypatch.setattr("cli.stages.searched", reached)
    words = ("--run", copied) if own else ("--supernet", copied, "--run", "search")
    assert nasctl(*SEARCH, *words).code == 130
    if own:  # nor does a training repeat itself after a search
        assert nasctl(*TRAIN, "--run", copied).code == 0
        assert json.loads((copied / "run.json").read_text())["spec"]["hw"] == "jetson"
    else:
        assert not Path("search/supernet.safetensors").exists()
        assert nasctl("evaluate", "search", "--arch", "smallest").code == 0


@pytest.mark.slow
def test_what_a_search_chose_and_what_it_delivered_can_be_evaluated(nasctl, copied):
    assert nasctl(*SEARCH, "--run", copied).code == 0
    chosen = json.loads((copied / "arch.json").read_text())
    mine = json.loads(nasctl("evaluate", copied, "--json").out)
    assert mine["genes"] == chosen["genes"]
    delivered = json.loads(nasctl("evaluate", copied / "model.safetensors", "--json").out)
    assert delivered["loss"] == pytest.approx(chosen["cross_entropy"], rel=1e-5) == mine["loss"]


def test_another_training_in_the_directory_is_refused_with_the_difference(nasctl, copied):
    outcome = nasctl(*TRAIN, "--seed", 3, "--run", copied)
    assert_one_line(outcome, 2, "another spec: seed 0 there, 3 here")
    assert_one_line(nasctl(*SEARCH, "--seed", 3, "--run", copied), 2, "seed 0 there, 3 here")


def interrupted_after(steps):
    """For `console.deferred_interrupt`: as if Ctrl-C came during that step."""
    asked = count(1)

    @contextlib.contextmanager
    def deferred(*, once=True):
        yield lambda: next(asked) >= steps

    return deferred


def test_an_interrupted_training_goes_on_to_the_same_weights(nasctl, trained, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(console, "deferred_interrupt", interrupted_after(2))
        outcome = nasctl(*TRAIN, "--run", "run")
    assert_one_line(outcome, 130, "interrupted; the same command goes on")
    run = Path("run")
    assert (run / "training.safetensors").exists() and not (run / "supernet.safetensors").exists()
    assert_one_line(nasctl("extract", run, "--arch", "smallest"), 1, "'train' is not finished")
    assert nasctl(*TRAIN, "--run", "run").code == 0
    assert not (run / "training.safetensors").exists()
    both = weights(run), weights(trained)
    assert all(torch.equal(tensor, both[1][name]) for name, tensor in both[0].items())


def test_a_plan_says_how_long_and_leaves_nothing_behind(nasctl, workdir):
    outcome = nasctl(*TRAIN, "--dry-run", "--json")
    assert outcome.code == 0, outcome.err
    planned = json.loads(outcome.out)
    assert (planned["steps"], planned["processes"]) == (3, 1)
    assert planned["estimated_total_seconds"] >= 0 and "hw" not in planned["spec"]
    assert list(workdir.iterdir()) == []


def test_micro_batches_are_another_way_to_the_same_run(nasctl, copied):
    outcome = nasctl(*TRAIN, "--accumulate", 2, "--run", copied, "--json")
    assert outcome.code == 0 and not json.loads(outcome.out)["trained_now"]
    assert said_by(copied / "supernet.safetensors")["accumulate"] == 1
    assert nasctl(*TRAIN, "--accumulate", 2, "--run", "other").code == 0
    assert said_by(Path("other/supernet.safetensors"))["accumulate"] == 2
    assert not torch.equal(weights(copied)["stem.weight"], weights(Path("other"))["stem.weight"])


@pytest.mark.parametrize(
    ("words", "fragments"),
    [
        ("train --space resnt", ["--space: unknown space 'resnt'", "Did you mean resnet?"]),
        ("train --data digts", ["--data: no such data 'digts'"]),
        ("train --batch 100000", ["--batch: 100000 images per step"]),
        ("train --batch 16 --accumulate 9", ["--batch: 16 images per step in 9 shards", "18"]),
        ("train --batch 1", ["--batch: "]),
        ("train --accumulate 0", ["--accumulate"]),
        ("train --hw jetson", ["--hw"]),
        ("train --policy bestdown", ["--policy: unknown policy 'bestdown'", "bestup"]),
        ("train --loss mse", ["--loss: unknown loss 'mse'", "alpha"]),
        ("train --dropout 1", ["--dropout: 1", "0 to below 1"]),
        ("train --floor 0", ["--floor: 0"]),
        ("train --operations 1.5", ["--operations"]),
        ("extract nowhere --arch largest", ["RUN: no run in nowhere"]),
        ("extract nowhere", ["--arch"]),
        ("extract nowhere --arch largest --out x.onnx", ["--out: 'x.onnx'", ".safetensors"]),
        ("evaluate nowhere", ["RUN|MODEL: no run and no model nowhere"]),
        ("evaluate nowhere --split tset", ["--split: unknown split 'tset'", "val, test"]),
    ],
)
def test_a_wrong_word_is_one_line_and_exit_code_2(words, fragments, nasctl):
    assert_one_line(nasctl(*words.split()), 2, *fragments)


def test_methods_are_options_and_another_method_is_another_run(nasctl, copied):
    words = ("--policy", "bestup", "--loss", "alpha", "--floor", 0.1, "--dropout", 0.1)
    assert_one_line(nasctl(*TRAIN, *words, "--run", copied), 2, "policy 'uniform' there, 'bestup'")
    outcome = nasctl(*TRAIN, *words, "--run", "other")
    assert outcome.code == 0, outcome.err
    assert not torch.equal(weights(copied)["stem.weight"], weights(Path("other"))["stem.weight"])
    assert nasctl("evaluate", "other", "--arch", "smallest").code == 0


# ---- extract and evaluate ------------------------------------------------------------------------


def test_an_extracted_network_says_what_it_is(model, copied):
    beside, said = json.loads(model.with_suffix(".json").read_text()), said_by(model)
    assert beside["arch"] == said["network"]["arch"] and beside["params"] > 0
    assert beside["differs_from_supernet"] < 1e-4
    assert beside["weights"]["bytes"] == model.stat().st_size
    assert said["supernet"] == beside["supernet"] and len(said["task"]["classes"]) == 10
    # every tensor but the norms' statistics is a slice of the supernet's
    whole = weights(copied)
    for name, tensor in load_file(model).items():
        if "running" not in name and "batches" not in name:
            start = (whole[name].shape[-1] - tensor.shape[-1]) // 2 if tensor.ndim == 4 else 0
            part = whole[name][tuple(slice(0, n) for n in tensor.shape[:2])]
            part = part[..., start : start + tensor.shape[-1]] if tensor.ndim == 4 else part
            assert torch.equal(part.reshape(tensor.shape), tensor), name


def test_a_network_is_the_same_in_its_run_and_in_its_file(nasctl, model, copied):
    here = json.loads(nasctl("evaluate", model, "--json").out)
    there = json.loads(nasctl("evaluate", copied, "--arch", "smallest", "--json").out)
    assert here == there
    named = nasctl("evaluate", copied, "--arch", model.with_suffix(".json"), "--json")
    assert json.loads(named.out) == there
    assert there["split"] == "val" and 0 <= there["accuracy"] <= 1 and there["images"] == 359


def test_the_test_split_is_read_only_when_named_and_said(nasctl, model):
    val, test = nasctl("evaluate", model), nasctl("evaluate", model, "--split", "test")
    assert "validation images" in val.err and "test" not in val.err
    assert "359 test images" in test.err and "read once" in test.err


def test_extraction_that_does_not_equal_the_slice_is_exit_code_5(nasctl, copied, monkeypatch):
    def wrong(net, small):
        return small.train(net.training)  # as initialised

    monkeypatch.setattr("cli.child.extract", wrong)
    outcome = nasctl("extract", copied, "--arch", "smallest")
    assert_one_line(outcome, 5, "the extracted network differs from the supernet by")
    assert not Path("model.safetensors").exists()


@pytest.mark.parametrize(
    ("arch", "code", "said"),
    [
        ("nowhere.json", 2, "cannot read 'nowhere.json'"),
        ("{", 2, "not JSON"),
        ("{}", 2, "names no network"),
        ('[{"genes": []}]', 2, "Pass one of its entries"),
        ('{"genes": [0, 1]}', 2, "2 genes for a space of 12"),
        ('{"genes": 7}', 2, "something else for a space of 12"),
        ('{"genes": [0,0,0,0,0,0,0,0,0,0,0,9]}', 2, "gene stage2.block1.mid is 9; allowed: 0 to"),
        ('{"genes": [0,0,0,0,0,0,0,0,0,0,0,true]}', 2, "gene stage2.block1.mid is True"),
        ('{"genes": [0,0,0,0,0,0,0,0,0,0,0,0], "arch": {"resolution": 32}}', 1, "resolution 8"),
    ],
)
def test_an_arch_that_names_no_network_is_one_line(arch, code, said, nasctl, trained):
    assert_one_line(nasctl("extract", trained, "--arch", arch), code, "--arch: ", said)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"format": 2}, "written in format 2 by another version of nasctl, this one reads 1"),
        ({"data": "0" * 64}, "other data (sha256 00000000 there"),
        ({"space": "mobilenet"}, "space is mobilenet there, resnet here"),
        ({"genes": {"stage0.depth": [1]}}, "gene stage0.width has options None there, [8] here"),
    ],
)
def test_a_supernet_of_something_else_is_refused_with_the_difference(changes, said, nasctl, copied):
    rewrite(copied / "supernet.safetensors", **changes)
    outcome = nasctl(*SEARCH, "--supernet", copied, "--run", "new")
    assert_one_line(outcome, 1, "supernet.safetensors: ", said)
    outcome = nasctl("evaluate", "new", "--arch", "largest")
    assert_one_line(outcome, 1, "supernet.safetensors: ", said)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"format": None}, "written in format None by another version"),
        ({"data": "0" * 64}, "other data (sha256 00000000 there"),
        ({"genes": {}}, "the space changed: gene stage0.width has options None there"),
        ({"width": None}, "gene stage0.width has options [8] there, [16, 24, 32] here"),
    ],
)
def test_a_network_of_something_else_is_refused_with_the_difference(changes, said, nasctl, model):
    rewrite(model, **changes)
    assert_one_line(nasctl("evaluate", model), 1, "model.safetensors: ", said)


def test_a_changed_supernet_is_not_used(nasctl, copied):
    rewrite(copied / "supernet.safetensors", space="mobilenet")
    outcome = nasctl("evaluate", copied, "--arch", "largest")
    assert_one_line(outcome, 1, "its files were changed since")


def test_files_that_are_no_network_are_one_line(nasctl, copied, model):
    outcome = nasctl("evaluate", copied / "supernet.safetensors")
    assert_one_line(outcome, 2, "is a whole supernet", "Name its run directory")
    save_file({"x": torch.zeros(2)}, "other.safetensors")
    outcome = nasctl("evaluate", "other.safetensors")
    assert_one_line(outcome, 1, "do not say what they were trained on")
    Path("bad.safetensors").write_bytes(b"no")
    assert_one_line(nasctl("evaluate", "bad.safetensors"), 1, "damaged")
    assert_one_line(nasctl("evaluate", model, "--arch", "largest"), 2, "--arch: a model's file")
    assert_one_line(nasctl("evaluate", copied), 2, "no search has chosen a network", "largest")
